//! What a recipe says about rewards: components with their parameters, weights and places to look for the answer.
//!
//! Owns the spelling of the `reward` table. A component is one flat table: `kind` chooses the verifier, the keys
//! `name`, `weight` and `extract` belong to every kind, all others are parameters of that kind. A bare name is a
//! shortcut for one component of that kind with default parameters.

use crate::error::Error;
use crate::external::{CommandConfig, HttpConfig, PythonConfig};
use crate::reward_model::RewardModelConfig;
use crate::verifiers::contains::ContainsConfig;
use crate::verifiers::exact_match::ExactMatchConfig;
use crate::verifiers::format::FormatConfig;
use crate::verifiers::json::JsonConfig;
use crate::verifiers::length::LengthConfig;
use crate::verifiers::math::MathConfig;
use crate::verifiers::number::NumberConfig;
use crate::verifiers::overlong::OverlongConfig;
use crate::verifiers::regex::RegexConfig;
use schemars::JsonSchema;
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Map, Value};
use temper_types::did_you_mean;

/// How responses are scored: the weighted sum of one or more components.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct RewardConfig {
    /// The components, in the order in which their values are reported.
    pub components: Vec<ComponentConfig>,
}

/// One verifier with its parameters, its weight and where it looks for the answer.
#[derive(Debug, Clone, PartialEq, Serialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct ComponentConfig {
    /// Name of the component in results; the kind where none is given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Factor of its value in the sum.
    #[serde(default = "unit_weight")]
    pub weight: f64,
    /// The part of the response that is verified; all of it where none is given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub extract: Option<Extract>,
    /// The verifier.
    #[serde(flatten)]
    pub kind: RewardKind,
}

/// A verifier and its parameters.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum RewardKind {
    /// The response is the ground truth.
    ExactMatch(ExactMatchConfig),
    /// The number that the response ends on equals the ground truth.
    Number(NumberConfig),
    /// The mathematical answer of the response equals the ground truth.
    Math(MathConfig),
    /// A pattern matches the response.
    Regex(RegexConfig),
    /// The response consists of the required tags in order.
    Format(FormatConfig),
    /// The length of the response is near a target.
    Length(LengthConfig),
    /// A penalty for responses near their length cap.
    Overlong(OverlongConfig),
    /// The response is a JSON document with the required keys.
    Json(JsonConfig),
    /// A text occurs in the response.
    Contains(ContainsConfig),
    /// The score of a reward model.
    RewardModel(RewardModelConfig),
    /// The answer of a program that speaks JSON lines.
    Command(CommandConfig),
    /// What a function of a Python file returns.
    Python(PythonConfig),
    /// The answer of an HTTP endpoint.
    Http(HttpConfig),
}

/// Which part of a response is verified. A response without that part scores 0: it does not give an answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Extract {
    /// The content of the last `\boxed{...}`.
    Boxed,
    /// The last line that is not white space.
    LastLine,
    /// The content of the last closed block fenced by three back-quotes.
    CodeBlock,
    /// What stands between the last occurrence of this text and the end of its line.
    After(String),
    /// The content of the last `<tag>...</tag>`.
    Tag(String),
    /// A group of the last match of a pattern.
    Regex(ExtractRegex),
}

/// A pattern and the group of it that holds the answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ExtractRegex {
    /// The pattern, in the syntax of the Rust `regex` crate.
    pub pattern: String,
    /// Number of the group; 0 is the whole match.
    #[serde(default = "first_group")]
    pub group: usize,
}

fn unit_weight() -> f64 {
    1.0
}

fn first_group() -> usize {
    1
}

/// Names of all kinds of reward.
const KINDS: [&str; 13] = [
    "exact_match",
    "number",
    "math",
    "regex",
    "format",
    "length",
    "overlong",
    "json",
    "contains",
    "reward_model",
    "command",
    "python",
    "http",
];
/// Kinds with parameters that have no default, and which those are.
const NEEDY: [(&str, &str); 7] = [
    ("regex", "`pattern`"),
    ("length", "`target_tokens`"),
    ("overlong", "`max_tokens` and `buffer_tokens`"),
    ("reward_model", "`model`"),
    ("command", "`command`"),
    ("python", "`path`"),
    ("http", "`url`"),
];

impl RewardKind {
    /// The name of the kind.
    pub const fn name(&self) -> &'static str {
        match self {
            RewardKind::ExactMatch(_) => "exact_match",
            RewardKind::Number(_) => "number",
            RewardKind::Math(_) => "math",
            RewardKind::Regex(_) => "regex",
            RewardKind::Format(_) => "format",
            RewardKind::Length(_) => "length",
            RewardKind::Overlong(_) => "overlong",
            RewardKind::Json(_) => "json",
            RewardKind::Contains(_) => "contains",
            RewardKind::RewardModel(_) => "reward_model",
            RewardKind::Command(_) => "command",
            RewardKind::Python(_) => "python",
            RewardKind::Http(_) => "http",
        }
    }

    /// True for the user's own code, which runs elsewhere.
    pub const fn is_external(&self) -> bool {
        matches!(self, RewardKind::Command(_) | RewardKind::Python(_) | RewardKind::Http(_))
    }

    /// True where a sample without ground truth cannot be scored.
    pub fn needs_ground_truth(&self) -> bool {
        match self {
            RewardKind::ExactMatch(_) | RewardKind::Number(_) | RewardKind::Math(_) => true,
            RewardKind::Contains(config) => config.text.is_none(),
            RewardKind::Regex(_)
            | RewardKind::Format(_)
            | RewardKind::Length(_)
            | RewardKind::Overlong(_)
            | RewardKind::Json(_)
            | RewardKind::RewardModel(_)
            | RewardKind::Command(_)
            | RewardKind::Python(_)
            | RewardKind::Http(_) => false,
        }
    }
}

impl ComponentConfig {
    /// A component of weight 1 that verifies the whole response.
    pub fn new(kind: RewardKind) -> Self {
        ComponentConfig { name: None, weight: 1.0, extract: None, kind }
    }

    /// The name under which its value is reported.
    pub fn name(&self) -> &str {
        self.name.as_deref().unwrap_or(self.kind.name())
    }
}

/// Names that [`RewardConfig::from_name`] takes: the kinds whose parameters all have defaults.
pub fn names() -> Vec<&'static str> {
    KINDS.into_iter().filter(|kind| NEEDY.iter().all(|(needy, _)| needy != kind)).collect()
}

/// Names of all kinds, those included that need parameters.
pub fn kinds() -> &'static [&'static str] {
    &KINDS
}

impl RewardConfig {
    /// One component of the named kind with default parameters.
    ///
    /// # Errors
    /// Where the name is unknown (with the nearest known one) or its reward has parameters without a default.
    pub fn from_name(name: &str) -> Result<Self, Error> {
        let kind = match name {
            "exact_match" => RewardKind::ExactMatch(ExactMatchConfig::default()),
            "number" => RewardKind::Number(NumberConfig::default()),
            "math" => RewardKind::Math(MathConfig::default()),
            "format" => RewardKind::Format(FormatConfig::default()),
            "json" => RewardKind::Json(JsonConfig::default()),
            "contains" => RewardKind::Contains(ContainsConfig::default()),
            other => {
                return Err(match NEEDY.iter().find(|(needy, _)| *needy == other) {
                    Some((name, required)) => Error::NeedsParameters { name, required },
                    None => unknown_kind(other),
                });
            }
        };
        Ok(RewardConfig { components: vec![ComponentConfig::new(kind)] })
    }

    /// True where some component cannot score a sample without ground truth.
    pub fn needs_ground_truth(&self) -> bool {
        self.components.iter().any(|component| component.kind.needs_ground_truth())
    }
}

fn unknown_kind(given: &str) -> Error {
    let suggestion = did_you_mean(given, KINDS).map(str::to_owned);
    Error::UnknownReward { given: given.to_owned(), suggestion, known: KINDS.to_vec() }
}

impl JsonSchema for RewardConfig {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "RewardConfig".into()
    }

    fn json_schema(generator: &mut schemars::SchemaGenerator) -> schemars::Schema {
        let component = generator.subschema_for::<ComponentConfig>();
        schemars::json_schema!({
            "description": "How responses are scored: the name of a reward, or a list of weighted components.",
            "oneOf": [
                { "type": "string", "enum": names() },
                {
                    "type": "object",
                    "properties": { "components": { "type": "array", "items": component, "minItems": 1 } },
                    "required": ["components"],
                    "additionalProperties": false
                }
            ]
        })
    }
}

impl<'de> Deserialize<'de> for RewardConfig {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match Value::deserialize(deserializer)? {
            Value::String(name) => RewardConfig::from_name(&name).map_err(D::Error::custom),
            Value::Object(mut table) => {
                let components = table.remove("components");
                refuse_keys("reward", &table, &["components"]).map_err(D::Error::custom)?;
                let components = components.ok_or_else(|| D::Error::missing_field("components"))?;
                let components = serde_json::from_value(components).map_err(D::Error::custom)?;
                Ok(RewardConfig { components })
            }
            other => Err(D::Error::custom(format!(
                "reward = {other}: expected a name or a table with `components`; names: {}",
                names().join(", ")
            ))),
        }
    }
}

impl<'de> Deserialize<'de> for ComponentConfig {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        component_from_table(Map::deserialize(deserializer)?).map_err(D::Error::custom)
    }
}

fn component_from_table(mut table: Map<String, Value>) -> Result<ComponentConfig, String> {
    let kind = match table.remove("kind") {
        Some(Value::String(kind)) => kind,
        Some(other) => return Err(format!("reward component: kind = {other}: expected one of {}", KINDS.join(", "))),
        None => return Err(format!("reward component without `kind`: expected one of {}", KINDS.join(", "))),
    };
    if !KINDS.contains(&kind.as_str()) {
        return Err(unknown_kind(&kind).to_string());
    }
    if let Some((key, _)) = table.iter().find(|(_, value)| value.is_null()) {
        return Err(format!("reward component `{kind}`: {key} has no value: expected one (nan and inf are none)"));
    }
    let name: Option<String> = take(&mut table, &kind, "name")?;
    let extract: Option<Extract> = take(&mut table, &kind, "extract")?;
    let weight: Option<f64> = take(&mut table, &kind, "weight")?;
    let known = parameter_names(&kind);
    let known: Vec<&str> = known.iter().map(String::as_str).chain(["name", "weight", "extract", "kind"]).collect();
    refuse_keys(&format!("reward component `{kind}`"), &table, &known)?;
    table.insert("kind".to_owned(), Value::String(kind.clone()));
    let kind = serde_json::from_value(Value::Object(table)).map_err(|e| format!("reward component `{kind}`: {e}"))?;
    Ok(ComponentConfig { name, weight: weight.unwrap_or_else(unit_weight), extract, kind })
}

fn take<T: serde::de::DeserializeOwned>(
    table: &mut Map<String, Value>,
    kind: &str,
    key: &str,
) -> Result<Option<T>, String> {
    let Some(value) = table.remove(key) else {
        return Ok(None);
    };
    serde_json::from_value(value).map(Some).map_err(|e| format!("reward component `{kind}`: {key}: {e}"))
}

fn refuse_keys(place: &str, table: &Map<String, Value>, known: &[&str]) -> Result<(), String> {
    let Some(key) = table.keys().find(|key| !known.contains(&key.as_str())) else {
        return Ok(());
    };
    let hint = did_you_mean(key, known.iter().copied()).map(|k| format!(", did you mean `{k}`?")).unwrap_or_default();
    Err(format!("{place}: unknown key `{key}`{hint}; known: {}", known.join(", ")))
}

/// The parameters of a kind, read off its schema so that they are written down once.
fn parameter_names(kind: &str) -> Vec<String> {
    let schema = match kind {
        "exact_match" => schemars::schema_for!(ExactMatchConfig),
        "number" => schemars::schema_for!(NumberConfig),
        "math" => schemars::schema_for!(MathConfig),
        "regex" => schemars::schema_for!(RegexConfig),
        "format" => schemars::schema_for!(FormatConfig),
        "length" => schemars::schema_for!(LengthConfig),
        "overlong" => schemars::schema_for!(OverlongConfig),
        "json" => schemars::schema_for!(JsonConfig),
        "contains" => schemars::schema_for!(ContainsConfig),
        "reward_model" => schemars::schema_for!(RewardModelConfig),
        "command" => schemars::schema_for!(CommandConfig),
        "python" => schemars::schema_for!(PythonConfig),
        "http" => schemars::schema_for!(HttpConfig),
        _ => return Vec::new(),
    };
    let properties = schema.get("properties").and_then(Value::as_object);
    properties.map(|p| p.keys().cloned().collect()).unwrap_or_default()
}
