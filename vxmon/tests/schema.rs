//! `docs/event.schema.json` is what the Rust types say. `VXMON_BLESS=1 cargo test -p vxmon --test schema` rewrites it.

mod support;

use serde_json::{Value, json};
use support::Schema;

/// Path of the file, from the root of the repository.
const FILE: &str = "docs/event.schema.json";

#[test]
fn the_schema_in_docs_is_that_of_the_types() {
    let made = serde_json::to_string_pretty(&vxmon::event::schema()).unwrap() + "\n";
    if std::env::var_os("VXMON_BLESS").is_some_and(|bless| bless == "1") {
        std::fs::write(support::path(FILE), &made).unwrap();
    }
    let kept = std::fs::read_to_string(support::path(FILE)).unwrap_or_default();
    // Not assert_eq: it would print both files.
    assert!(made == kept, "{FILE} is out of date: VXMON_BLESS=1 cargo test -p vxmon --test schema");
}

/// The validator of these tests can say no.
#[test]
fn lines_that_break_the_schema_are_refused() {
    let schema = Schema::of_types();
    let good =
        json!({"schema": "vxmon.event/1", "type": "lost", "ts": "", "node": "", "ring": 1, "queue": 0, "capture": 0});
    assert_eq!(schema.check(&good), Ok(()));
    let with = |name: &str, value: Value| {
        let mut line = good.clone();
        line[name] = value;
        line
    };
    let mut short = good.clone();
    short.as_object_mut().unwrap().remove("queue");
    for bad in [
        short,
        with("schema", json!("vxmon.event/2")),
        with("type", json!("found")),
        with("ring", json!("1")),
        with("ring", json!(-1)),
        with("rings", json!(1)),
        json!([]),
    ] {
        assert!(schema.check(&bad).is_err(), "{bad}");
    }
}
