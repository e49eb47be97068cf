//! What a run is, so that an interrupted one is gone on with only as what it was.

use anyhow::{Result, ensure};
use serde_json::Value;
use std::path::Path;

/// Fails where a resumed run (`now`) would differ from the one that began, naming each difference.
/// Both are objects of settings and fingerprints; `place` is what the interrupted run left.
pub fn check_same(begun: &Value, now: &Value, place: &Path) -> Result<()> {
    let mut different = vec![];
    compare("", begun, now, &mut different);
    ensure!(
        different.is_empty(),
        "{}: the interrupted run was another one ({}): run the same command, or remove what it left",
        place.display(),
        different.join(", ")
    );
    Ok(())
}

/// Collects the leaves in which two JSON values differ, as `name: begun, now ours`.
fn compare(name: &str, begun: &Value, now: &Value, out: &mut Vec<String>) {
    match (begun.as_object(), now.as_object()) {
        (Some(a), Some(b)) => {
            for (key, value) in a {
                let name = if name.is_empty() {
                    key.clone()
                } else {
                    format!("{name}.{key}")
                };
                compare(&name, value, b.get(key).unwrap_or(&Value::Null), out);
            }
        }
        _ if begun != now => out.push(format!("{name}: {begun}, now {now}")),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn every_difference_is_named() {
        let begun = json!({"model": "a", "settings": {"seed": 0, "k": 4}, "gone": true});
        let same = check_same(&begun, &begun.clone(), Path::new("x.part"));
        assert!(same.is_ok());
        let now = json!({"model": "b", "settings": {"seed": 0, "k": 5}});
        let err = check_same(&begun, &now, Path::new("x.part")).unwrap_err();
        assert_eq!(
            err.to_string(),
            "x.part: the interrupted run was another one (model: \"a\", now \"b\", settings.k: 4, now 5, \
             gone: true, now null): run the same command, or remove what it left"
        );
    }
}
