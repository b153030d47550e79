//! `GET` [`Paths::TAP`](tulle_mesh::query::Paths::TAP): single requests, as lines of JSON, until the client goes away.
//!
//! In: what sidecars of this replica have seen ([`crate::tap`]). Out: lines. The limits of other requests end where the
//! answer begins, so a tap has its own: how many there are, how long one runs, how long its client may read nothing. The
//! right to look is asked for again while it runs.

use std::convert::Infallible;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use tokio::sync::mpsc;
use tokio::time::{Instant, MissedTickBehavior, interval, interval_at, sleep_until, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tulle_mesh::query::Tap;

use super::{Api, Authenticated, Parameters, Refused};
use crate::tap::shown::{self, Kinds};
use crate::tap::{Denied, Passed, Seen, Tapping, Wanted};

/// Parameters of the path.
const PARAMETERS: [&str; 11] = [
    "namespace",
    "name",
    "direction",
    "peer",
    "method",
    "path",
    "status",
    "denied",
    "slow",
    "header",
    "rate",
];
/// The longest that a tap runs. Whoever wants more starts another.
const LONGEST: Duration = Duration::from_secs(3600);
/// How often counts are sent, and sidecars looked for that have not been sent the tap.
const COUNTS_EVERY: Duration = Duration::from_secs(1);
/// How often the token and its rights are reviewed.
const REVIEW_EVERY: Duration = Duration::from_secs(30);
/// How long a review may take. What it finds later is found by the next one.
const REVIEW_WITHIN: Duration = Duration::from_secs(3);
/// A client that reads nothing for this long has its tap ended.
const READ_WITHIN: Duration = Duration::from_secs(30);
/// Requests that become one chunk of the answer.
const BATCH: usize = 64;
/// Chunks that wait for the client.
const CHUNKS: usize = 4;

/// A part of the answer.
type Chunk = Result<Bytes, Infallible>;

pub async fn tap(
    State(api): State<Api>,
    Authenticated(caller): Authenticated,
    parameters: Parameters,
    headers: HeaderMap,
) -> Result<Response, Refused> {
    let parameters = parameters.only(&PARAMETERS)?;
    let wanted = Wanted { namespace: parameters.name("namespace")?, workload: parameters.name("name")? };
    let message = parameters.tap()?;
    let namespace = wanted.namespace.clone();
    api.sees(&caller, namespace.as_deref()).await?;
    let now = std::time::Instant::now();
    let tapping = api.taps.start(caller.name(), wanted, message, now).map_err(refused)?;
    let (chunks, body) = mpsc::channel(CHUNKS);
    let token = headers.get(header::AUTHORIZATION).cloned();
    let token = token.map(|value| (header::AUTHORIZATION, value)).into_iter().collect();
    let right = Right { api: api.clone(), token, namespace };
    tokio::spawn(run(tapping, chunks, api, right));
    let body = Body::from_stream(ReceiverStream::new(body));
    Ok(([(header::CONTENT_TYPE, "application/x-ndjson")], body).into_response())
}

fn refused(denied: Denied) -> Refused {
    let (status, hint) = match denied {
        Denied::Replica => {
            (StatusCode::TOO_MANY_REQUESTS, "end one that is not needed any more, and try again")
        }
        Denied::Caller(_) => (
            StatusCode::TOO_MANY_REQUESTS,
            "all who look at this namespace share them, also from other machines: end one that is not needed any more, \
             and try again",
        ),
        Denied::Sidecars(_) => (StatusCode::BAD_REQUEST, "name a workload"),
    };
    Refused::new(status, denied.to_string()).with_hint(hint)
}

/// The right to look.
struct Right {
    api: Api,
    /// The header with the token.
    token: HeaderMap,
    namespace: Option<String>,
}

impl Right {
    /// Whether it still holds. An API server that does not answer takes nobody's right away.
    async fn holds(&self) -> bool {
        let review = async {
            let caller = self.api.authenticator.caller(&self.token).await?;
            self.api.sees(&caller, self.namespace.as_deref()).await
        };
        match timeout(REVIEW_WITHIN, review).await {
            Ok(Err(refused)) => refused.status == StatusCode::SERVICE_UNAVAILABLE,
            Ok(Ok(())) | Err(_) => true,
        }
    }
}

/// Writes the lines of a tap until its client has gone, its time is over, or the right to look is lost.
async fn run(mut tapping: Tapping, chunks: mpsc::Sender<Chunk>, api: Api, right: Right) {
    let start = Instant::now();
    let mut every_second = interval(COUNTS_EVERY);
    every_second.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut review = interval_at(start + REVIEW_EVERY, REVIEW_EVERY);
    review.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut lines = Lines::new(&tapping);
    let mut seen = Vec::with_capacity(BATCH);
    let mut read = start;
    loop {
        tokio::select! {
            biased;
            () = chunks.closed() => return,
            () = sleep_until(start + LONGEST) => return,
            _ = every_second.tick() => {
                tapping.attach(std::time::Instant::now());
                lines.add(tapping.passed());
                if lines.next.is_some() && read.elapsed() > READ_WITHIN {
                    return;
                }
            }
            _ = review.tick() => {
                if !right.holds().await {
                    return;
                }
            }
            permit = chunks.reserve(), if lines.next.is_some() => {
                let Ok(permit) = permit else { return };
                if let Some(chunk) = lines.take() {
                    permit.send(Ok(chunk));
                }
                read = Instant::now();
            }
            count = tapping.events.recv_many(&mut seen, BATCH), if lines.next.is_none() => {
                if count == 0 {
                    return;
                }
                lines.write(&mut seen, &api);
                read = Instant::now();
            }
        }
    }
}

/// Lines that wait to be sent. While there are any, requests wait in the queue of the tap, which is bounded.
struct Lines {
    /// The next chunk.
    next: Option<Vec<u8>>,
    /// What has been counted and is not in `next`.
    counts: Option<Passed>,
    kinds: Kinds,
}

impl Lines {
    fn new(tapping: &Tapping) -> Self {
        let mut first = Vec::new();
        let sidecars = u64::try_from(tapping.sidecars).unwrap_or(u64::MAX);
        write(&mut first, &Tap::Started { sidecars, unable: tapping.unable.clone() });
        Self { next: Some(first), counts: None, kinds: Kinds::default() }
    }

    /// A second is over. Its counts are sent next, also if there is nothing to count: the client sees that the tap runs.
    fn add(&mut self, passed: Passed) {
        self.counts.get_or_insert_default().add(passed);
        if self.next.is_none() {
            self.next = self.count();
        }
    }

    fn count(&mut self) -> Option<Vec<u8>> {
        let Passed { passed, lost, not_shown, refused } = self.counts.take()?;
        let not_shown = u64::try_from(not_shown).ok().filter(|count| *count > 0);
        let mut chunk = Vec::new();
        write(&mut chunk, &Tap::Counts { passed, lost, not_shown, refused });
        Some(chunk)
    }

    /// The next chunk; counts that are due follow it.
    fn take(&mut self) -> Option<Bytes> {
        let chunk = self.next.take()?;
        self.next = self.count();
        Some(chunk.into())
    }

    /// Requests become the next chunk.
    fn write(&mut self, seen: &mut Vec<Seen>, api: &Api) {
        let mut chunk = Vec::new();
        let model = api.hub.model();
        for request in seen.drain(..).filter_map(|seen| shown::request(seen, &model, &mut self.kinds)) {
            write(&mut chunk, &Tap::Request(Box::new(request)));
        }
        self.next = Some(chunk).filter(|chunk| !chunk.is_empty());
    }
}

/// Adds a line. There is no value of the type that has no JSON form.
fn write(chunk: &mut Vec<u8>, line: &Tap) {
    match serde_json::to_vec(line) {
        Ok(line) => {
            chunk.extend(line);
            chunk.push(b'\n');
        }
        Err(error) => tracing::error!(%error, "a line of a tap has no JSON form"),
    }
}

#[cfg(test)]
mod tests;
