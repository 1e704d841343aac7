//! Reading the repository's documents, and checking a line against the schema in `docs`.

#![allow(dead_code, reason = "each test binary uses its own part")]
#![expect(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test may fail loudly")]

use std::path::PathBuf;

use serde_json::Value;

/// A path from the root of the repository.
pub fn path(file: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("..").join(file)
}

/// A document's text.
pub fn read(file: &str) -> String {
    std::fs::read_to_string(path(file)).unwrap_or_else(|error| panic!("{file}: {error}"))
}

/// As much of JSON Schema as schemars writes for `vxmon.event/1`. A keyword that is not known here ends the test, so that
/// none is passed over in silence; a field that the schema does not name is an error.
pub struct Schema(Value);

impl Schema {
    /// The one in `docs`.
    pub fn of_docs() -> Self {
        Self(serde_json::from_str(&read("docs/event.schema.json")).unwrap())
    }

    /// The one of the types.
    pub fn of_types() -> Self {
        Self(vxmon::event::schema().to_value())
    }

    /// Whether a line is as the schema says; if not, where.
    pub fn check(&self, line: &Value) -> Result<(), String> {
        let named = self.value("line", &self.0, line)?;
        // `Line` is flattened: its fields are those of the top and of the record together.
        closed("line", &named, line)
    }

    /// Checks a value; the names of its fields that the schema knows.
    fn value(&self, at: &str, schema: &Value, value: &Value) -> Result<Vec<String>, String> {
        let Some(schema) = schema.as_object() else {
            return if schema == &Value::Bool(true) { Ok(Vec::new()) } else { Err(format!("{at}: not allowed")) };
        };
        let mut named = Vec::new();
        for (keyword, rule) in schema {
            match keyword.as_str() {
                "$schema" | "$defs" | "title" | "description" | "format" | "default" => {}
                "$ref" => {
                    let name = rule.as_str().and_then(|to| to.strip_prefix("#/$defs/")).expect("a reference to $defs");
                    named.extend(self.value(at, &self.0["$defs"][name], value)?);
                }
                "type" if !has_type(rule, value) => return Err(format!("{at}: {value} is not {rule}")),
                "const" if rule != value => return Err(format!("{at}: {value} is not {rule}")),
                "enum" if !list(rule).contains(value) => return Err(format!("{at}: {value} is not one of {rule}")),
                "minimum" if value.is_number() && value.as_f64() < rule.as_f64() => {
                    return Err(format!("{at}: {value} is below {rule}"));
                }
                "maximum" if value.is_number() && value.as_f64() > rule.as_f64() => {
                    return Err(format!("{at}: {value} is above {rule}"));
                }
                "type" | "const" | "enum" | "minimum" | "maximum" => {}
                "required" => {
                    let missing = list(rule).iter().find(|name| value.get(name.as_str().unwrap_or_default()).is_none());
                    if let Some(missing) = missing {
                        return Err(format!("{at}: {missing} is missing"));
                    }
                }
                "items" => {
                    for item in value.as_array().into_iter().flatten() {
                        self.closed_value(&format!("{at}[]"), rule, item)?;
                    }
                }
                "properties" => {
                    for (name, rule) in rule.as_object().expect("an object") {
                        named.push(name.clone());
                        if let Some(field) = value.get(name) {
                            self.closed_value(&format!("{at}.{name}"), rule, field)?;
                        }
                    }
                }
                "additionalProperties" => {
                    for (name, field) in value.as_object().into_iter().flatten() {
                        named.push(name.clone());
                        self.closed_value(&format!("{at}.{name}"), rule, field)?;
                    }
                }
                "oneOf" | "anyOf" => {
                    let tried: Vec<_> = list(rule).iter().map(|rule| self.value(at, rule, value)).collect();
                    let fitting = tried.iter().filter(|result| result.is_ok()).count();
                    if fitting == 0 || keyword == "oneOf" && fitting > 1 {
                        let why: Vec<_> = tried.into_iter().filter_map(Result::err).collect();
                        return Err(format!("{at}: {fitting} of {keyword} fit: {}", why.join("; ")));
                    }
                    named.extend(tried.into_iter().filter_map(Result::ok).flatten());
                }
                _ => panic!("{at}: the tests do not know the keyword {keyword}"),
            }
        }
        Ok(named)
    }

    fn closed_value(&self, at: &str, schema: &Value, value: &Value) -> Result<(), String> {
        closed(at, &self.value(at, schema, value)?, value)
    }
}

fn closed(at: &str, named: &[String], value: &Value) -> Result<(), String> {
    match value.as_object().into_iter().flatten().find(|(name, _)| !named.contains(name)) {
        Some((name, _)) => Err(format!("{at}: the schema has no {name}")),
        None => Ok(()),
    }
}

fn list(value: &Value) -> &[Value] {
    value.as_array().expect("a list")
}

fn has_type(rule: &Value, value: &Value) -> bool {
    let is = |name: &Value| match name.as_str().expect("a type's name") {
        "object" => value.is_object(),
        "array" => value.is_array(),
        "string" => value.is_string(),
        "integer" => value.is_u64() || value.is_i64(),
        "number" => value.is_number(),
        "boolean" => value.is_boolean(),
        "null" => value.is_null(),
        name => panic!("the tests do not know the type {name}"),
    };
    rule.as_array().map_or_else(|| is(rule), |names| names.iter().any(is))
}
