use temper_reward::{RewardConfig, Scorer, kinds, names};

fn parse(reward: &str) -> Result<RewardConfig, String> {
    #[derive(serde::Deserialize)]
    struct Recipe {
        reward: RewardConfig,
    }
    toml::from_str::<Recipe>(&format!("reward = {reward}")).map(|r| r.reward).map_err(|e| e.to_string())
}

#[test]
fn every_listed_name_gives_a_scorer() {
    for name in names() {
        let config = RewardConfig::from_name(name).unwrap();
        assert_eq!(config.components[0].name(), name);
        assert_eq!(parse(&format!("\"{name}\"")), Ok(config.clone()));
        assert_eq!(Scorer::new(config).unwrap().component_names(), [name]);
    }
}

#[test]
fn a_kind_that_is_no_shortcut_says_what_it_needs() {
    for kind in kinds().iter().filter(|kind| !names().contains(kind)) {
        let error = RewardConfig::from_name(kind).unwrap_err().to_string();
        assert!(error.contains("needs parameters") && error.contains(kind), "{error}");
    }
}

#[test]
fn mistakes_are_named_with_what_would_be_right() {
    for (reward, part) in [
        ("\"exact_mach\"", "unknown reward `exact_mach`, did you mean `exact_match`?; known: exact_match, number"),
        ("\"bleu\"", "unknown reward `bleu`; known: "),
        ("3", "expected a name or a table with `components`"),
        ("{ components = [{ kind = \"nubmer\" }] }", "did you mean `number`?"),
        ("{ components = [{ weight = 1.0 }] }", "reward component without `kind`"),
        ("{ components = [{ kind = 1 }] }", "kind = 1: expected one of"),
        ("{ component = [] }", "unknown key `component`, did you mean `components`?"),
        ("{ }", "missing field `components`"),
        (
            "{ components = [{ kind = \"number\", tolerence = 1 }] }",
            "unknown key `tolerence`, did you mean `tolerance`?",
        ),
        ("{ components = [{ kind = \"number\", wieght = 1 }] }", "did you mean `weight`?"),
        (
            "{ components = [{ kind = \"number\", pattern = \"x\" }] }",
            "reward component `number`: unknown key `pattern`",
        ),
        ("{ components = [{ kind = \"number\", weight = \"1\" }] }", "reward component `number`: weight: invalid type"),
        ("{ components = [{ kind = \"number\", extract = \"boxd\" }] }", "extract: unknown variant `boxd`"),
        ("{ components = [{ kind = \"number\", tolerance = inf }] }", "tolerance has no value"),
        ("{ components = [{ kind = \"number\", weight = nan }] }", "weight has no value"),
        ("{ components = [{ kind = \"command\" }] }", "reward component `command`: missing field `command`"),
        (
            "{ components = [{ kind = \"python\", path = \"a.py\", timeout_second = 1 }] }",
            "reward component `python`: unknown key `timeout_second`, did you mean `timeout_seconds`?",
        ),
        ("{ components = [{ kind = \"http\", url = \"http://a\", memory_mb = 1 }] }", "unknown key `memory_mb`"),
        ("{ components = [{ kind = \"regex\" }] }", "reward component `regex`: missing field `pattern`"),
    ] {
        let error = parse(reward).expect_err(reward);
        assert!(error.contains(part), "{reward}\n  says: {error}\n  lacks: {part}");
    }
}

#[test]
fn values_out_of_range_are_refused() {
    for (component, part) in [
        ("kind = \"number\", tolerance = -1", "`number`: tolerance = -1.0: expected a finite number, 0 or more"),
        ("kind = \"number\", name = \"\"", "name = \"\""),
        ("kind = \"regex\", pattern = \"(\"", "pattern is no regular expression: regex parse error"),
        ("kind = \"regex\", pattern = \"a)|(b\", scope = \"whole\"", "pattern is no regular expression"),
        ("kind = \"regex\", pattern = '(?=a)'", "look-around"),
        ("kind = \"format\", tags = []", "tags = []"),
        ("kind = \"format\", tags = [\"<a>\"]", "without angle brackets"),
        ("kind = \"format\", tags = [\"a\", \"a\"]", "each tag once"),
        ("kind = \"length\", target_tokens = 0", "falloff_tokens = 0"),
        ("kind = \"length\", target_tokens = 9, extract = \"boxed\"", "measures the whole response"),
        ("kind = \"overlong\", max_tokens = 10, buffer_tokens = 11", "buffer_tokens = 11: expected 1 or more, at most"),
        ("kind = \"overlong\", max_tokens = 10, buffer_tokens = 5, penalty = -1", "penalty = -1.0"),
        ("kind = \"contains\", text = \"\"", "text = \"\""),
        ("kind = \"json\", name = \"a/b\"", "name = \"a/b\": expected a name without a slash"),
        ("kind = \"command\", command = []", "command = []: expected the program and its arguments"),
        ("kind = \"command\", command = [\"x\"], timeout_seconds = 0", "timeout_seconds = 0.0: expected 0.001 or more"),
        ("kind = \"command\", command = [\"x\"], cpu_seconds = -1", "cpu_seconds = -1.0"),
        ("kind = \"command\", command = [\"x\"], memory_mb = 1", "memory_mb = 1: expected 16 or more"),
        ("kind = \"command\", command = [\"x\"], max_processes = 0", "max_processes = 0"),
        ("kind = \"command\", command = [\"x\"], workers = 0", "workers = 0"),
        ("kind = \"command\", command = [\"x\"], max_error_rate = 1.5", "max_error_rate = 1.5: expected 0 to 1"),
        ("kind = \"command\", command = [\"x\"], error_window = 0", "error_window = 0"),
        ("kind = \"command\", command = [\"x\"], extract = \"boxed\"", "measures the whole response"),
        ("kind = \"python\", path = \"\"", "path = \"\": expected a Python file"),
        (
            "kind = \"python\", path = \"a.py\", function = \"a b\"",
            "function = \"a b\": expected the name of a function",
        ),
        ("kind = \"http\", url = \"https://a\"", "url = \"https://a\": expected http://HOST[:PORT]/PATH"),
        ("kind = \"json\", extract = { after = \"\" }", "not empty"),
        ("kind = \"json\", extract = { regex = { pattern = \"a\" } }", "extract.group = 1: expected a group below 1"),
        ("kind = \"json\", extract = { regex = { pattern = \"(\" } }", "extract is no regular expression"),
    ] {
        let config = parse(&format!("{{ components = [{{ {component} }}] }}")).unwrap_or_else(|e| panic!("{e}"));
        let error = config.validate().expect_err(component).to_string();
        assert!(error.contains(part), "{component}\n  says: {error}\n  lacks: {part}");
        assert!(Scorer::new(config).is_err());
    }
    let mut config = RewardConfig::from_name("number").unwrap();
    config.components[0].weight = f64::NAN;
    assert!(config.validate().unwrap_err().to_string().contains("weight = NaN: expected a finite number"));
    assert!(parse("{ components = [] }").unwrap().validate().is_err());
    let twice = parse("{ components = [{ kind = \"json\" }, { kind = \"json\" }] }").unwrap();
    assert!(twice.validate().unwrap_err().to_string().contains("`json` is used twice"));
}

#[test]
fn a_configuration_survives_writing_and_reading() {
    let text = "{ components = [{ kind = \"math\", extract = \"boxed\" }, { kind = \"regex\", pattern = \"a\", weight = 0.5, \
                name = \"r\", extract = { regex = { pattern = \"(b)\", group = 1 } } }, { kind = \"length\", target_tokens = 5 }, \
                { kind = \"command\", command = [\"a\", \"b\"], timeout_seconds = 1, workers = 3, error_window = 4 }, \
                { kind = \"python\", path = \"a.py\" }, { kind = \"http\", url = \"http://a:1/b\" }] }";
    let config = parse(text).unwrap();
    let written = serde_json::to_string(&config).unwrap();
    assert_eq!(serde_json::from_str::<RewardConfig>(&written).unwrap(), config);
    let as_toml = toml::to_string(&config).unwrap();
    assert_eq!(toml::from_str::<RewardConfig>(&as_toml).unwrap(), config);
}

/// The keys a recipe may use, frozen: a new one is a reviewed change here.
#[test]
fn the_keys_of_every_kind() {
    let schema = serde_json::to_value(schemars::schema_for!(RewardConfig)).unwrap();
    let component = &schema["$defs"]["ComponentConfig"];
    let common: Vec<_> = component["properties"].as_object().unwrap().keys().collect();
    assert_eq!(common, ["name", "weight", "extract"]);
    let variants = component["oneOf"].as_array().unwrap();
    let mut keys = Vec::new();
    for variant in variants {
        let properties = variant["properties"].as_object().unwrap();
        // Kinds with shared groups of keys stand in the schema by reference.
        let referred = variant["$ref"].as_str().map(|path| &schema["$defs"][path.rsplit('/').next().unwrap()]);
        let referred = referred.and_then(|of| of["properties"].as_object()).into_iter().flat_map(|p| p.keys());
        let own: Vec<_> = properties.keys().filter(|key| *key != "kind").chain(referred).cloned().collect();
        keys.push(format!("{}: {}", properties["kind"]["const"].as_str().unwrap(), own.join(" ")));
    }
    assert_eq!(
        keys,
        [
            "exact_match: strip ignore_case",
            "number: tolerance relative_tolerance percent",
            "math: ",
            "regex: pattern scope",
            "format: tags outside",
            "length: target_tokens tolerance_tokens falloff_tokens",
            "overlong: max_tokens buffer_tokens penalty truncated_penalty",
            "json: required types",
            "contains: text ignore_case",
            "reward_model: model",
            "command: command timeout_seconds cpu_seconds memory_mb max_processes workers max_error_rate error_window",
            "python: path function python start_seconds timeout_seconds cpu_seconds memory_mb max_processes workers \
             max_error_rate error_window",
            "http: url timeout_seconds workers max_error_rate error_window",
        ]
    );
}
