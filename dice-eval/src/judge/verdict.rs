//! What a judge's reply says: the probability that the output shown first is the better one.

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// A judge's answer to one question.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Verdict {
    /// Probability that the output shown first is better; `None` where the reply names neither.
    pub first: Option<f64>,
    /// Where that was read: "logprobs", "text", or "none"; "refused" where the question was.
    pub from: String,
}

impl Verdict {
    /// That of a question which the server does not take.
    pub fn refused() -> Self {
        Self {
            first: None,
            from: "refused".to_owned(),
        }
    }
}

/// Reads a chat completion. The first token's log-probs decide, where the server gives them and the likeliest is a label: p =
/// P(first label) over P(first label) + P(second label), as AlpacaEval 2 weighs preferences. Else (a judge may think aloud
/// first) the text does: 1 or 0.
/// `None` where it is no chat completion at all.
pub fn read(reply: &Value, labels: &[String; 2]) -> Option<Verdict> {
    let choice = reply.pointer("/choices/0")?;
    let verdict = |first, from: &str| Verdict {
        first,
        from: from.to_owned(),
    };
    if let Some(weighed) = weighed(choice, labels) {
        return Some(verdict(Some(weighed), "logprobs"));
    }
    let text = choice.pointer("/message/content")?;
    let named = named(text.as_str().unwrap_or_default(), labels);
    Some(verdict(
        named,
        if named.is_some() { "text" } else { "none" },
    ))
}

/// From the likeliest tokens of the first position. Spaces around a label are part of some tokenizers' tokens.
fn weighed(choice: &Value, labels: &[String; 2]) -> Option<f64> {
    let likeliest = first_tokens(choice)?;
    let (top, _) = likeliest.iter().max_by(|a, b| a.1.total_cmp(&b.1))?;
    labels.iter().find(|label| *label == top.trim())?;
    let [first, second] = [0, 1].map(|side| {
        let of_label = likeliest
            .iter()
            .filter(|(token, _)| token.trim() == labels[side]);
        of_label.map(|(_, logprob)| logprob.exp()).sum::<f64>()
    });
    Some(first / (first + second))
}

/// (token, log-prob) as OpenAI's chat API has them, or as the older completions API does.
fn first_tokens(choice: &Value) -> Option<Vec<(&str, f64)>> {
    if let Some(Value::Array(tokens)) = choice.pointer("/logprobs/content/0/top_logprobs") {
        let pairs = tokens
            .iter()
            .filter_map(|t| Some((t.get("token")?.as_str()?, t.get("logprob")?.as_f64()?)));
        return Some(pairs.collect());
    }
    let tokens = choice.pointer("/logprobs/top_logprobs/0")?.as_object()?;
    let pairs = tokens
        .iter()
        .filter_map(|(token, logprob)| Some((token.as_str(), logprob.as_f64()?)));
    Some(pairs.collect())
}

/// The label that the text starts with, whatever quotes or stars are around it (unless they are the label's own): 1 for the
/// first, 0 for the second. What a model thought before does not count.
fn named(text: &str, labels: &[String; 2]) -> Option<f64> {
    let answer = text.rsplit("</think>").next().unwrap_or_default();
    let bare = answer.trim_start_matches(|c: char| !c.is_alphanumeric());
    let starts = |label: &String| {
        [answer.trim_start(), bare].iter().any(|text| {
            let rest = text.strip_prefix(label.as_str());
            rest.is_some_and(|rest| !rest.starts_with(char::is_alphanumeric))
        })
    };
    match [starts(&labels[0]), starts(&labels[1])] {
        [true, false] => Some(1.0),
        [false, true] => Some(0.0),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn labels() -> [String; 2] {
        ["m".into(), "M".into()]
    }

    fn reply(text: &str, tokens: &[(&str, f64)]) -> Value {
        let top: Vec<_> = tokens
            .iter()
            .map(|(t, p)| json!({"token": t, "logprob": p.ln()}))
            .collect();
        json!({"choices": [{"message": {"content": text}, "logprobs": {"content": [{"top_logprobs": top}]}}]})
    }

    #[test]
    fn log_probs_weigh_the_verdict() {
        let of = |tokens: &[(&str, f64)]| read(&reply("M", tokens), &labels()).unwrap();
        let got = of(&[("x", 0.3), ("m", 0.4), (" m", 0.2), ("M", 0.2)]);
        assert!((got.first.unwrap() - 0.75).abs() < 1e-12);
        assert_eq!(got.from, "logprobs");
        assert_eq!(of(&[("M", 0.5)]).first, Some(0.0));
        // Another token is likelier: the text decides.
        assert_eq!(of(&[("x", 0.9)]).first, Some(0.0));
        let thinking = of(&[("<think>", 0.99), ("m", 1e-6)]);
        assert_eq!((thinking.first, &*thinking.from), (Some(0.0), "text"));
        let older = json!({"choices": [{"message": {"content": "x"}, "logprobs": {"top_logprobs": [{"m": 0.0, "M": -100.0}]}}]});
        assert!(read(&older, &labels()).unwrap().first.unwrap() > 0.999);
    }

    #[test]
    fn texts_name_a_label_or_none() {
        for (text, expected) in [
            ("m", Some(1.0)),
            (" **M**.", Some(0.0)),
            ("\"m\" is better", Some(1.0)),
            ("<think>m is long, M is short</think>\n\nM", Some(0.0)),
            ("<think>m is long, M is", None),
            ("mM", None),
            ("more or less M", None),
            ("", None),
        ] {
            let got = read(&reply(text, &[]), &labels()).unwrap();
            assert_eq!(got.first, expected, "{text}");
            assert_eq!(got.from == "none", expected.is_none());
        }
        assert_eq!(read(&json!({"error": "overloaded"}), &labels()), None);
        let labels = ["[[A]]".into(), "[[B]]".into()];
        for (text, expected) in [("[[A]]", Some(1.0)), (" [[B]].", Some(0.0)), ("A", None)] {
            assert_eq!(
                read(&reply(text, &[]), &labels).unwrap().first,
                expected,
                "{text}"
            );
        }
    }
}
