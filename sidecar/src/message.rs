//! Bodies on their way: any source to any sink, with back-pressure and without waiting to gather.

use bytes::Bytes;
use futures::FutureExt as _;
use tulle_mesh::wire::frame::Code;

use crate::http1::conn::BodyError;
use crate::http1::{Part, Reader, Writer, head};
use crate::http2;
use crate::wire::{Event, Receiver, Sender};

/// Where a body comes from.
pub enum Source<'a> {
    /// An HTTP/1 connection.
    Http1(&'a mut Reader),
    /// A stream between sidecars.
    Mesh(&'a mut Receiver),
    /// An HTTP/2 stream.
    Http2(&'a mut h2::RecvStream),
}

/// Where a body goes.
pub enum Sink<'a> {
    /// An HTTP/1 connection.
    Http1(&'a mut Writer),
    /// A stream between sidecars.
    Mesh(&'a Sender),
    /// An HTTP/2 stream.
    Http2(&'a mut h2::SendStream<Bytes>),
}

/// Which side broke off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PumpError {
    /// The source's bytes are malformed.
    SourceMalformed(&'static str),
    /// The source ended early.
    SourceGone,
    /// The source, a sidecar, gave the stream up.
    SourceReset(Code),
    /// The sink takes no more.
    SinkGone,
    /// The body does not fit what its head declared.
    SinkRefused(&'static str),
}

impl Source<'_> {
    /// The next part.
    ///
    /// # Errors
    /// [`PumpError`] of the source.
    pub async fn next(&mut self) -> Result<Part, PumpError> {
        match self {
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
            Self::Http2(stream) => http2::next_part(stream).await,
        }
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
            Self::Http2(stream) => http2::send(stream, bytes).await,
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
            Self::Http2(stream) => http2::finish(stream, trailers),
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

/// Moves a body to its end. What has gathered is written as soon as the source has nothing more at
/// hand, so that a slow stream of events is not held back. Returns the bytes moved. `keep` sees each
/// piece before it goes, `end` the trailers.
///
/// # Errors
/// [`PumpError`] says which side broke off.
pub async fn pump(
    mut from: Source<'_>,
    mut to: Sink<'_>,
    mut keep: impl FnMut(&Bytes),
    mut end: impl FnMut(&[(Bytes, Bytes)]),
) -> Result<u64, PumpError> {
    let mut moved = 0;
    let mut trailers = None;
    loop {
        let part = match from.next().now_or_never() {
            Some(part) => part?,
            None => {
                to.flush().await?;
                from.next().await?
            }
        };
        match part {
            Part::Data(bytes) => {
                moved += bytes.len() as u64;
                keep(&bytes);
                to.data(bytes).await?;
            }
            Part::Trailers(lines) => {
                end(&lines);
                trailers = Some(lines);
            }
            Part::End => {
                to.end(trailers).await?;
                return Ok(moved);
            }
        }
    }
}
