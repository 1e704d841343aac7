//! The flags that say how events are written, of each verb that writes them.

use crate::sink::{Color, Explain, Format, Paint};

/// How events are written.
#[derive(Debug, clap::Args)]
#[group(skip)]
pub struct Args {
    /// How to write events.
    #[arg(long, env = "VXMON_FORMAT", value_enum, default_value_t = Format::Text)]
    pub format: Format,
    /// When to explain a wrong checksum below its line, in text.
    #[arg(long, env = "VXMON_EXPLAIN", value_enum, default_value_t = Explain::Auto)]
    pub explain: Explain,
    /// When to colour text.
    #[arg(long, env = "VXMON_COLOR", value_enum, default_value_t = Color::Auto)]
    color: Color,
}

impl Args {
    /// Whether to colour text that goes to standard output, or elsewhere.
    pub fn paint(&self, to_stdout: bool) -> Paint {
        Paint::choose(self.color, to_stdout)
    }
}
