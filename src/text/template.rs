//! Chat templates: Jinja2 as transformers renders it, on minijinja.

use std::error::Error as StdError;
use std::time::{SystemTime, UNIX_EPOCH};

use fancy_regex::Regex;
use minijinja::syntax::SyntaxConfig;
use minijinja::value::Kwargs;
use minijinja::{AutoEscape, Environment, Error, ErrorKind, Value};
use minijinja_contrib::pycompat::unknown_method_callback;
use serde_json::Value as Json;
use thiserror::Error as ThisError;

use super::TextError;
use super::python::{JsonStyle, json_dumps, str_of, value_of};

/// What a chat template turns into a prompt.
#[derive(Clone, Debug, Default)]
pub struct ChatPrompt {
    /// Objects with `role` and a string `content`, and whatever else the template may look at.
    pub messages: Vec<Json>,
    /// Tool descriptions.
    pub tools: Option<Json>,
    /// Documents to ground the answer in.
    pub documents: Option<Json>,
    /// End with the header of an assistant's message.
    pub add_generation_prompt: bool,
    /// Leave the last message open, so that the model goes on with it.
    pub continue_final_message: bool,
    /// Further variables of the template.
    pub variables: Vec<(String, Json)>,
}

/// Names that [`ChatPrompt::variables`] may not take.
const RESERVED: &[&str] =
    &["messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "raise_exception"];

/// One compiled template.
pub(super) struct ChatTemplate {
    environment: Environment<'static>,
    knows_developer: bool,
}

/// The message of `raise_exception(...)`.
#[derive(Debug, ThisError)]
#[error("{0}")]
struct Raised(String);

const NAME: &str = "chat template";

/// Behind the content of a message that is to be continued while it is rendered: text that occurs nowhere else.
const FINAL_MARK: &str = "PATCHBAY_CONTINUES_HERE_7d1f0c";

impl ChatTemplate {
    /// Compiles `source`; `special_tokens` become variables (`bos_token` and so on).
    pub(super) fn compile(source: &str, special_tokens: &[(String, String)]) -> Result<Self, String> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(|e| e.to_string())?);
        environment.set_auto_escape_callback(|_| AutoEscape::None);
        environment.set_unknown_method_callback(unknown_method_callback);
        environment.set_formatter(|out, _, value| out.write_str(&str_of(value)).map_err(Error::from));
        environment.add_filter("tojson", tojson);
        environment.add_function("raise_exception", |message: String| -> Result<Value, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, message.clone()).with_source(Raised(message)))
        });
        environment.add_function("strftime_now", |format: String| strftime(&format, SystemTime::now()));
        for (name, token) in special_tokens {
            environment.add_global(name.clone(), token.clone());
        }
        let source = without_generation_tags(source);
        let knows_developer = source.contains("developer");
        environment.add_template_owned(NAME, source).map_err(|e| e.to_string())?;
        Ok(Self { environment, knows_developer })
    }

    /// The prompt's text.
    pub(super) fn render(&self, prompt: &ChatPrompt) -> Result<String, TextError> {
        if let Some((name, _)) = prompt.variables.iter().find(|(name, _)| RESERVED.contains(&name.as_str())) {
            return Err(TextError::Input(format!("`{name}` cannot be set as a variable of the chat template")));
        }
        let mut messages: Vec<Value> = prompt.messages.iter().map(|message| self.message(message)).collect();
        if prompt.continue_final_message
            && let (Some(shown), Some(last)) = (messages.last_mut(), prompt.messages.last())
        {
            *shown = self.message(&with_final_mark(last));
        }
        let optional = |json: &Option<Json>| json.as_ref().map_or(Value::from(()), value_of);
        let own = [
            ("messages", Value::from(messages)),
            ("tools", optional(&prompt.tools)),
            ("documents", optional(&prompt.documents)),
            ("add_generation_prompt", Value::from(prompt.add_generation_prompt)),
        ];
        let given = prompt.variables.iter().map(|(name, json)| (name.as_str(), value_of(json)));
        let context = Value::from_pairs(own.into_iter().chain(given));
        let template = self.environment.get_template(NAME).map_err(|e| TextError::Template(e.to_string()))?;
        let text = template.render(context).map_err(|e| TextError::Template(message_of(&e)))?;
        if prompt.continue_final_message { cut_at_final_mark(text) } else { Ok(text) }
    }

    /// A template that does not know the role `developer` gets its older name, `system`.
    fn message(&self, message: &Json) -> Value {
        let is_developer = message.get("role").is_some_and(|role| role == "developer");
        match message {
            Json::Object(map) if is_developer && !self.knows_developer => {
                let mut map = map.clone();
                map.insert("role".to_owned(), Json::from("system"));
                value_of(&Json::Object(map))
            }
            message => value_of(message),
        }
    }
}

/// The last message with [`FINAL_MARK`] and a space behind its content.
fn with_final_mark(message: &Json) -> Json {
    let mut message = message.clone();
    if let Some(Json::String(content)) = message.get_mut("content") {
        *content = format!("{content}{FINAL_MARK} ");
    }
    message
}

/// Ends `text` where the last message's content ends, as transformers does for `continue_final_message`. A template that
/// trims the content took the space behind the mark, and would have taken the spaces before it.
fn cut_at_final_mark(mut text: String) -> Result<String, TextError> {
    let Some(end) = text.rfind(FINAL_MARK) else {
        return Err(TextError::Template(
            "the final message cannot be continued: the chat template does not show its content".to_owned(),
        ));
    };
    let is_trimmed = !text[end + FINAL_MARK.len()..].starts_with(' ');
    text.truncate(end);
    if is_trimmed {
        text.truncate(text.trim_end().len());
    }
    Ok(text)
}

/// What the client needs to know of a failed rendering.
fn message_of(error: &Error) -> String {
    let mut cause: Option<&(dyn StdError + 'static)> = Some(error);
    while let Some(current) = cause {
        if let Some(raised) = current.downcast_ref::<Raised>() {
            return raised.0.clone();
        }
        cause = current.source();
    }
    error.to_string()
}

/// `{% generation %}` only marks tokens for training: it becomes a block without effect.
fn without_generation_tags(source: &str) -> String {
    let replace = |source: &str, pattern: &str, tag: &str| {
        let regex = Regex::new(pattern).expect("the pattern is a literal of this file");
        regex.replace_all(source, format!("{{%${{1}} {tag} ${{2}}%}}").as_str()).into_owned()
    };
    let source = replace(source, r"\{%([-+]?)\s*generation\s*([-+]?)%\}", "if true");
    replace(&source, r"\{%([-+]?)\s*endgeneration\s*([-+]?)%\}", "endif")
}

/// transformers' `tojson`: `json.dumps` without escapes for HTML or beyond ASCII.
#[expect(clippy::needless_pass_by_value, reason = "filters are called with owned arguments")]
fn tojson(value: &Value, kwargs: Kwargs) -> Result<String, Error> {
    let given = |name: &str| -> Result<Option<Value>, Error> {
        let value: Option<Value> = kwargs.get(name)?;
        Ok(value.filter(|value| !value.is_none() && !value.is_undefined()))
    };
    let separators = match given("separators")? {
        Some(pair) => {
            let item = |i| pair.get_item_by_index(i).map(|value| value.to_string());
            Some((item(0)?, item(1)?))
        }
        None => None,
    };
    let style = JsonStyle {
        indent: given("indent")?.and_then(|indent| indent.as_usize()).map(|indent| indent.min(32)),
        separators,
        sort_keys: given("sort_keys")?.is_some_and(|flag| flag.is_true()),
        ensure_ascii: given("ensure_ascii")?.is_some_and(|flag| flag.is_true()),
    };
    kwargs.assert_all_used()?;
    Ok(json_dumps(value, &style))
}

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const DAYS: [&str; 7] = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];

/// `datetime.now().strftime(format)` in UTC, for the directives that dates and times in prompts use.
fn strftime(format: &str, now: SystemTime) -> String {
    let seconds = now.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let (days, time) = (seconds / 86_400, seconds % 86_400);
    let (hour, minute, second) = (time / 3600, time / 60 % 60, time % 60);
    let (year, month, day, day_of_year) = civil(days);
    let (month_name, day_name) = (MONTHS[month - 1], DAYS[((days + 4) % 7) as usize]);
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let directive = chars.next();
        match directive {
            Some('Y') => out += &year.to_string(),
            Some('y') => out += &format!("{:02}", year % 100),
            Some('m') => out += &format!("{month:02}"),
            Some('d') => out += &format!("{day:02}"),
            Some('e') => out += &format!("{day:2}"),
            Some('j') => out += &format!("{day_of_year:03}"),
            Some('B') => out += month_name,
            Some('b') => out += &month_name[..3],
            Some('A') => out += day_name,
            Some('a') => out += &day_name[..3],
            Some('H') => out += &format!("{hour:02}"),
            Some('I') => out += &format!("{:02}", (hour + 11) % 12 + 1),
            Some('M') => out += &format!("{minute:02}"),
            Some('S') => out += &format!("{second:02}"),
            Some('p') => out += if hour < 12 { "AM" } else { "PM" },
            Some('F') => out += &format!("{year}-{month:02}-{day:02}"),
            Some('T') => out += &format!("{hour:02}:{minute:02}:{second:02}"),
            Some('Z') => out += "UTC",
            Some('%') => out.push('%'),
            other => {
                out.push('%');
                out.extend(other);
            }
        }
    }
    out
}

/// (year, month, day, day of the year), all but the year counted from 1, `days` after 1 January 1970.
fn civil(mut days: u64) -> (u64, usize, u64, u64) {
    let leap = |year: u64| year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
    // Whole 400-year cycles first, so that the loop below is short for any clock.
    let mut year = 1970 + days / 146_097 * 400;
    days %= 146_097;
    while days >= 365 + u64::from(leap(year)) {
        days -= 365 + u64::from(leap(year));
        year += 1;
    }
    let day_of_year = days + 1;
    let lengths = [31, 28 + u64::from(leap(year)), 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
    let mut month = 0;
    while days >= lengths[month] {
        days -= lengths[month];
        month += 1;
    }
    (year, month + 1, days + 1, day_of_year)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use serde_json::json;

    use super::*;

    fn chat(messages: Json) -> ChatPrompt {
        let Json::Array(messages) = messages else { panic!("messages are a list") };
        ChatPrompt { messages, add_generation_prompt: true, ..ChatPrompt::default() }
    }

    fn render(source: &str, prompt: &ChatPrompt) -> Result<String, String> {
        let tokens = [("bos_token".to_owned(), "<s>".to_owned())];
        ChatTemplate::compile(source, &tokens).expect("compiles").render(prompt).map_err(|e| e.to_string())
    }

    const CHATML: &str = "{{ bos_token }}{% for message in messages %}\n    {% if message['role'] == 'tool' %}\n\
        {{ raise_exception('no tools: ' + message.role) }}\n    {% endif %}\n\
        {{- '<|' + message.role + '|>' + message['content'].strip() + '<|end|>\n' -}}\n{% endfor %}\n\
        {%- if add_generation_prompt %}<|assistant|>{% endif %}";

    #[test]
    fn renders_as_transformers_does() {
        let prompt = chat(json!([{"role": "system", "content": " be brief "}, {"role": "user", "content": "hi <b>"}]));
        let expected = "<s><|system|>be brief<|end|>\n<|user|>hi <b><|end|>\n<|assistant|>";
        assert_eq!(render(CHATML, &prompt).unwrap(), expected);
    }

    #[test]
    fn a_raised_exception_is_the_error() {
        let prompt = chat(json!([{"role": "tool", "content": "x"}]));
        assert_eq!(render(CHATML, &prompt).unwrap_err(), "no tools: tool");
        let inside_macro = "{% macro m() %}{{ raise_exception('deep') }}{% endmacro %}{{ m() }}";
        assert_eq!(render(inside_macro, &prompt).unwrap_err(), "deep");
    }

    #[test]
    fn what_templates_in_the_wild_use() {
        let check = |source: &str, expected: &str| {
            let mut prompt =
                chat(json!([{"role": "user", "content": "a</think>b"}, {"role": "user", "content": null}]));
            prompt.tools =
                Some(json!([{"type": "function", "function": {"name": "f", "parameters": {"z": 1, "a": []}}}]));
            prompt.variables = vec![("enable_thinking".to_owned(), json!(false))];
            assert_eq!(render(source, &prompt).unwrap(), expected, "{source}");
        };
        check("{{ messages[0].content.split('</think>')[-1].lstrip('\\n') }}", "b");
        check(
            "{{ tools[0] | tojson }}",
            r#"{"type": "function", "function": {"name": "f", "parameters": {"z": 1, "a": []}}}"#,
        );
        check("{{ tools | tojson(indent=4) | length > 80 }}", "True");
        check(
            "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
            "2",
        );
        check(
            "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ loop.index0 }}{% break %}{% endfor %}",
            "1",
        );
        check("{{ messages[::-1][0].content }}|{{ messages[1:] | length }}", "None|1");
        check("{% if documents is defined and documents is none %}none{% endif %}", "none");
        check("{% if enable_thinking is defined and enable_thinking is false %}off{% endif %}", "off");
        check("{% for k, v in tools[0].function.parameters.items() %}{{ k }}={{ v }};{% endfor %}", "z=1;a=[];");
        check("{% generation %}x{% endgeneration %}{%- generation -%} y {%- endgeneration -%}", "xy");
        check("{{ 'a' if messages[0].content is string else 'b' }}{{ missing }}", "a");
        check("{{ tools[0].function.get('nothing', 'd') }}{{ messages[0].role | trim | upper }}", "dUSER");
        check("{{ strftime_now('%Y') | length }}", "4");
        check("{{ tools[0].function.name ~ true }}", "fTrue");
        check("line\n", "line");
    }

    #[test]
    fn developer_becomes_system_where_the_template_does_not_know_it() {
        let prompt = chat(json!([{"role": "developer", "content": "x"}]));
        assert_eq!(render("{{ messages[0].role }}", &prompt).unwrap(), "system");
        assert_eq!(render("{# developer #}{{ messages[0].role }}", &prompt).unwrap(), "developer");
    }

    #[test]
    fn the_final_message_can_be_continued() {
        let mut prompt =
            chat(json!([{"role": "user", "content": "q"}, {"role": "assistant", "content": "The answer "}]));
        prompt.add_generation_prompt = false;
        prompt.continue_final_message = true;
        assert_eq!(render(CHATML, &prompt).unwrap(), "<s><|user|>q<|end|>\n<|assistant|>The answer");
        let keeps = "{% for m in messages %}<{{ m.content }}>{% endfor %}";
        assert_eq!(render(keeps, &prompt).unwrap(), "<q><The answer ");
        assert!(render("nothing", &prompt).unwrap_err().contains("cannot be continued"));
    }

    #[test]
    fn what_is_continued_is_never_found_in_a_marker_or_an_earlier_message() {
        let trims = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + (m.content | trim) + '<|im_end|>\\n' }}\
            {% endfor %}";
        let keeps = trims.replace(" | trim", "");
        let check = |source: &str, content: &str, expected: &str| {
            let mut prompt = chat(json!([{"role": "user", "content": "q"}, {"role": "assistant", "content": content}]));
            prompt.add_generation_prompt = false;
            prompt.continue_final_message = true;
            let head = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant";
            assert_eq!(render(source, &prompt).unwrap(), format!("{head}{expected}"), "{content:?}");
        };
        for content in ["<", "end", "|", "q", "im_start", "<|im_end|>", "\u{e9}\n{"] {
            check(trims, content, &format!("\n{content}"));
            check(&keeps, content, &format!("\n{content}"));
        }
        check(&keeps, "", "\n");
        check(&keeps, " end \n", "\n end \n");
        // Where the template trims, so does the cut.
        check(trims, "", "");
        check(trims, " end \n", "\nend");
    }

    #[test]
    fn variables_cannot_replace_the_messages() {
        let mut prompt = chat(json!([]));
        prompt.variables = vec![("messages".to_owned(), json!([]))];
        assert!(render("", &prompt).unwrap_err().contains("`messages`"));
    }

    #[test]
    fn dates_are_right() {
        let at = |seconds| UNIX_EPOCH + Duration::from_secs(seconds);
        assert_eq!(strftime("%d %b %Y", at(1_721_952_000)), "26 Jul 2024");
        assert_eq!(
            strftime("%A %-x %F %T %I%p %j%%", at(951_782_400 + 3661)),
            "Tuesday %-x 2000-02-29 01:01:01 01AM 060%"
        );
        assert_eq!(strftime("%a %e %B %y %H", at(0)), "Thu  1 January 70 00");
    }
}
