//! Requests of the API server whose warnings are wanted too: they stand in headers, which the usual client drops.

use kube::Client;
use kube::client::Body;
use serde_json::Value;

use crate::exit::CliError;

/// What the API server said.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Answer {
    /// It takes the object, as it is after admission.
    Taken {
        /// The object.
        object: Value,
        /// Warnings of the API server and of webhooks.
        warnings: Vec<String>,
    },
    /// It rejects the object.
    Refused {
        /// Why.
        message: String,
        /// As above.
        warnings: Vec<String>,
    },
}

/// Sends a request that `kube` has built, such as a dry run.
///
/// # Errors
/// The API server cannot be reached, or does not let the user ask.
pub(crate) async fn send(client: &Client, request: hyper::Request<Vec<u8>>) -> Result<Answer, CliError> {
    let unreachable =
        |error: kube::Error| CliError::failed(format!("the API server gave no answer: {error}"));
    let response = client.send(request.map(Body::from)).await.map_err(unreachable)?;
    let status = response.status().as_u16();
    let headers = response.headers().get_all("warning");
    let warnings = headers.iter().filter_map(|header| header.to_str().ok()).map(warning).collect();
    let body = response.into_body().collect_bytes().await.map_err(unreachable)?;
    let object: Value = serde_json::from_slice(&body).unwrap_or(Value::Null);
    answer(status, object, warnings)
}

/// How the API server words that fields of an apply are not those of its schema. It answers 500, although the object is to
/// blame: structured-merge-diff returns an error without a status.
const NOT_OF_SCHEMA: &str = "failed to create typed patch object";

/// What a status and a body mean.
pub(super) fn answer(status: u16, object: Value, warnings: Vec<String>) -> Result<Answer, CliError> {
    if (200..300).contains(&status) {
        return Ok(Answer::Taken { object, warnings });
    }
    let said = object.get("message").and_then(Value::as_str);
    let message = said.map_or_else(|| format!("HTTP status {status}"), str::to_owned);
    match status {
        500 if message.contains(NOT_OF_SCHEMA) => Ok(Answer::Refused { message, warnings }),
        401 | 408 | 429 | 500.. => Err(CliError::failed(format!("the API server cannot say: {message}"))),
        // Who may not create it may not try it either. Admission policies and webhooks answer 403 too, in other words.
        403 if message.contains(" cannot ") => Err(CliError::failed(message)
            .hint("a dry run needs the right to create or patch the object, although nothing is stored")),
        _ => Ok(Answer::Refused { message, warnings }),
    }
}

/// The text of a `Warning` header: `299 - "text"`.
pub(super) fn warning(header: &str) -> String {
    let quoted = header.split_once('"').map_or(header, |(_, rest)| rest);
    let text = quoted.rsplit_once('"').map_or(quoted, |(text, _)| text);
    text.replace("\\\"", "\"").replace("\\\\", "\\")
}
