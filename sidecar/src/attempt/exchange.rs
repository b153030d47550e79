//! The server's side of an exchange: another sidecar, an HTTP/1 or an HTTP/2 server.

use bytes::{Bytes, BytesMut};
use tulle_mesh::wire::frame::Code;
use tulle_mesh::wire::head::Fields;

use super::Relayed;
use crate::error::Failure;
use crate::http1::{Framing, Head, Reader, Writer};
use crate::http2;
use crate::message::{PumpError, Sink, Source};
use crate::pool::Place;
use crate::wire::{Event, Receiver, Sender};

/// A request under way to a server.
pub struct Exchange {
    /// Where the request goes.
    pub sink: UpSink,
    /// Where the answer comes from.
    pub source: UpSource,
    /// The connection had served a request before: it may have been closed meanwhile.
    pub reused: bool,
    /// The place on a connection that several requests share.
    pub place: Option<Place>,
}

/// Where a request goes.
pub enum UpSink {
    /// To another sidecar.
    Mesh(Sender),
    /// To an HTTP/1 server.
    Http1(Writer),
    /// To an HTTP/2 server.
    Http2(h2::SendStream<Bytes>),
}

/// Where an answer comes from.
pub enum UpSource {
    /// From another sidecar.
    Mesh(Receiver),
    /// From an HTTP/1 server.
    Http1(Reader),
    /// From an HTTP/2 server.
    Http2(Option<h2::client::ResponseFuture>, Option<h2::RecvStream>),
}

/// Why no head of an answer arrived.
pub(super) enum HeadFailure {
    NotProcessed,
    /// The server, or its application, ended the connection.
    Gone,
    /// The server reset the connection: it had not read the request to its end.
    Unread,
    /// The connection to its sidecar ended.
    Lost,
    Failed(Failure),
}

impl HeadFailure {
    pub(super) fn record(self, relayed: &mut Relayed) {
        match self {
            Self::NotProcessed => {
                relayed.unprocessed = true;
                relayed.result = Err(Failure::UpstreamNotProcessed);
            }
            Self::Gone => {
                relayed.unanswered = true;
                relayed.result = Err(Failure::UpstreamReset);
            }
            Self::Unread => {
                relayed.unanswered = true;
                relayed.unread = true;
                relayed.result = Err(Failure::UpstreamReset);
            }
            Self::Lost => {
                relayed.unanswered = true;
                relayed.result = Err(Failure::UpstreamLost);
            }
            Self::Failed(failure) => relayed.result = Err(failure),
        }
    }
}

impl UpSink {
    /// As a sink of bodies.
    pub fn sink(&mut self) -> Sink<'_> {
        match self {
            Self::Mesh(sender) => Sink::Mesh(sender),
            Self::Http1(writer) => Sink::Http1(writer),
            Self::Http2(stream) => Sink::Http2(stream),
        }
    }

    pub(super) async fn flush(&mut self) -> Result<(), PumpError> {
        self.sink().flush().await
    }

    pub(super) fn unframe(&mut self) {
        if let Self::Http1(writer) = self {
            writer.unframe();
        }
    }
}

impl UpSource {
    /// The answer's head, and whether it is all.
    pub(super) async fn head(&mut self, method: &[u8]) -> Result<(Head, bool), HeadFailure> {
        match self {
            Self::Http1(reader) => match reader.response(method).await {
                Ok(head) => Ok((head, false)),
                Err(Failure::UpstreamReset) if reader.was_reset().await => Err(HeadFailure::Unread),
                Err(Failure::UpstreamReset) => Err(HeadFailure::Gone),
                Err(failure) => Err(HeadFailure::Failed(failure)),
            },
            Self::Mesh(receiver) => match receiver.next().await {
                Event::Head(block) => {
                    let mut head = mesh_head(block, method).map_err(HeadFailure::Failed)?;
                    // After an upgrade the end is that of the tunnel.
                    let end = !head.upgrade && receiver.take_end();
                    if end && matches!(head.framing, Framing::UntilClose | Framing::Chunked) {
                        head.framing = Framing::Length(0);
                    }
                    Ok((head, end))
                }

                Event::Reset(Code::NotProcessed) => Err(HeadFailure::NotProcessed),
                Event::Reset(Code::Denied) => Err(HeadFailure::Failed(Failure::PolicyDenied)),
                Event::Reset(Code::BadHead) => {
                    Err(HeadFailure::Failed(Failure::ClientBadRequest("refused by the server's sidecar")))
                }
                Event::Reset(_) => Err(HeadFailure::Gone),
                Event::Lost => Err(HeadFailure::Lost),
                _ => Err(HeadFailure::Failed(Failure::UpstreamBadResponse("a body without a head"))),
            },
            Self::Http2(future, body) => {
                let Some(answer) = future.as_mut() else { return Err(HeadFailure::Gone) };
                // Taken only when it has answered: this wait may be given up and begun again.
                let result = answer.await;
                *future = None;
                match result {
                    Ok(response) => {
                        let (parts, stream) = response.into_parts();
                        let end = stream.is_end_stream();
                        *body = Some(stream);
                        http2::response_head(&parts, end).map(|head| (head, end)).map_err(HeadFailure::Failed)
                    }
                    // Streams above the last one that a server names when it goes away were not processed
                    // either (RFC 9113 §6.8); h2 tells this of those only.
                    Err(error)
                        if error.reason() == Some(h2::Reason::REFUSED_STREAM)
                            || (error.is_go_away() && error.is_remote()) =>
                    {
                        Err(HeadFailure::NotProcessed)
                    }
                    Err(_) => Err(HeadFailure::Gone),
                }
            }
        }
    }

    /// The answer's body.
    pub(super) fn body(&mut self) -> Option<Source<'_>> {
        match self {
            Self::Http1(reader) => Some(Source::Http1(reader)),
            Self::Mesh(receiver) => Some(Source::Mesh(receiver)),
            Self::Http2(_, stream) => stream.as_mut().map(Source::Http2),
        }
    }
}

fn mesh_head(mut block: Bytes, method: &[u8]) -> Result<Head, Failure> {
    let bad = |_| Failure::UpstreamBadResponse("a head that cannot be read, from the server's sidecar");
    Fields::decode(&mut block).map_err(bad)?;
    let mut text = BytesMut::from(block);
    match crate::http1::head::parse_response(&mut text, method) {
        Ok(Some(head)) => Ok(head),
        _ => Err(Failure::UpstreamBadResponse("a head that cannot be read, from the server's sidecar")),
    }
}
