//! The table that is printed, a line as soon as it is measured.

#![expect(clippy::print_stdout, reason = "the table is the output")]

/// What a measurement is held against.
#[derive(Clone, Copy, Debug)]
pub enum Limit {
    /// Told, not judged.
    None,
    /// Told beside a limit that is about something else.
    Information(f64),
    /// At most so much.
    AtMost(f64),
    /// At least so much.
    AtLeast(f64),
}

/// Lines printed so far, by how they went.
#[derive(Debug, Default)]
pub struct Table {
    judged: u32,
    missed: u32,
}

impl Table {
    /// Prints the head.
    pub fn new() -> Self {
        print("", "measured", "baseline", "limit", "");
        Self::default()
    }

    /// A group of lines.
    pub fn section(&self, name: &str) {
        println!("\n{name}");
    }

    /// A remark below a line.
    pub fn note(&self, text: &str) {
        println!("    {text}");
    }

    /// A measurement. The unit belongs to all three numbers.
    pub fn line(&mut self, what: &str, measured: f64, unit: &str, baseline: &str, limit: Limit) {
        let (text, missed) = match limit {
            Limit::None => (String::new(), None),
            Limit::Information(other) => (format!("({other} {unit})"), None),
            Limit::AtMost(most) => (format!("<= {most} {unit}"), Some(measured > most)),
            Limit::AtLeast(least) => (format!(">= {least} {unit}"), Some(measured < least)),
        };
        let mark = match (missed, limit) {
            (None, Limit::Information(_)) => "information",
            (None, _) => "",
            (Some(false), _) => "ok",
            (Some(true), _) => "OVER THE LIMIT",
        };
        self.judged += u32::from(missed.is_some());
        self.missed += u32::from(missed == Some(true));
        let digits = if measured < 1000.0 { 1 } else { 0 };
        print(what, &format!("{measured:.digits$} {unit}"), baseline, &text, mark);
    }

    /// The last line.
    pub fn end(&self) {
        println!("\n{} of {} limits met", self.judged - self.missed, self.judged);
    }
}

fn print(what: &str, measured: &str, baseline: &str, limit: &str, mark: &str) {
    println!("{}", format!("{what:<58} {measured:>12} {baseline:>26} {limit:>12}  {mark}").trim_end());
}

/// The middle value; of an even number the lower one.
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len().saturating_sub(1) / 2).copied().unwrap_or(f64::NAN)
}

/// The largest value.
pub fn max(values: &[f64]) -> f64 {
    values.iter().copied().fold(f64::NAN, f64::max)
}
