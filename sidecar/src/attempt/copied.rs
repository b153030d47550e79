//! A copy of a request: sent like an attempt, and its answer is read and dropped. There is no client that could leave,
//! be answered, or ask for it again.

use bytes::Bytes;
use tokio::time::{Instant, timeout_at};

use super::exchange::Arrived;
use super::progress::STALLED;
use super::{Attempt, End, Exchange, grpc_status, idle};
use crate::error::Failure;
use crate::http1::{Framing, Head, Part, Reader, Writer};

/// What became of a copy.
#[derive(Debug)]
pub struct Copied {
    /// The status of its answer, also of one that was still coming when the time was over. Or why there was none, why it
    /// broke off, or that it had stopped in the middle of its length.
    pub result: Result<u16, Failure>,
    /// The `grpc-status` of its answer.
    pub grpc_status: Option<u16>,
    /// The endpoint's sidecar has refused it for load.
    pub shed: bool,
    /// When the head of its answer arrived.
    pub head_at: Option<Instant>,
    /// A connection to an HTTP/1 server that has ended its exchange cleanly.
    pub idle: Option<(Reader, Writer)>,
}

impl Copied {
    /// One that was not answered.
    pub fn failed(failure: Failure) -> Self {
        Self { result: Err(failure), grpc_status: None, shed: false, head_at: None, idle: None }
    }
}

/// Sends a copy of a request with this head, which asks for no tunnel, and this body. Its answer must have begun at
/// `ends_by`, and is left alone then.
pub async fn send_copy(exchange: Exchange, request: &Head, body: Bytes, ends_by: Instant) -> Copied {
    let Exchange { mut sink, mut source, place: _place, waiting, .. } = exchange;
    let mut copied = Copied::failed(Failure::UpstreamReset);
    let mut ended = true;
    let (uploaded, downloaded) = {
        let upload = async {
            let mut to = sink.sink(request);
            if !body.is_empty() {
                to.data(body).await?;
            }
            to.end(None).await
        };
        let download = async {
            let Arrived { head, end, report } = loop {
                let arrived = timeout_at(ends_by, source.head(request)).await;
                let arrived = arrived.map_err(|_| End::Final(Failure::UpstreamTimeout))??;
                if !matches!(arrived.head.status(), 100 | 102..200) {
                    break arrived;
                }
            };
            // It has been accepted.
            drop(waiting);
            copied.head_at = Some(Instant::now());
            copied.shed = report.shed;
            copied.grpc_status = grpc_status(&head.headers);
            let mut missing = if let Framing::Length(length) = head.framing { length } else { 0 };
            let mut moved_at = Instant::now();
            let mut rest = if end { None } else { Some(source.body()) };
            while let Some(from) = &mut rest {
                let Ok(part) = timeout_at(ends_by, from.next()).await else {
                    ended = false;
                    if missing > 0 && moved_at.elapsed() >= STALLED {
                        return Err(End::Final(Failure::UpstreamTimeout));
                    }
                    break;
                };
                match part.map_err(|_| End::Unanswered(Failure::UpstreamReset))? {
                    Part::Data(bytes) => {
                        missing = missing.saturating_sub(bytes.len() as u64);
                        moved_at = Instant::now();
                    }
                    Part::Trailers(lines) => {
                        copied.grpc_status = grpc_status(&lines).or(copied.grpc_status);
                    }
                    Part::End => break,
                }
            }
            Ok::<u16, End>(head.status())
        };
        tokio::join!(timeout_at(ends_by, upload), download)
    };
    copied.result = downloaded.or_else(|end| Attempt::of(end).ended().result);
    // A server that refuses what is expected may take the body for its next request.
    let whole = ended
        && matches!(uploaded, Ok(Ok(())))
        && copied.result.is_ok()
        && request.header("expect").is_none();
    copied.idle = if whole { idle(sink, source) } else { None };
    copied
}
