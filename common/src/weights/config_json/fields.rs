//! Typed access to the fields of a config.

use anyhow::{Context, Result, ensure};
use serde_json::{Map, Value};

/// Typed reading of a JSON object's fields; null counts as absent, as in Python's configs.
pub struct Fields<'a>(pub &'a Map<String, Value>);

impl<'a> Fields<'a> {
    pub fn present(&self, key: &str) -> Option<&'a Value> {
        self.0.get(key).filter(|value| !value.is_null())
    }

    pub fn count(&self, key: &str) -> Result<usize> {
        let value = self
            .present(key)
            .with_context(|| format!("{key:?} is missing"))?;
        value
            .as_u64()
            .and_then(|count| usize::try_from(count).ok())
            .with_context(|| format!("{key}: must be a whole number, not {value}"))
    }

    pub fn size(&self, key: &str) -> Result<usize> {
        let size = self.count(key)?;
        ensure!(size > 0, "{key}: must be above 0");
        Ok(size)
    }

    /// A size, or this where the file has none.
    pub fn size_or(&self, key: &str, unsaid: usize) -> Result<usize> {
        match self.present(key) {
            None => Ok(unsaid),
            Some(_) => self.size(key),
        }
    }

    pub fn number(&self, key: &str) -> Result<Option<f64>> {
        self.present(key)
            .map(|value| {
                value
                    .as_f64()
                    .with_context(|| format!("{key}: must be a number, not {value}"))
            })
            .transpose()
    }

    pub fn flag(&self, key: &str) -> Result<Option<bool>> {
        self.present(key)
            .map(|value| {
                value
                    .as_bool()
                    .with_context(|| format!("{key}: must be true or false, not {value}"))
            })
            .transpose()
    }

    pub fn text(&self, key: &str) -> Result<Option<&'a str>> {
        self.present(key)
            .map(|value| {
                value
                    .as_str()
                    .with_context(|| format!("{key}: must be a string, not {value}"))
            })
            .transpose()
    }
}
