//! The merged text of a recipe: files joined by `extends`, then `--set`, with the origin of every value.

use super::RecipeError;
use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use toml::{Table, Value};

/// Where a value comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// A line of a file.
    File {
        /// The file as it was named.
        path: PathBuf,
        /// Line, from 1.
        line: usize,
    },
    /// The command line.
    Set,
    /// Nobody said anything.
    Default,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Origin::File { path, line } => write!(f, "{}:{line}", path.display()),
            Origin::Set => f.write_str("--set"),
            Origin::Default => f.write_str("default"),
        }
    }
}

/// A merged table and the origin of every key in it, by dotted path (`stage.0.optimizer.learning_rate`).
#[derive(Debug, Clone)]
pub struct Source {
    /// The recipe's own file.
    pub path: PathBuf,
    /// The merged table, without `extends`.
    pub table: Table,
    origins: BTreeMap<String, Origin>,
}

impl Source {
    /// Read a recipe and everything it extends, then apply `--set` assignments in order.
    ///
    /// # Errors
    /// A file that cannot be read or parsed, a cycle, or an assignment that is none.
    pub fn read(path: &Path, assignments: &[String]) -> Result<Self, RecipeError> {
        let mut source = Source { path: path.to_path_buf(), table: Table::new(), origins: BTreeMap::new() };
        source.extend_from(path, &mut Vec::new())?;
        for assignment in assignments {
            source.set(assignment)?;
        }
        Ok(source)
    }

    /// A recipe from its text, as a run's resolved one; `path` names it in errors, and nothing is read.
    ///
    /// # Errors
    /// A text that cannot be parsed.
    pub fn from_text(path: &Path, text: &str) -> Result<Self, RecipeError> {
        let table: Table = text.parse().map_err(|e| syntax(path, text, &e))?;
        Ok(Source { path: path.to_path_buf(), table, origins: BTreeMap::new() })
    }

    /// Origin of a key, or of the nearest table that holds it.
    pub fn origin(&self, key: &str) -> Origin {
        let mut key = key;
        loop {
            if let Some(origin) = self.origins.get(key) {
                return origin.clone();
            }
            match key.rsplit_once('.') {
                Some((parent, _)) => key = parent,
                None => return Origin::Default,
            }
        }
    }

    /// Origin of exactly this key; `Default` where nobody gave it.
    pub fn exact_origin(&self, key: &str) -> Origin {
        self.origins.get(key).cloned().unwrap_or(Origin::Default)
    }

    /// What somebody gave at `key`, a value or the values of a table, with who did.
    pub fn given_at(&self, key: &str) -> Vec<(String, Origin)> {
        let below = format!("{key}.");
        let here = self.origins.range(key.to_owned()..).take_while(|(path, _)| path.starts_with(key));
        let is_item = |path: &str| path[key.len()..].split('.').any(|part| part.parse::<usize>().is_ok());
        let here = here.filter(|(path, _)| *path == key || (path.starts_with(&below) && !is_item(path)));
        let given: Vec<(&String, &Origin)> = here.collect();
        let is_table = |path: &str| given.iter().any(|(other, _)| other.starts_with(&format!("{path}.")));
        given.iter().filter(|(path, _)| !is_table(path)).map(|(path, at)| ((*path).clone(), (*at).clone())).collect()
    }

    /// An error about a key, naming where it was given; about a table, where the key in it was that the problem names.
    pub fn error(&self, key: &str, problem: impl fmt::Display) -> RecipeError {
        let problem = problem.to_string();
        let at = match self.named_origin(key, &problem).unwrap_or_else(|| self.origin(key)) {
            Origin::Default => self.path.display().to_string(),
            origin => origin.to_string(),
        };
        RecipeError::Key { at, key: key.to_owned(), problem }
    }

    fn extend_from(&mut self, path: &Path, seen: &mut Vec<PathBuf>) -> Result<(), RecipeError> {
        let read_error = |source| RecipeError::Read { path: path.to_path_buf(), source };
        let canonical = path.canonicalize().map_err(read_error)?;
        if seen.contains(&canonical) {
            return Err(RecipeError::Cycle { path: path.to_path_buf() });
        }
        seen.push(canonical);
        let text = std::fs::read_to_string(path).map_err(read_error)?;
        let mut table: Table = text.parse().map_err(|e| syntax(path, &text, &e))?;
        match table.remove("extends") {
            None => {}
            Some(Value::String(base)) => {
                self.extend_from(&path.parent().unwrap_or(Path::new("")).join(base), seen)?;
            }
            Some(_) => {
                let problem = "expected the path of another recipe, as a string".to_owned();
                return Err(RecipeError::Key { at: path.display().to_string(), key: "extends".to_owned(), problem });
            }
        }
        for (key, line) in lines_of_keys(&text) {
            // Arrays are replaced whole, so what an extended file said of their elements is gone.
            if key.ends_with(".0") {
                let prefix = key.trim_end_matches('0').to_owned();
                self.origins
                    .retain(|k, o| !k.starts_with(&prefix) || matches!(o, Origin::File { path: p, .. } if p == path));
            }
            self.origins.insert(key, Origin::File { path: path.to_path_buf(), line });
        }
        merge(&mut self.table, table);
        Ok(())
    }

    fn set(&mut self, assignment: &str) -> Result<(), RecipeError> {
        let fail = |problem: &str| RecipeError::Set { argument: assignment.to_owned(), problem: problem.to_owned() };
        let (key, text) = assignment.split_once('=').ok_or_else(|| fail("expected key=value, such as seed=7"))?;
        let parts: Vec<&str> = key.trim().split('.').collect();
        let mut root = Value::Table(std::mem::take(&mut self.table));
        let value = parse_value(text.trim());
        let assigned = assign(&mut root, &parts, value.clone());
        if let Value::Table(table) = root {
            self.table = table;
        }
        let path = assigned.map_err(|problem| fail(&problem))?;
        // Tables on the way there that nobody had given before are the assignment's too.
        for len in 1..path.len() {
            self.origins.entry(path[..len].join(".")).or_insert(Origin::Set);
        }
        let path = path.join(".");
        let below = format!("{path}.");
        self.origins.retain(|key, _| !key.starts_with(&below));
        self.set_origins(path, &value);
        Ok(())
    }

    /// Note that `value` at `path`, and all in it, comes from the command line.
    fn set_origins(&mut self, path: String, value: &Value) {
        match value {
            Value::Table(table) => {
                table.iter().for_each(|(key, value)| self.set_origins(format!("{path}.{key}"), value));
            }
            Value::Array(items) => {
                items.iter().enumerate().for_each(|(i, value)| self.set_origins(format!("{path}.{i}"), value));
            }
            _ => {}
        }
        self.origins.insert(path, Origin::Set);
    }

    /// Origin of the key in the table `key` that `problem` names first, where it names one that was given.
    fn named_origin(&self, key: &str, problem: &str) -> Option<Origin> {
        let is_word = |c: char| c.is_alphanumeric() || c == '_';
        let mut words = problem.split(|c| !is_word(c));
        words.find_map(|word| self.origins.get(&format!("{key}.{word}")).cloned())
    }
}

/// Put `value` where `parts` lead; gives the path with stages by index.
fn assign(at: &mut Value, parts: &[&str], value: Value) -> Result<Vec<String>, String> {
    match (parts, at) {
        ([] | [""], _) => Err("the key is empty".to_owned()),
        ([last], Value::Table(table)) => {
            table.insert((*last).to_owned(), value);
            Ok(vec![(*last).to_owned()])
        }
        ([_], _) => Err("the key's parent is no table".to_owned()),
        ([first, rest @ ..], at) => {
            let (next, name) = descend(at, first)?;
            let below = assign(next, rest, value)?;
            Ok(std::iter::once(name).chain(below).collect())
        }
    }
}

/// A TOML value, or, where it is none, the text itself: `--set name=first` needs no quotes.
fn parse_value(text: &str) -> Value {
    match format!("value = {text}").parse::<Table>() {
        Ok(mut table) if table.len() == 1 => table.remove("value").unwrap_or(Value::String(text.to_owned())),
        _ => Value::String(text.to_owned()),
    }
}

/// One level down: a table's key (made where it is missing), an array's index, or the `name` of a stage.
fn descend<'a>(at: &'a mut Value, part: &str) -> Result<(&'a mut Value, String), String> {
    match at {
        Value::Table(table) => {
            let next = table.entry(part.to_owned()).or_insert_with(|| Value::Table(Table::new()));
            Ok((next, part.to_owned()))
        }
        Value::Array(items) => {
            let named = |v: &Value| v.get("name").or_else(|| v.get("kind")).and_then(Value::as_str) == Some(part);
            let index = part.parse().ok().or_else(|| items.iter().position(named));
            let len = items.len();
            match index.and_then(|i: usize| items.get_mut(i).map(|v| (v, i.to_string()))) {
                Some(found) => Ok(found),
                None => Err(format!("`{part}` names none of the {len} entries: expected an index or a stage's name")),
            }
        }
        _ => Err(format!("`{part}` lies below a value that is no table")),
    }
}

/// Tables merge, everything else is replaced.
pub(super) fn merge(into: &mut Table, from: Table) {
    for (key, value) in from {
        match (into.get_mut(&key), value) {
            (Some(Value::Table(old)), Value::Table(new)) => merge(old, new),
            (_, value) => {
                into.insert(key, value);
            }
        }
    }
}

fn syntax(path: &Path, text: &str, error: &toml::de::Error) -> RecipeError {
    let offset = error.span().map_or(0, |span| span.start);
    let line = text[..offset.min(text.len())].matches('\n').count() + 1;
    let message = error.message();
    let is_too_large = message.ends_with("too large") || message.contains("as i128");
    let largest = if is_too_large { format!(": expected at most {}", i64::MAX) } else { String::new() };
    RecipeError::Syntax { path: path.to_path_buf(), line, problem: format!("{message}{largest}") }
}

/// Line of every key of a parsed document, by dotted path.
fn lines_of_keys(text: &str) -> Vec<(String, usize)> {
    let mut keys = Vec::new();
    if let Ok(table) = toml::de::DeTable::parse(text) {
        collect_table(table.get_ref(), String::new(), text, &mut keys);
    }
    keys
}

fn collect_table(table: &toml::de::DeTable<'_>, prefix: String, text: &str, keys: &mut Vec<(String, usize)>) {
    for (key, value) in table.iter() {
        let path = if prefix.is_empty() { key.get_ref().to_string() } else { format!("{prefix}.{}", key.get_ref()) };
        let line = text[..key.span().start.min(text.len())].matches('\n').count() + 1;
        keys.push((path.clone(), line));
        collect_value(value.get_ref(), path, text, keys);
    }
}

fn collect_value(value: &toml::de::DeValue<'_>, path: String, text: &str, keys: &mut Vec<(String, usize)>) {
    match value {
        toml::de::DeValue::Table(table) => collect_table(table, path, text, keys),
        toml::de::DeValue::Array(items) => {
            for (index, item) in items.iter().enumerate() {
                let path = format!("{path}.{index}");
                keys.push((path.clone(), text[..item.span().start.min(text.len())].matches('\n').count() + 1));
                collect_value(item.get_ref(), path, text, keys);
            }
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(dir: &Path, name: &str, text: &str) -> PathBuf {
        let path = dir.join(name);
        std::fs::write(&path, text).expect("writable");
        path
    }

    #[test]
    fn later_sources_win_and_origins_say_who_did() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let base = write(dir.path(), "base.toml", "seed = 1\n[model]\npath = \"m\"\n");
        let child = write(
            dir.path(),
            "child.toml",
            "extends = \"base.toml\"\n\n[model]\npath = \"n\"\n[[stage]]\nkind = \"sft\"\n",
        );
        let sets = ["seed=9".to_owned(), "stage.sft.steps=3".to_owned(), "model.note=plain words".to_owned()];
        let source = Source::read(&child, &sets).expect("a good recipe");
        assert_eq!(source.table["seed"].as_integer(), Some(9));
        assert_eq!(source.table["model"]["path"].as_str(), Some("n"));
        assert_eq!(source.table["model"]["note"].as_str(), Some("plain words"));
        assert_eq!(source.table["stage"][0]["steps"].as_integer(), Some(3));
        assert_eq!(source.origin("seed"), Origin::Set);
        assert_eq!(source.origin("model.path"), Origin::File { path: child, line: 4 });
        assert_eq!(source.exact_origin("model.other"), Origin::Default);
        assert!(base.exists());
    }

    #[test]
    fn an_assignment_is_the_origin_of_all_that_it_gives() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let text = "seed = 1\n[[stage]]\nkind = \"grpo\"\nsampling = { top_p = 0.5 }\nmemory = { a = 1, b = 2 }\n";
        let path = write(dir.path(), "r.toml", text);
        let sets = ["stage.0.memory={b=3, deep={c=4}, list=[{d=5}]}", "stage.0.sampling.temperature=-1", "foo.bar=1"];
        let source = Source::read(&path, &sets.map(str::to_owned)).expect("assignments");
        for key in ["memory", "memory.b", "memory.deep.c", "memory.list.0.d", "sampling.temperature"] {
            assert_eq!(source.exact_origin(&format!("stage.0.{key}")), Origin::Set, "{key}");
        }
        assert_eq!(source.exact_origin("stage.0.memory.a"), Origin::Default, "it was replaced");
        let at = |key, problem: &str| source.error(key, problem).to_string();
        assert!(at("stage.0.sampling", "temperature is -1: expected 0 or more").starts_with("--set: "));
        assert!(at("stage.0.sampling", "`top_p` is 0.5").starts_with(&format!("{}:4: ", path.display())));
        assert!(at("stage.0.sampling", "it is no good").starts_with(&format!("{}:4: ", path.display())));
        assert!(at("foo", "unknown key").starts_with("--set: "));
    }

    #[test]
    fn a_chain_that_comes_back_is_refused() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        write(dir.path(), "a.toml", "extends = \"b.toml\"\n");
        let b = write(dir.path(), "b.toml", "extends = \"a.toml\"\n");
        assert!(matches!(Source::read(&b, &[]), Err(RecipeError::Cycle { .. })));
    }

    #[test]
    fn a_syntax_error_names_its_line() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = write(dir.path(), "bad.toml", "seed = 1\nname = \n");
        let error = Source::read(&path, &[]).expect_err("no TOML").to_string();
        assert!(error.contains("bad.toml:2:"), "{error}");
    }

    #[test]
    fn an_assignment_needs_a_key_that_can_be_reached() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = write(dir.path(), "r.toml", "seed = 1\n[[stage]]\nkind = \"sft\"\n");
        for bad in ["seed", "=3", "seed.x=1", "stage.7.steps=1", "stage.grpo.steps=1"] {
            assert!(Source::read(&path, &[bad.to_owned()]).is_err(), "{bad}");
        }
    }
}
