use super::{ChatTemplate, GenerationPrompt, SpecialTokens, TOKENIZER_CONFIG_FILE, TOKENIZER_FILE, Tokenizer};
use serde_json::{Value, json};
use std::fs;
use std::path::Path;
use temper_types::{ChatMessage, PromptContent};

/// A byte-level tokenizer with two merges, a hole at id 7 and one special token.
fn byte_level() -> Value {
    let vocab = json!({"h": 0, "i": 1, "Ġ": 2, "hi": 3, "Ġhi": 4, "Ã": 5, "©": 6, "<|end|>": 8, "!": 9});
    json!({
        "version": "1.0",
        "truncation": {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0},
        "padding": null,
        "added_tokens": [{"id": 8, "content": "<|end|>", "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true}],
        "normalizer": null,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "post_processor": null,
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": vocab, "merges": [["h", "i"], ["Ġ", "hi"]]},
    })
}

fn load(tokenizer: &Value, settings: Option<Value>) -> Result<Tokenizer, String> {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join(TOKENIZER_FILE), tokenizer.to_string()).unwrap();
    if let Some(settings) = settings {
        fs::write(dir.path().join(TOKENIZER_CONFIG_FILE), settings.to_string()).unwrap();
    }
    Tokenizer::load(dir.path()).map_err(|error| error.to_string())
}

fn messages(list: &[(&str, &str)]) -> Vec<ChatMessage> {
    list.iter().map(|(role, content)| ChatMessage { role: (*role).into(), content: (*content).into() }).collect()
}

fn render(template: &str, list: &[(&str, &str)], settings: Value) -> Result<String, String> {
    ChatTemplate::compile(template, Path::new("m/tokenizer_config.json"))
        .and_then(|template| template.render(&messages(list), GenerationPrompt::Open, &settings))
        .map_err(|error| error.to_string())
}

#[test]
fn text_and_bytes_agree() {
    let tokenizer = load(&byte_level(), Some(json!({"eos_token": {"content": "<|end|>"}}))).unwrap();
    let ids = tokenizer.encode("hi hié<|end|>!", SpecialTokens::Omit).unwrap();
    assert_eq!(ids, [3, 4, 5, 6, 8, 9], "the file's truncation to 2 tokens is off");
    let bytes: Vec<u8> = ids.iter().flat_map(|id| tokenizer.token_bytes(*id).unwrap()).copied().collect();
    assert_eq!(bytes, "hi hié<|end|>!".as_bytes());
    assert_eq!(tokenizer.decode(&ids, SpecialTokens::Include).unwrap(), "hi hié<|end|>!");
    assert_eq!(tokenizer.decode(&ids, SpecialTokens::Omit).unwrap(), "hi hié!");
    assert_eq!((tokenizer.eos_token_id(), tokenizer.bos_token_id()), (Some(8), None));
}

#[test]
fn ids_without_a_token_are_known_and_refused() {
    let tokenizer = load(&byte_level(), None).unwrap();
    assert_eq!(tokenizer.vocab_size(), 10);
    assert_eq!(tokenizer.missing_ids(12), [7, 10, 11]);
    assert_eq!(tokenizer.special_ids().collect::<Vec<_>>(), [8]);
    assert!(tokenizer.decode(&[3, 7], SpecialTokens::Omit).unwrap_err().to_string().contains("id 7 has no token"));
    assert!(tokenizer.encode_prompt(&PromptContent::TokenIds(vec![11])).is_err());
    assert_eq!(tokenizer.encode_prompt(&PromptContent::TokenIds(vec![0, 8])).unwrap(), [0, 8]);
}

#[test]
fn a_character_outside_the_vocabulary_is_an_error_not_a_gap() {
    let mut json = byte_level();
    json["pre_tokenizer"] = Value::Null;
    json["decoder"] = json!({"type": "Fuse"});
    let tokenizer = load(&json, None).unwrap();
    assert_eq!(tokenizer.encode("hi!", SpecialTokens::Omit).unwrap(), [3, 9]);
    let message = tokenizer.encode("hi?!", SpecialTokens::Omit).unwrap_err().to_string();
    assert!(message.contains("'?' at byte 2"), "{message}");
    // A byte-level vocabulary that lacks bytes drops as well.
    let tokenizer = load(&byte_level(), None).unwrap();
    let message = tokenizer.encode("hi hi, hi", SpecialTokens::Omit).unwrap_err().to_string();
    assert!(message.contains("',' at byte 5"), "{message}");
}

#[test]
fn missing_and_damaged_files_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let message = Tokenizer::load(dir.path()).err().unwrap().to_string();
    assert!(message.contains("tokenizer.json"), "{message}");
    assert!(load(&json!({"model": 1}), None).err().unwrap().contains("not a tokenizer"));
    let bad = load(&byte_level(), Some(json!({"chat_template": "{% if %}"}))).err().unwrap();
    assert!(bad.contains("tokenizer_config.json") && bad.contains("syntax error"), "{bad}");
    let none = load(&byte_level(), None).unwrap();
    let message = none.render_chat(&messages(&[("user", "hi")]), GenerationPrompt::Open).unwrap_err().to_string();
    assert!(message.contains("no chat template"), "{message}");
}

/// The template of SmolLM2-Instruct, and the text transformers makes with it.
#[test]
fn smollm2_chat() {
    let template = "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ \
        '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}\
        {% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}\
        {% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";
    let text = render(template, &[("user", "What is 17 + 25?")], json!({})).unwrap();
    assert_eq!(
        text,
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n\
         <|im_start|>user\nWhat is 17 + 25?<|im_end|>\n<|im_start|>assistant\n"
    );
}

#[test]
fn templates_have_what_transformers_offers() {
    let settings = json!({"bos_token": "<s>", "eos_token": {"content": "</s>"}});
    let check = |template: &str, expected: &str| {
        let text = render(template, &[("system", " <b> "), ("user", "a & b")], settings.clone());
        assert_eq!(text.as_deref(), Ok(expected), "{template}");
    };
    check("{{ bos_token }}{{ eos_token }}{{ pad_token }}", "<s></s>");
    check("{{ messages[0].content.strip() }}", "<b>");
    check("{{ messages[1] | tojson }}", "{\"role\": \"user\", \"content\": \"a & b\"}");
    check(
        "{% for m in messages %}\n  {% if m.role == 'user' %}\n{{ m.content }}\n  {% endif %}\n{% endfor %}",
        "a & b\n",
    );
    check("{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.role }}{% endfor %}", "user");
    check("{% set ns = namespace(x=0) %}{% for m in messages %}{% set ns.x = ns.x + 1 %}{% endfor %}{{ ns.x }}", "2");
    check("{%- generation -%} a {%- endgeneration -%}", "a");
    check("{% if tools is not none %}t{% endif %}{{ messages[1:] | length }}", "1");
    check("{% if strftime_now is defined %}{{ strftime_now('%d') }}{% else %}26 Jul 2024{% endif %}", "26 Jul 2024");
    let refused = render("{{ raise_exception('roles must alternate') }}", &[], json!({})).unwrap_err();
    assert!(refused.contains("roles must alternate") && refused.contains("m/tokenizer_config.json"), "{refused}");
    assert!(render("{{ strftime_now('%d') }}", &[], json!({})).unwrap_err().contains("strftime_now"));
}

#[test]
fn a_template_is_found_in_any_of_its_places() {
    let rendered = |settings: Value| {
        let tokenizer = load(&byte_level(), Some(settings))?;
        tokenizer.render_chat(&[], GenerationPrompt::None).map_err(|error| error.to_string())
    };
    assert_eq!(rendered(json!({"chat_template": "one"})).unwrap(), "one");
    let list = json!({"chat_template": [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]});
    assert_eq!(rendered(list).unwrap(), "d");
    assert!(rendered(json!({"chat_template": 3})).unwrap_err().contains("`chat_template` is 3"));
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join(TOKENIZER_FILE), byte_level().to_string()).unwrap();
    fs::write(dir.path().join("chat_template.jinja"), "file").unwrap();
    fs::write(dir.path().join(TOKENIZER_CONFIG_FILE), r#"{"chat_template": "config"}"#).unwrap();
    let tokenizer = Tokenizer::load(dir.path()).unwrap();
    assert_eq!(tokenizer.render_chat(&[], GenerationPrompt::None).unwrap(), "file");
}
