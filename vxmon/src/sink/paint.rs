//! Colour, where it is wanted: on terminals that have it, unless `NO_COLOR` is set.

use std::io;

use anstyle::{AnsiColor, Style};

/// When to colour.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Color {
    /// On a terminal, unless NO_COLOR is set.
    Auto,
    /// Also in files and pipes.
    Always,
    /// Not at all.
    Never,
}

/// Whether to colour, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Paint {
    on: bool,
}

impl Paint {
    /// Without colour.
    pub const PLAIN: Self = Self { on: false };
    /// With colour.
    pub const COLOURED: Self = Self { on: true };

    /// For standard output, or for a file.
    pub fn choose(color: Color, is_stdout: bool) -> Self {
        let on = match color {
            Color::Always => true,
            Color::Never => false,
            Color::Auto => is_stdout && anstream::AutoStream::choice(&io::stdout()) != anstream::ColorChoice::Never,
        };
        Self { on }
    }

    /// What is wrong.
    pub fn bad(self, text: &str) -> String {
        self.with(AnsiColor::Red.on_default().bold(), text)
    }

    /// What is in doubt.
    pub fn warn(self, text: &str) -> String {
        self.with(AnsiColor::Yellow.on_default().bold(), text)
    }

    /// What is right.
    pub fn good(self, text: &str) -> String {
        self.with(AnsiColor::Green.on_default().bold(), text)
    }

    /// What only leads the eye.
    pub fn label(self, text: &str) -> String {
        self.with(AnsiColor::Cyan.on_default(), text)
    }

    /// What is to be typed.
    pub fn command(self, text: &str) -> String {
        self.with(Style::new().bold(), text)
    }

    fn with(self, style: Style, text: &str) -> String {
        if self.on { format!("{style}{text}{style:#}") } else { text.to_owned() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn colour_only_where_it_is_wanted() {
        assert_eq!(Paint::PLAIN.bad("x"), "x");
        assert_eq!(Paint::COLOURED.bad("x"), "\u{1b}[1m\u{1b}[31mx\u{1b}[0m");
        assert_eq!(Paint::choose(Color::Always, false), Paint::COLOURED);
        assert_eq!(Paint::choose(Color::Never, true), Paint::PLAIN);
        assert_eq!(Paint::choose(Color::Auto, false), Paint::PLAIN);
    }
}
