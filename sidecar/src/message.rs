//! Bodies on their way: any source to any sink, with back-pressure and without waiting to gather.

use std::cell::Cell;

use bytes::Bytes;
use futures::FutureExt as _;
use tokio::time::Instant;
use tulle_mesh::wire::frame::Code;

use crate::claim::is_claim;
pub use crate::error::PumpError;
use crate::http1::conn::BodyError;
use crate::http1::{Part, Reader, Writer, head};
use crate::http2::{self, ErrorCode, RecvStream, SendStream};
use crate::wire::{Event, Receiver, Sender};

/// Where a body comes from.
pub enum Source<'a> {
    /// An HTTP/1 connection.
    Http1(&'a mut Reader),
    /// A stream between sidecars.
    Mesh(&'a mut Receiver),
    /// An HTTP/2 stream.
    Http2(&'a mut RecvStream),
}

/// Where a body goes.
pub enum Sink<'a> {
    /// An HTTP/1 connection.
    Http1(&'a mut Writer),
    /// A stream between sidecars.
    Mesh(&'a Sender),
    /// An HTTP/2 stream, and the count against the length that its head declared.
    Http2(&'a mut SendStream, http2::Length),
}

impl Source<'_> {
    /// The next part.
    ///
    /// # Errors
    /// [`PumpError`] of the source.
    pub async fn next(&mut self) -> Result<Part, PumpError> {
        let mut part = match self {
            Self::Http1(reader) => reader.part().await.map_err(|error| match error {
                BodyError::Malformed(why) => PumpError::SourceMalformed(why),
                BodyError::Gone => PumpError::SourceGone,
            }),
            Self::Mesh(receiver) => match receiver.next().await {
                Event::Data(bytes) => Ok(Part::Data(bytes)),
                Event::Trailers(block) => head::parse_trailers(&block)
                    .map(Part::Trailers)
                    .map_err(|e| PumpError::SourceMalformed(e.0)),
                Event::End => Ok(Part::End),
                Event::Reset(code) => Err(PumpError::SourceReset(code)),
                Event::Lost => Err(PumpError::SourceGone),
                Event::Head(_) => Err(PumpError::SourceMalformed("a second head")),
            },
            Self::Http2(stream) => stream.part().await,
        };
        if let Ok(Part::Trailers(lines)) = &mut part {
            // Some servers make one of trailers and header.
            lines.retain(|(name, _)| !is_claim(name));
        }
        part
    }
}

impl<'a> Source<'a> {
    /// From here on all bytes until the connection closes.
    pub fn unframed(self) -> Source<'a> {
        match self {
            Self::Http1(reader) => {
                reader.unframe();
                Source::Http1(reader)
            }
            other => other,
        }
    }
}

impl Sink<'_> {
    /// Passes bytes on.
    ///
    /// # Errors
    /// [`PumpError`] of the sink.
    pub async fn data(&mut self, bytes: Bytes) -> Result<(), PumpError> {
        match self {
            Self::Http1(writer) => writer.data(&bytes).await.map_err(sink_error),
            Self::Mesh(sender) => sender.data(bytes).await.map_err(|_| PumpError::SinkGone),
            Self::Http2(stream, length) => {
                length.take(bytes.len())?;
                stream.data(bytes).await
            }
        }
    }

    /// Ends the body.
    ///
    /// # Errors
    /// [`PumpError`] of the sink.
    pub async fn end(&mut self, trailers: Option<Vec<(Bytes, Bytes)>>) -> Result<(), PumpError> {
        match self {
            Self::Http1(writer) => writer.end(&trailers.unwrap_or_default()).await.map_err(sink_error),
            Self::Mesh(sender) => {
                match trailers {
                    Some(lines) => sender.trailers(&http2::trailer_block(&lines)),
                    None => sender.end(),
                }
                Ok(())
            }
            Self::Http2(stream, length) => {
                // An end would make a whole body of what has come: the reader has to see that it broke off.
                length.end()?;
                stream.end(trailers.as_deref())
            }
        }
    }

    /// Resolves when whoever reads this has gone away.
    pub async fn gone(&mut self) {
        match self {
            Self::Http1(writer) => writer.gone().await,
            Self::Mesh(sender) => sender.gone().await,
            Self::Http2(stream, _) => stream.gone().await,
        }
    }

    /// Breaks off, so that the reader cannot take it for a proper end.
    pub fn abort(&mut self) {
        match self {
            Self::Http1(writer) => writer.abort(),
            Self::Mesh(sender) => sender.reset(Code::UpstreamFailed),
            Self::Http2(stream, _) => stream.reset(ErrorCode::INTERNAL_ERROR),
        }
    }

    /// Writes what is buffered.
    ///
    /// # Errors
    /// [`PumpError`] of the sink.
    pub async fn flush(&mut self) -> Result<(), PumpError> {
        match self {
            Self::Http1(writer) if !writer.is_flushed() => writer.flush().await.map_err(sink_error),
            _ => Ok(()),
        }
    }
}

fn sink_error(error: BodyError) -> PumpError {
    match error {
        BodyError::Malformed(why) => PumpError::SinkRefused(why),
        BodyError::Gone => PumpError::SinkGone,
    }
}

/// How far the body of an answer has come.
#[derive(Debug, Default)]
pub struct Progress {
    /// Bytes from the server.
    pub bytes: Cell<u64>,
    /// Nothing has come from the server since the client sent something.
    pub is_unanswered: Cell<bool>,
    /// Waiting for the server is timed. It costs a look at the clock each time, so only where somebody asks.
    pub is_timed: Cell<bool>,
    /// Since when the server is waited for, with everything passed on that has come. `None`: the client is waited for, or
    /// nothing is timed.
    pub waits_since: Cell<Option<Instant>>,
}

/// The next part. What has gathered in the sink is written as soon as the source has nothing more at hand,
/// so that a slow stream of events is not held back. `watch`: a reader that goes away ends the wait.
async fn next(from: &mut Source<'_>, to: &mut Sink<'_>, watch: Option<&Progress>) -> Result<Part, PumpError> {
    if let Some(part) = from.next().now_or_never() {
        if part.is_err() {
            // What came before the source broke off still belongs to the reader.
            let _ = to.flush().await;
        }
        return part;
    }
    to.flush().await?;
    let Some(progress) = watch else { return from.next().await };
    if progress.is_timed.get() {
        progress.waits_since.set(Some(Instant::now()));
    }
    let part = tokio::select! {
        biased;
        part = from.next() => part?,
        () = to.gone() => return Err(PumpError::SinkGone),
    };
    progress.waits_since.set(None);
    Ok(part)
}

/// Moves one direction of an opaque connection to its end, and counts into `moved`. The other direction
/// goes on when this one has ended. `admit` sees every byte first; it may change some, and break off.
///
/// # Errors
/// [`PumpError`] says which side broke off.
pub async fn pump(
    mut from: Source<'_>,
    to: &mut Sink<'_>,
    moved: &mut u64,
    mut admit: impl FnMut(Bytes) -> Option<Bytes>,
) -> Result<(), PumpError> {
    loop {
        match next(&mut from, to, None).await? {
            Part::Data(bytes) => {
                let Some(bytes) = admit(bytes) else {
                    return Err(PumpError::SourceMalformed("bytes that are not admitted"));
                };
                *moved += bytes.len() as u64;
                to.data(bytes).await?;
            }
            Part::Trailers(_) => {}
            Part::End => return to.end(None).await,
        }
    }
}

/// Moves the body of an answer to its end, and notes its `progress`. `seen` is shown the trailers.
///
/// # Errors
/// [`PumpError`] says which side broke off; also when the client goes away while the server is silent.
pub async fn deliver(
    mut from: Source<'_>,
    mut to: Sink<'_>,
    progress: &Progress,
    mut seen: impl FnMut(&[(Bytes, Bytes)]),
) -> Result<(), PumpError> {
    let mut trailers = None;
    loop {
        match next(&mut from, &mut to, Some(progress)).await? {
            Part::Data(bytes) => {
                progress.bytes.set(progress.bytes.get() + bytes.len() as u64);
                progress.is_unanswered.set(false);
                to.data(bytes).await?;
            }
            Part::Trailers(lines) => {
                seen(&lines);
                trailers = Some(lines);
            }
            Part::End => return to.end(trailers).await,
        }
    }
}
