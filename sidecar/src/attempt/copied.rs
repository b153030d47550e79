//! A copy of a request: sent like an attempt, and its answer is read and dropped. There is no client that could leave,
//! be answered, or ask for it again.

use bytes::Bytes;
use tokio::time::Instant;

use super::exchange::Arrived;
use super::{Attempt, End, Exchange, grpc_status, idle};
use crate::error::{Failure, PumpError};
use crate::http1::{Head, Part, Reader, Writer};

/// What became of a copy.
#[derive(Debug)]
pub struct Copied {
    /// The status of its answer, or why there was none, or not all of it.
    pub result: Result<u16, Failure>,
    /// The `grpc-status` of its answer.
    pub grpc_status: Option<u16>,
    /// When the head of its answer arrived.
    pub head_at: Option<Instant>,
    /// A connection to an HTTP/1 server that has ended its exchange cleanly.
    pub idle: Option<(Reader, Writer)>,
}

/// Sends a copy of a request with this head, which asks for no tunnel, and this body.
pub async fn send_copy(exchange: Exchange, request: &Head, body: Bytes) -> Copied {
    let Exchange { mut sink, mut source, place: _place, waiting, .. } = exchange;
    let mut copied =
        Copied { result: Err(Failure::UpstreamReset), grpc_status: None, head_at: None, idle: None };
    let (uploaded, downloaded) = {
        let upload = async {
            let mut to = sink.sink(request);
            if !body.is_empty() {
                to.data(body).await?;
            }
            to.end(None).await
        };
        let download = async {
            let Arrived { head, end, .. } = loop {
                let arrived = source.head(request).await?;
                if !matches!(arrived.head.status(), 100 | 102..200) {
                    break arrived;
                }
            };
            // It has been accepted.
            drop(waiting);
            copied.head_at = Some(Instant::now());
            copied.grpc_status = grpc_status(&head.headers);
            let mut rest = if end { None } else { source.body() };
            while let Some(from) = &mut rest {
                match from.next().await.map_err(|_| End::Unanswered(Failure::UpstreamReset))? {
                    Part::Data(_) => {}
                    Part::Trailers(lines) => {
                        copied.grpc_status = grpc_status(&lines).or(copied.grpc_status);
                    }
                    Part::End => break,
                }
            }
            Ok::<u16, End>(head.status())
        };
        tokio::join!(upload, download)
    };
    copied.result = downloaded.or_else(|end| Attempt::of(end).ended().result);
    let whole = uploaded == Ok::<(), PumpError>(()) && copied.result.is_ok();
    copied.idle = if whole { idle(sink, source) } else { None };
    copied
}
