//! Typed access to the metadata of a file, with errors that name file and key.

use crate::error::{Error, Result};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// A value; GGUF's nine integer types are one here.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum MetaValue {
    Integer(i128),
    Float(f64),
    Flag(bool),
    Text(String),
    List(Vec<MetaValue>),
}

impl MetaValue {
    fn as_text(&self) -> Option<&str> {
        match self {
            MetaValue::Text(text) => Some(text),
            _ => None,
        }
    }

    fn as_integer(&self) -> Option<i128> {
        match self {
            MetaValue::Integer(n) => Some(*n),
            _ => None,
        }
    }

    fn describe(&self) -> String {
        match self {
            MetaValue::Integer(n) => n.to_string(),
            MetaValue::Float(x) => x.to_string(),
            MetaValue::Flag(flag) => flag.to_string(),
            MetaValue::Text(text) => format!("{text:?}"),
            MetaValue::List(list) => format!("a list of {}", list.len()),
        }
    }
}

/// All metadata of a file.
#[derive(Debug)]
pub(super) struct Metadata {
    file: PathBuf,
    values: BTreeMap<String, MetaValue>,
}

impl Metadata {
    pub(super) fn new(file: &Path) -> Self {
        Metadata { file: file.to_owned(), values: BTreeMap::new() }
    }

    pub(super) fn insert(&mut self, key: String, value: MetaValue) -> Result<()> {
        match self.values.insert(key.clone(), value) {
            None => Ok(()),
            Some(_) => Err(Error::format(&self.file, format!("metadata `{key}` stands twice"))),
        }
    }

    pub(super) fn file(&self) -> &Path {
        &self.file
    }

    pub(super) fn error(&self, key: &str, expected: &str) -> Error {
        let got = self.values.get(key).map_or_else(|| "missing".to_owned(), MetaValue::describe);
        Error::config(&self.file, key, got, expected)
    }

    pub(super) fn contains(&self, key: &str) -> bool {
        self.values.contains_key(key)
    }

    pub(super) fn integer(&self, key: &str) -> Result<Option<u64>> {
        self.convert(key, "an integer of 0 or more", |value| match value {
            MetaValue::Integer(n) => u64::try_from(*n).ok(),
            _ => None,
        })
    }

    pub(super) fn required_integer(&self, key: &str) -> Result<u64> {
        self.integer(key)?.ok_or_else(|| self.error(key, "an integer of 0 or more"))
    }

    pub(super) fn number(&self, key: &str) -> Result<Option<f64>> {
        self.convert(key, "a number", |value| match value {
            MetaValue::Float(x) => Some(*x),
            MetaValue::Integer(n) => Some(*n as f64),
            _ => None,
        })
    }

    pub(super) fn flag(&self, key: &str) -> Result<Option<bool>> {
        self.convert(key, "true or false", |value| match value {
            MetaValue::Flag(flag) => Some(*flag),
            _ => None,
        })
    }

    pub(super) fn text(&self, key: &str) -> Result<Option<&str>> {
        self.convert(key, "a text", MetaValue::as_text)
    }

    pub(super) fn texts(&self, key: &str) -> Result<Vec<&str>> {
        let list = self.convert(key, "a list of texts", |value| match value {
            MetaValue::List(list) => list.iter().map(MetaValue::as_text).collect(),
            _ => None,
        })?;
        list.ok_or_else(|| self.error(key, "a list of texts"))
    }

    pub(super) fn integers(&self, key: &str) -> Result<Vec<i128>> {
        let list = self.convert(key, "a list of integers", |value| match value {
            MetaValue::List(list) => list.iter().map(MetaValue::as_integer).collect(),
            _ => None,
        })?;
        list.ok_or_else(|| self.error(key, "a list of integers"))
    }

    fn convert<'a, T>(
        &'a self,
        key: &str,
        expected: &str,
        read: impl FnOnce(&'a MetaValue) -> Option<T>,
    ) -> Result<Option<T>> {
        self.values.get(key).map(|value| read(value).ok_or_else(|| self.error(key, expected))).transpose()
    }
}
