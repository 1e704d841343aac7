use super::*;
use crate::{event::Flow, sink::explain::tests::fault_b};

fn printer(explain: Explain) -> Printer {
    Printer::new(Format::Text, explain, Paint::PLAIN, "6.18.44".into())
}

fn line(attempt: u64, verdict: &'static str) -> Line {
    let flow = Some(Flow { attempt, conntrack_timeout_s: Some(30), ..Flow::default() });
    Line::from(Record::Anomaly(Box::new(Anomaly { flow, verdict, ..fault_b() })))
}

fn lines(printer: &mut Printer, attempt: u64, verdict: &'static str) -> usize {
    let text = printer.render(&line(attempt, verdict));
    let (event, explanation) = text.split_once('\n').unwrap_or((&text, ""));
    // Events and explanations can be told apart by their first character.
    assert!(event.starts_with("12:00:54.373945 eth0 "), "{text}");
    assert!(explanation.lines().all(|line| line.starts_with("    ")), "{text}");
    assert!(explanation.lines().all(|line| line.chars().count() <= WIDTH || line.contains('`')), "{text}");
    explanation.lines().count()
}

#[test]
fn a_cause_is_explained_in_full_once() {
    let mut printer = printer(Explain::Auto);
    let first = lines(&mut printer, 1, "nat-stale-port");
    assert!(first >= 8, "{first} lines");
    assert_eq!(lines(&mut printer, 2, "nat-stale-port"), 0);
    // Another connection with the same cause.
    let again = printer.render(&line(1, "nat-stale-port"));
    assert!(again.contains("explained at 12:00:54") && again.contains("30 s"), "{again}");
    assert!(again.lines().count() < first, "{again}");
    // Another cause, also if its first packet was not told.
    assert!(lines(&mut printer, 7, "bad-outer") >= 3);
}

#[test]
fn always_and_never() {
    let (mut always, mut never) = (printer(Explain::Always), printer(Explain::Never));
    let full = lines(&mut always, 1, "nat-stale-port");
    assert!(lines(&mut always, 2, "nat-stale-port") >= full);
    assert_eq!(lines(&mut never, 1, "nat-stale-port"), 0);
}

#[test]
fn the_causes_remembered_are_bounded() {
    let mut printer = printer(Explain::Auto);
    for number in 0..3 * CAUSES {
        let anomaly = Anomaly { dev: format!("eth{number}"), ..fault_b() };
        printer.render(&Line::from(Record::Anomaly(Box::new(anomaly))));
    }
    assert_eq!(printer.explained.len(), CAUSES);
}

#[test]
fn json_has_neither_colour_nor_explanation() {
    let mut printer = Printer::new(Format::Json, Explain::Always, Paint::COLOURED, String::new());
    let text = printer.render(&line(1, "nat-stale-port"));
    assert_eq!(text.lines().count(), 1);
    assert!(!text.contains('\u{1b}'), "{text}");
}

#[test]
fn without_its_colours_a_line_is_the_same() {
    let mut plain = printer(Explain::Always);
    let mut coloured = Printer::new(Format::Text, Explain::Always, Paint::COLOURED, "6.18.44".into());
    let painted = coloured.render(&line(1, "nat-stale-port"));
    assert!(painted.contains("\u{1b}["));
    let mut stripped = String::new();
    for (number, piece) in painted.split("\u{1b}[").enumerate() {
        stripped += if number == 0 { piece } else { piece.split_once('m').map_or(piece, |(_, rest)| rest) };
    }
    assert_eq!(stripped, plain.render(&line(1, "nat-stale-port")));
}

#[test]
fn rules_are_not_broken() {
    let rule = "`-A KUBE-POSTROUTING -m mark --mark 0x4000/0x4000 -j MASQUERADE --random-fully`";
    let wrapped = wrap(&format!("some words before {rule} and some words after it, to the end"), 30);
    assert!(wrapped.iter().any(|line| line.contains(rule)), "{wrapped:#?}");
    assert_eq!(wrapped.join(" ").split(' ').count(), 3 + rule.split(' ').count() + 8);
    assert_eq!(wrap("", 30), [""]);
}
