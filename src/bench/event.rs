//! Reading a stream of server-sent events with as little work as will do: the client shares the cores with the server.

use serde_json::Value;

/// What one event says.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Event {
    /// So many new tokens, and how many there are by the server's own count where it gives one.
    Tokens { new: usize, total: Option<usize> },
    /// The request failed, with this message.
    Failed(String),
    /// The stream is complete.
    Done,
}

/// Splits a stream into events.
#[derive(Debug, Default)]
pub(super) struct Lines {
    /// The start of a line whose end has not come.
    pending: Vec<u8>,
}

impl Lines {
    /// Calls `each` with the data of every event that `bytes` complete. Every event has one data line.
    pub(super) fn push(&mut self, bytes: &[u8], mut each: impl FnMut(&[u8])) {
        let mut rest = bytes;
        while let Some(end) = rest.iter().position(|b| *b == b'\n') {
            let (line, after) = (&rest[..end], &rest[end + 1..]);
            if self.pending.is_empty() {
                data(line).into_iter().for_each(&mut each);
            } else {
                self.pending.extend_from_slice(line);
                data(&self.pending).into_iter().for_each(&mut each);
                self.pending.clear();
            }
            rest = after;
        }
        self.pending.extend_from_slice(rest);
    }
}

/// The data of a line, if it has any.
fn data(line: &[u8]) -> Option<&[u8]> {
    let line = line.strip_suffix(b"\r").unwrap_or(line);
    let data = line.strip_prefix(b"data:")?;
    Some(data.strip_prefix(b" ").unwrap_or(data))
}

/// Reads an event of a stream of completions. Where the server does not list its tokens, a chunk counts as one.
pub(super) fn read(data: &[u8]) -> Event {
    if data == b"[DONE]" {
        return Event::Done;
    }
    // Errors and counts are rare: only they are parsed.
    let parsed = |name: &[u8]| find(data, name).and_then(|_| serde_json::from_slice::<Value>(data).ok());
    if let Some(message) = parsed(b"\"error\"").as_ref().and_then(error_message) {
        return Event::Failed(message);
    }
    let total = parsed(b"\"completion_tokens\"").and_then(|chunk| chunk["usage"]["completion_tokens"].as_u64());
    let new = match list_len(data, b"\"token_ids\"") {
        Some(len) => len,
        None => usize::from(!matches!(list_len(data, b"\"choices\""), None | Some(0))),
    };
    Event::Tokens { new, total: total.and_then(|total| usize::try_from(total).ok()) }
}

/// The message of an error body, in OpenAI's form.
pub(super) fn error_message(body: &Value) -> Option<String> {
    let error = body.get("error").filter(|error| !error.is_null())?;
    Some(error["message"].as_str().map_or_else(|| error.to_string(), str::to_owned))
}

/// Commas plus one in the flat list behind `name`; 0 for an empty list, `None` where there is none. For a list of objects
/// only whether it is empty is right.
fn list_len(data: &[u8], name: &[u8]) -> Option<usize> {
    let after = &data[find(data, name)? + name.len()..];
    let after = trim(trim(after).strip_prefix(b":")?).strip_prefix(b"[")?;
    let list = trim(&after[..after.iter().position(|b| *b == b']')?]);
    Some(if list.is_empty() { 0 } else { 1 + list.iter().filter(|b| **b == b',').count() })
}

fn trim(bytes: &[u8]) -> &[u8] {
    bytes.trim_ascii_start()
}

fn find(data: &[u8], name: &[u8]) -> Option<usize> {
    data.windows(name.len()).position(|window| window == name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn events(pieces: &[&[u8]]) -> Vec<String> {
        let mut lines = Lines::default();
        let mut found = Vec::new();
        for piece in pieces {
            lines.push(piece, |data| found.push(String::from_utf8(data.to_vec()).unwrap()));
        }
        found
    }

    #[test]
    fn events_come_out_whole_however_the_stream_is_cut() {
        let stream = b": keep-alive\n\ndata: {\"a\":1}\n\nevent: x\r\ndata:{\"b\":2}\r\n\r\ndata: [DONE]\n\n";
        let whole = events(&[stream]);
        assert_eq!(whole, ["{\"a\":1}", "{\"b\":2}", "[DONE]"]);
        for at in 0..stream.len() {
            assert_eq!(events(&[&stream[..at], &stream[at..]]), whole, "cut at {at}");
        }
        let bytes: Vec<&[u8]> = stream.chunks(1).collect();
        assert_eq!(events(&bytes), whole);
    }

    #[test]
    fn tokens_are_counted_from_their_list_or_by_the_chunk() {
        let check = |data: &str, new: usize, total: Option<usize>| {
            assert_eq!(read(data.as_bytes()), Event::Tokens { new, total }, "{data}");
        };
        check(r#"{"choices":[{"text":"a","token_ids":[5,6,7],"prompt_token_ids":[1,2]}]}"#, 3, None);
        check(r#"{"choices":[{"prompt_token_ids": [1, 2], "token_ids": [ 9 ]}]}"#, 1, None);
        check(r#"{"choices":[{"text":"","finish_reason":"length","token_ids":[]}]}"#, 0, None);
        check(r#"{"choices":[{"text":"a"}]}"#, 1, None);
        check(r#"{"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":64}}"#, 0, Some(64));
        check(r#"{"choices":[{"text":"\"error\": no"}]}"#, 1, None);
        check("{}", 0, None);
    }

    #[test]
    fn errors_keep_their_message() {
        assert_eq!(read(br#"{"error":{"message":"out of luck","code":500}}"#), Event::Failed("out of luck".to_owned()));
        assert_eq!(read(br#"{"error":"plain"}"#), Event::Failed("\"plain\"".to_owned()));
        assert_eq!(read(b"[DONE]"), Event::Done);
    }
}
