//! One case of a document in the vectors' schema: typed access to its arrays and settings, and its results.

use crate::{Error, TokenBatch};
use serde_json::{Map, Number, Value};
use std::cell::RefCell;
use std::collections::BTreeSet;

/// Inputs and settings of one case.
#[derive(Debug, Clone, Copy)]
pub(super) struct Case<'a> {
    pub(super) name: &'a str,
    pub(super) inputs: &'a Map<String, Value>,
    pub(super) params: &'a Map<String, Value>,
    /// The nested table that `params` are; empty for the case's own.
    pub(super) table: &'static str,
    /// Names of the settings that were asked for; those of a nested table follow its name and a point.
    pub(super) asked: &'a RefCell<BTreeSet<String>>,
}

/// A rectangular array of two axes, row by row.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Grid {
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) data: Vec<f64>,
}

impl Grid {
    pub(super) fn row(&self, i: usize) -> &[f64] {
        &self.data[i * self.cols..(i + 1) * self.cols]
    }
}

/// A mask over a rectangle, and the offsets of its rows.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Mask {
    pub(super) cols: usize,
    pub(super) offsets: Vec<usize>,
    pub(super) bits: Vec<u8>,
}

impl Mask {
    pub(super) fn new(cols: usize, bits: Vec<u8>) -> Self {
        let rows = bits.len().checked_div(cols).unwrap_or(0);
        Mask { cols, offsets: (0..=rows).map(|i| i * cols).collect(), bits }
    }

    /// Rows of the given lengths, all unmasked or as `bits` says.
    pub(super) fn ragged(lens: &[usize], bits: Vec<u8>) -> Self {
        let mut offsets: Vec<usize> = vec![0];
        lens.iter().for_each(|len| offsets.push(offsets[offsets.len() - 1].saturating_add(*len)));
        Mask { cols: 1, offsets, bits }
    }

    pub(super) fn batch(&self) -> Result<TokenBatch<'_>, Error> {
        TokenBatch::new(&self.offsets, &self.bits)
    }
}

impl<'a> Case<'a> {
    pub(super) fn bad(&self, key: &str, cause: impl Into<String>) -> Error {
        Error::Case { case: self.name.to_owned(), key: key.to_owned(), cause: cause.into() }
    }

    fn input(&self, key: &str) -> Result<&'a Value, Error> {
        self.inputs.get(key).ok_or_else(|| self.bad(key, "missing from `inputs`"))
    }

    /// True where the input is present and not null.
    pub(super) fn has(&self, key: &str) -> bool {
        self.inputs.get(key).is_some_and(|v| !v.is_null())
    }

    /// An array of one axis.
    pub(super) fn vector(&self, key: &str) -> Result<Vec<f64>, Error> {
        let mut out = Vec::new();
        self.flatten(key, self.input(key)?, &mut out)?;
        Ok(out)
    }

    pub(super) fn opt_vector(&self, key: &str) -> Result<Option<Vec<f64>>, Error> {
        if self.has(key) { self.vector(key).map(Some) } else { Ok(None) }
    }

    /// An array of a known number of entries, whatever its axes.
    pub(super) fn sized(&self, key: &str, len: usize) -> Result<Vec<f64>, Error> {
        let values = self.vector(key)?;
        if values.len() == len {
            return Ok(values);
        }
        Err(self.bad(key, format!("expected {len} numbers, got {}", values.len())))
    }

    pub(super) fn opt_sized(&self, key: &str, len: usize) -> Result<Option<Vec<f64>>, Error> {
        if self.has(key) { self.sized(key, len).map(Some) } else { Ok(None) }
    }

    fn flatten(&self, key: &str, value: &Value, out: &mut Vec<f64>) -> Result<(), Error> {
        match value {
            Value::Array(items) => items.iter().try_for_each(|item| self.flatten(key, item, out)),
            other => {
                out.push(number(other).ok_or_else(|| self.bad(key, format!("expected a number, got {other}")))?);
                Ok(())
            }
        }
    }

    /// An array of two axes; every row has the same length.
    pub(super) fn grid(&self, key: &str) -> Result<Grid, Error> {
        let rows = self.input(key)?.as_array().ok_or_else(|| self.bad(key, "expected an array of rows"))?;
        let mut grid = Grid { rows: rows.len(), cols: 0, data: Vec::new() };
        for row in rows {
            let before = grid.data.len();
            self.flatten(key, row, &mut grid.data)?;
            let cols = grid.data.len() - before;
            grid.cols = cols;
        }
        if grid.data.len() != grid.rows * grid.cols {
            return Err(self.bad(key, "rows differ in length"));
        }
        Ok(grid)
    }

    /// An array of two axes and its mask, of one shape.
    pub(super) fn masked_grid(&self, key: &str, mask: &str) -> Result<(Grid, Mask), Error> {
        let (grid, bits) = (self.grid(key)?, self.mask(mask)?);
        if grid.cols == bits.cols && grid.data.len() == bits.bits.len() {
            return Ok((grid, bits));
        }
        Err(self.bad(mask, format!("expected the shape of `{key}`, {} by {}", grid.rows, grid.cols)))
    }

    pub(super) fn opt_grid(&self, key: &str) -> Result<Option<Grid>, Error> {
        if self.has(key) { self.grid(key).map(Some) } else { Ok(None) }
    }

    /// An array of three axes as rows of the last axis, with the lengths of the first two.
    pub(super) fn cube(&self, key: &str) -> Result<(usize, usize, Grid), Error> {
        let planes = self.input(key)?.as_array().ok_or_else(|| self.bad(key, "expected an array of planes"))?;
        let mut grid = Grid { rows: 0, cols: 0, data: Vec::new() };
        let mut middle = 0;
        for plane in planes {
            let rows = plane.as_array().ok_or_else(|| self.bad(key, "expected three axes"))?;
            middle = rows.len();
            for row in rows {
                let before = grid.data.len();
                self.flatten(key, row, &mut grid.data)?;
                grid.cols = grid.data.len() - before;
                grid.rows += 1;
            }
        }
        if grid.rows != planes.len() * middle || grid.data.len() != grid.rows * grid.cols {
            return Err(self.bad(key, "planes or rows differ in length"));
        }
        Ok((planes.len(), middle, grid))
    }

    /// A mask of two axes.
    pub(super) fn mask(&self, key: &str) -> Result<Mask, Error> {
        let grid = self.grid(key)?;
        let bits = grid.data.iter().map(|v| u8::from(*v != 0.0)).collect();
        Ok(Mask::new(grid.cols, bits))
    }

    /// Numbers that name groups, from texts or numbers.
    pub(super) fn groups(&self, key: &str) -> Result<Vec<u64>, Error> {
        let items = self.input(key)?.as_array().ok_or_else(|| self.bad(key, "expected an array of group ids"))?;
        let place = |item: &Value| items.iter().position(|other| other == item).unwrap_or(0) as u64;
        Ok(items.iter().map(place).collect())
    }

    /// Settings that the function knows but does not read in every branch.
    pub(super) fn accept(&self, keys: &[&str]) {
        self.asked.borrow_mut().extend(keys.iter().map(|key| self.path(key)));
    }

    fn path(&self, key: &str) -> String {
        if self.table.is_empty() { key.to_owned() } else { format!("{}.{key}", self.table) }
    }

    /// Given settings that the case did not ask for: misspelt, or of no use beside the others.
    pub(super) fn unread(&self) -> Vec<String> {
        let asked = self.asked.borrow();
        let nested = |key: &String, value: &'a Value| -> Vec<(String, &'a Value)> {
            let table = value.as_object().filter(|_| asked.contains(key));
            table.into_iter().flatten().map(|(inner, value)| (format!("{key}.{inner}"), value)).collect()
        };
        let own = self.params.iter().map(|(key, value)| (key.clone(), value));
        let below = self.params.iter().flat_map(|(key, value)| nested(key, value));
        own.chain(below)
            .filter(|(path, value)| !value.is_null() && !asked.contains(path))
            .map(|(path, _)| path)
            .collect()
    }

    pub(super) fn param(&self, key: &str) -> Option<&'a Value> {
        self.accept(&[key]);
        self.params.get(key).filter(|v| !v.is_null())
    }

    /// A number among the settings, or a default where it is absent or null.
    pub(super) fn num(&self, key: &str, default: f64) -> Result<f64, Error> {
        self.opt_num(key).map(|v| v.unwrap_or(default))
    }

    pub(super) fn opt_num(&self, key: &str) -> Result<Option<f64>, Error> {
        let Some(value) = self.param(key) else { return Ok(None) };
        written(value).map(Some).ok_or_else(|| self.bad(key, "expected a number"))
    }

    pub(super) fn flag(&self, key: &str, default: bool) -> Result<bool, Error> {
        Ok(self.num(key, f64::from(u8::from(default)))? != 0.0)
    }

    pub(super) fn text(&self, key: &str, default: &'a str) -> Result<&'a str, Error> {
        match self.param(key) {
            None => Ok(default),
            Some(value) => value.as_str().ok_or_else(|| self.bad(key, "expected a text")),
        }
    }

    /// A list of numbers among the settings; `None` where it is absent or null.
    pub(super) fn numbers(&self, key: &str) -> Result<Option<Vec<f64>>, Error> {
        let Some(value) = self.param(key) else { return Ok(None) };
        let items = value.as_array().map_or(std::slice::from_ref(value), Vec::as_slice);
        let one = |item: &Value| {
            written(item).ok_or_else(|| self.bad(key, format!("expected a list of numbers, got {item}")))
        };
        items.iter().map(one).collect::<Result<Vec<f64>, Error>>().map(Some)
    }

    /// Two numbers among the settings.
    pub(super) fn two(&self, key: &str) -> Result<Option<(f64, f64)>, Error> {
        match self.numbers(key)?.as_deref() {
            None => Ok(None),
            Some([first, second]) => Ok(Some((*first, *second))),
            Some(_) => Err(self.bad(key, "expected two numbers")),
        }
    }

    /// Two numbers among the settings, a lower and an upper bound.
    pub(super) fn pair(&self, key: &str) -> Result<Option<(f64, f64)>, Error> {
        match self.two(key)? {
            Some((low, high)) if low > high => Err(self.bad(key, "expected two numbers in ascending order")),
            bounds => Ok(bounds),
        }
    }

    /// A setting that one of this crate's enums names.
    pub(super) fn parse<T: serde::de::DeserializeOwned>(&self, key: &str, default: &str) -> Result<T, Error> {
        let text = self.text(key, default).map_err(|_| self.bad(key, "expected a text"))?.to_owned();
        serde_json::from_value(Value::String(text.clone()))
            .map_err(|_| self.bad(key, format!("`{text}` is not a known value")))
    }

    /// Settings of a nested table, as a case of their own.
    pub(super) fn nested(&self, table: &'static str) -> Option<Case<'a>> {
        let params = self.param(table)?.as_object()?;
        Some(Case { params, table, ..*self })
    }
}

/// A finite number, or one of the three texts for the others.
fn number(value: &Value) -> Option<f64> {
    match value {
        Value::Number(n) => n.as_f64(),
        Value::Bool(flag) => Some(f64::from(u8::from(*flag))),
        Value::String(text) => match text.as_str() {
            "NaN" => Some(f64::NAN),
            "Infinity" => Some(f64::INFINITY),
            "-Infinity" => Some(f64::NEG_INFINITY),
            _ => None,
        },
        _ => None,
    }
}

/// A setting's number, written as one or as text, a flag's in the spelling of JSON or Python.
fn written(value: &Value) -> Option<f64> {
    number(value).or_else(|| match value.as_str()?.trim() {
        "true" | "True" => Some(1.0),
        "false" | "False" => Some(0.0),
        text => text.parse().ok(),
    })
}

/// A number as the schema writes it.
pub(super) fn json(value: f64) -> Value {
    match Number::from_f64(value) {
        Some(n) => Value::Number(n),
        None if value.is_nan() => Value::String("NaN".to_owned()),
        None if value > 0.0 => Value::String("Infinity".to_owned()),
        None => Value::String("-Infinity".to_owned()),
    }
}

/// Numbers as a list.
pub(super) fn list(values: &[f64]) -> Value {
    Value::Array(values.iter().map(|v| json(*v)).collect())
}

/// Results of one case.
#[derive(Debug, Clone, Default)]
pub(super) struct Results {
    pub(super) outputs: Map<String, Value>,
    pub(super) grads: Map<String, Value>,
}

impl Results {
    pub(super) fn num(mut self, key: &str, value: f64) -> Self {
        self.outputs.insert(key.to_owned(), json(value));
        self
    }

    pub(super) fn value(mut self, key: &str, value: Value) -> Self {
        self.outputs.insert(key.to_owned(), value);
        self
    }

    pub(super) fn vector(self, key: &str, values: &[f64]) -> Self {
        self.value(key, list(values))
    }

    pub(super) fn grid(self, key: &str, cols: usize, values: &[f64]) -> Self {
        self.value(key, rows(cols, values))
    }

    pub(super) fn metrics(self, metrics: &[(&str, f64)]) -> Self {
        let map = metrics.iter().map(|(key, value)| ((*key).to_owned(), json(*value))).collect();
        self.value("metrics", Value::Object(map))
    }

    pub(super) fn grad_vector(mut self, key: &str, values: &[f64]) -> Self {
        self.grads.insert(key.to_owned(), list(values));
        self
    }

    pub(super) fn grad_grid(mut self, key: &str, cols: usize, values: &[f64]) -> Self {
        self.grads.insert(key.to_owned(), rows(cols, values));
        self
    }

    /// A gradient of three axes.
    pub(super) fn grad_cube(mut self, key: &str, (middle, cols): (usize, usize), values: &[f64]) -> Self {
        let planes = values.chunks(middle * cols.max(1)).map(|plane| rows(cols, plane)).collect();
        self.grads.insert(key.to_owned(), Value::Array(planes));
        self
    }
}

fn rows(cols: usize, values: &[f64]) -> Value {
    Value::Array(values.chunks(cols.max(1)).map(list).collect())
}
