//! Where events go: text for people, JSON for programs. Sinks only write; they never ask the kernel anything.

pub mod explain;
pub mod feed;
pub mod filter;
pub mod http;
pub mod live;
pub mod metrics;
pub mod paint;
pub mod pcapng;
pub mod printer;
pub mod socket;
pub mod text;
pub mod writer;

use serde::{Deserialize, Serialize};

pub use self::{
    paint::{Color, Paint},
    printer::{Explain, Printer},
};
use crate::event::Line;

/// How events are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Format {
    /// One line an event, for people, and explanations.
    Text,
    /// One JSON object a line, schema vxmon.event/1.
    Json,
}

/// An event as a line, without its end, colour or explanation.
pub fn render(format: Format, line: &Line) -> String {
    match format {
        Format::Text => text::render(&line.record, Paint::PLAIN),
        // Strings, numbers and maps with string keys: nothing that JSON cannot say.
        Format::Json => serde_json::to_string(line).unwrap_or_default(),
    }
}
