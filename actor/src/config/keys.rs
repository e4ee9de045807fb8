//! Typed access to the keys of a JSON object, with errors that name file and key.

use crate::error::{Error, Result};
use serde_json::{Map, Value};
use std::path::Path;

/// Largest size accepted anywhere, so that no product of three sizes overflows.
const MAX_SIZE: u64 = 1 << 20;

/// A JSON object, where it came from and the name of its place there.
#[derive(Clone, Copy)]
pub(super) struct Keys<'a> {
    pub(super) map: &'a Map<String, Value>,
    pub(super) file: &'a Path,
    /// Dotted prefix of nested keys, empty at the top.
    pub(super) prefix: &'a str,
}

impl<'a> Keys<'a> {
    /// The value of `key`; `null` counts as absent.
    pub(super) fn get(&self, key: &str) -> Option<&'a Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    /// An error about `key`.
    pub(super) fn error(&self, key: &str, expected: impl Into<String>) -> Error {
        let got = self.map.get(key).map_or_else(|| "missing".to_owned(), Value::to_string);
        Error::config(self.file, &format!("{}{key}", self.prefix), got, expected)
    }

    /// A count in `1..=2^20`, where the key is present.
    pub(super) fn size(&self, key: &str) -> Result<Option<usize>> {
        self.convert(key, "an integer from 1 to 1048576", |value| {
            value.as_u64().filter(|n| (1..=MAX_SIZE).contains(n)).map(|n| n as usize)
        })
    }

    /// A count in `1..=2^20`.
    pub(super) fn required_size(&self, key: &str) -> Result<usize> {
        self.size(key)?.ok_or_else(|| self.error(key, "an integer from 1 to 1048576"))
    }

    /// A finite number more than 0, where the key is present.
    pub(super) fn positive(&self, key: &str) -> Result<Option<f64>> {
        self.convert(key, "a finite number more than 0", |value| value.as_f64().filter(|x| x.is_finite() && *x > 0.0))
    }

    /// A finite number more than 0.
    pub(super) fn required_positive(&self, key: &str) -> Result<f64> {
        self.positive(key)?.ok_or_else(|| self.error(key, "a finite number more than 0"))
    }

    /// A flag; absent is `false`, as in every configuration class of the supported families.
    pub(super) fn flag(&self, key: &str) -> Result<bool> {
        Ok(self.convert(key, "true or false", Value::as_bool)?.unwrap_or(false))
    }

    /// A text, where the key is present.
    pub(super) fn text(&self, key: &str) -> Result<Option<&'a str>> {
        self.convert(key, "a text", Value::as_str)
    }

    /// A token id, where the key is present and not negative (some configurations write -1 for "none").
    pub(super) fn token_id(&self, key: &str) -> Result<Option<u32>> {
        let id = self.convert(key, "a token id or null", |value| match value.as_i64() {
            Some(-1) => Some(None),
            Some(id) => u32::try_from(id).ok().map(Some),
            None => None,
        })?;
        Ok(id.flatten())
    }

    /// One token id or a list of them; absent is none.
    pub(super) fn token_ids(&self, key: &str) -> Result<Vec<u32>> {
        let Some(Value::Array(list)) = self.get(key) else {
            return Ok(self.token_id(key)?.into_iter().collect());
        };
        let ids = list.iter().map(|id| id.as_u64().and_then(|id| u32::try_from(id).ok()));
        ids.collect::<Option<_>>().ok_or_else(|| self.error(key, "a token id or a list of token ids"))
    }

    /// Refuse a key that is present with another value than `allowed`.
    pub(super) fn require(&self, key: &str, allowed: &Value) -> Result<()> {
        match self.get(key) {
            Some(value) if !same(value, allowed) => Err(self.error(key, format!("{allowed} or no such key"))),
            _ => Ok(()),
        }
    }

    fn convert<T>(&self, key: &str, expected: &str, read: impl FnOnce(&'a Value) -> Option<T>) -> Result<Option<T>> {
        self.get(key).map(|value| read(value).ok_or_else(|| self.error(key, expected))).transpose()
    }
}

/// Equality in which 0 and 0.0 are the same number.
fn same(a: &Value, b: &Value) -> bool {
    match (a.as_f64(), b.as_f64()) {
        (Some(a), Some(b)) => a == b,
        _ => a == b,
    }
}
