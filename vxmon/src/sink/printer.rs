//! Lines as `attach` prints them: with colour and explanations in text, none of that in JSON. A line of an event begins with
//! its time; lines of an explanation begin with spaces, so that `grep -v '^ '` leaves the events alone.

use std::collections::VecDeque;

use super::{
    Format, Paint,
    explain::{self, Part},
    text,
};
use crate::event::{Anomaly, Line, Record};

/// When to explain an anomaly.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Explain {
    /// At the first of each connection; in one line if the cause is one that was explained already.
    Auto,
    /// Each, in full.
    Always,
    /// Lines only.
    Never,
}

/// Causes that are remembered as explained; the oldest gives way.
const CAUSES: usize = 64;
/// Lines of an explanation are no longer than this, commands excepted.
const WIDTH: usize = 116;
/// Width of the first column of an explanation.
const LABEL: usize = 6;

/// Turns events into text.
#[derive(Debug)]
pub struct Printer {
    format: Format,
    explain: Explain,
    paint: Paint,
    /// `uname -r`.
    release: String,
    /// Keys of the causes that were explained, and when.
    explained: VecDeque<(String, String)>,
}

impl Printer {
    /// For a node whose kernel has this release (`uname -r`).
    pub fn new(format: Format, explain: Explain, paint: Paint, release: String) -> Self {
        Self { format, explain, paint, release, explained: VecDeque::new() }
    }

    /// An event, without the last line's end.
    pub fn render(&mut self, line: &Line) -> String {
        match self.format {
            Format::Json => super::render(Format::Json, line),
            Format::Text => {
                let mut text = text::render(&line.record, self.paint);
                if let Record::Anomaly(anomaly) = &line.record {
                    for line in self.explanation(anomaly) {
                        text.push('\n');
                        text += &line;
                    }
                }
                text
            }
        }
    }

    /// What it means, if that is due.
    fn explanation(&mut self, anomaly: &Anomaly) -> Vec<String> {
        match self.explain {
            Explain::Never => return Vec::new(),
            Explain::Always => {}
            Explain::Auto => {
                let is_first = anomaly.flow.as_ref().is_some_and(|flow| flow.attempt == 1);
                let key = explain::cause_key(anomaly);
                let before =
                    self.explained.iter().find(|(explained, _)| *explained == key).map(|(_, when)| when.clone());
                match before {
                    Some(when) if is_first => return self.as_before(anomaly, &when),
                    Some(_) => return Vec::new(),
                    None => {}
                }
                if self.explained.len() == CAUSES {
                    self.explained.pop_front();
                }
                self.explained.push_back((key, text::time_of_day(&anomaly.ts).to_owned()));
            }
        }
        explain::explain(anomaly, &self.release).iter().flat_map(|part| self.part(part)).collect()
    }

    /// For a connection whose cause was explained already: what is its own.
    fn as_before(&self, anomaly: &Anomaly, when: &str) -> Vec<String> {
        let parts = explain::explain(anomaly, &self.release);
        let then = parts.into_iter().find(|part| part.about == "then").map(|then| format!("; {}", then.text));
        let text = format!("for the cause explained at {when}{}", then.unwrap_or_default());
        self.part(&Part { about: "why", text, command: None })
    }

    fn part(&self, part: &Part) -> Vec<String> {
        let mut lines = Vec::new();
        let indent = " ".repeat(4 + LABEL + 1);
        for (number, text) in wrap(&part.text, WIDTH - indent.len()).into_iter().enumerate() {
            lines.push(if number == 0 {
                let padding = " ".repeat(LABEL.saturating_sub(part.about.len()));
                format!("    {}{padding} {text}", self.paint.label(part.about))
            } else {
                format!("{indent}{text}")
            });
        }
        lines.extend(part.command.as_ref().map(|command| format!("{indent}{}", self.paint.command(command))));
        lines
    }
}

/// Breaks a text at spaces, but not between backquotes, where a rule stands as one would type it.
fn wrap(text: &str, width: usize) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    let mut is_quoted = false;
    for word in text.split(' ') {
        let fits = |line: &String| line.chars().count() + 1 + word.chars().count() <= width;
        match lines.last_mut() {
            Some(line) if is_quoted || fits(line) => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(word.to_owned()),
        }
        is_quoted ^= word.matches('`').count() % 2 == 1;
    }
    lines
}

#[cfg(test)]
#[path = "printer/tests.rs"]
mod tests;
