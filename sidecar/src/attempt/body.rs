//! The body of a request on its way to a server, kept while it may have to be sent again.

use std::future::poll_fn;
use std::pin::pin;
use std::task::{Context, Poll};

use bytes::{Bytes, BytesMut};
use futures::FutureExt as _;
use tulle_mesh::wire::STREAM_CREDIT;

use super::Moved;
use crate::error::Failure;
use crate::http1::{Framing, Head, Part};
use crate::message::{PumpError, Sink, Source};

/// A piece of a body from this size on is held as it was read, with the buffer around it.
const WORTH_HOLDING: usize = 4 * 1024;
/// A server that has read the head of a request has most likely read so much of its body with it, if it was there.
const ONE_READ: usize = 2 * 1024;
/// What is gathered of a body in chunks that belongs to a request for a tunnel.
const MAX_GATHERED: usize = 64 * 1024;

/// A request's body.
pub struct RequestBody<'a> {
    source: Option<Source<'a>>,
    /// What was read before the first attempt, and comes first.
    ahead: Bytes,
    kept: Kept,
    trailers: Option<Vec<(Bytes, Bytes)>>,
    ended: bool,
    /// In the last attempt the head went ahead of some of the body.
    parted: bool,
    /// Of a request for a tunnel: what of the body is still to come on a stream that goes on behind it.
    left: Option<u64>,
    /// What came on that stream behind the body: the tunnel's first bytes.
    beyond: Bytes,
}

/// What was read of a body, as long as all of it fits [`STREAM_CREDIT`].
#[derive(Default)]
struct Kept {
    first: Bytes,
    more: Vec<Bytes>,
    /// Small pieces after those: each would hold the whole buffer that it was read into.
    small: BytesMut,
    bytes: usize,
}

impl<'a> RequestBody<'a> {
    /// The body of a request with this framing. `upgrade`: behind it a tunnel may begin.
    pub fn new(source: Source<'a>, framing: Framing, upgrade: bool) -> Self {
        let left = match (&source, framing) {
            // An HTTP/1 connection is read as the framing says, and its reader knows where the body ends.
            (Source::Http1(_), _) => None,
            (_, Framing::Length(length)) if upgrade => Some(length),
            _ => None,
        };
        Self {
            source: Some(source),
            ahead: Bytes::new(),
            kept: Kept::default(),
            trailers: None,
            ended: matches!(framing, Framing::None | Framing::Length(0)),
            parted: false,
            left,
            beyond: Bytes::new(),
        }
    }

    /// Whether the whole of what was read is still here.
    pub fn is_replayable(&self) -> bool {
        self.kept.is_whole()
    }

    /// The same while it is being sent, of which so many bytes have been.
    pub(super) fn is_replayable_after(moved: u64) -> bool {
        moved <= u64::from(STREAM_CREDIT)
    }

    /// Whether a server that has not read all of the request has read nothing of it: it was short, and sent in one
    /// piece. An application may act on a head whose body it never reads.
    pub fn is_read_at_once(&self) -> bool {
        self.ended && !self.parted && self.kept.bytes <= ONE_READ
    }

    /// Whether the client's side was read to its end.
    pub fn is_ended(&self) -> bool {
        self.ended
    }

    /// Reads the body of a request for a tunnel that comes in chunks, and gives the head the length that it
    /// turned out to have. One that is longer than [`MAX_GATHERED`] makes the request an ordinary one.
    ///
    /// # Errors
    /// [`Failure::ClientBadRequest`] or [`Failure::ClientGone`] when the body breaks off.
    pub(crate) async fn gather(&mut self, head: &mut Head) -> Result<(), Failure> {
        let mut gathered = BytesMut::new();
        while gathered.len() <= MAX_GATHERED {
            match self.next().await.map_err(PumpError::of_client)? {
                Part::Data(bytes) => gathered.extend_from_slice(&bytes),
                // A body with a length has no room for them.
                Part::Trailers(_) => {}
                Part::End => {
                    head.framing = Framing::Length(gathered.len() as u64);
                    self.ended = gathered.is_empty();
                    self.ahead = gathered.freeze();
                    return Ok(());
                }
            }
        }
        head.upgrade = false;
        self.ahead = gathered.freeze();
        Ok(())
    }

    /// Reads the rest of the body before the first attempt, as long as all of it can be kept; `false`: it is longer. May
    /// be given up: nothing is lost.
    ///
    /// # Errors
    /// As [`Self::gather`].
    pub(crate) async fn read_ahead(&mut self) -> Result<bool, Failure> {
        while !self.ended {
            match self.next().await.map_err(PumpError::of_client)? {
                Part::Data(bytes) if self.kept.bytes + bytes.len() > STREAM_CREDIT as usize => {
                    self.ahead = bytes;
                    return Ok(false);
                }
                Part::Data(bytes) => self.kept.keep(&bytes),
                Part::Trailers(trailers) => self.trailers = Some(trailers),
                Part::End => self.ended = true,
            }
        }
        Ok(true)
    }

    /// What was read of the body, as one piece.
    pub(crate) fn copy(&mut self) -> Bytes {
        self.kept.settle();
        if self.kept.more.is_empty() {
            return self.kept.first.clone();
        }
        let mut whole = BytesMut::with_capacity(self.kept.bytes);
        (0..).map_while(|at| self.kept.piece(at)).for_each(|piece| whole.extend_from_slice(&piece));
        whole.freeze()
    }

    /// Sends what was kept and then what comes, and counts it into `moved`. `last`: with it the request ends; otherwise
    /// a tunnel may follow.
    pub(super) async fn send(
        &mut self,
        sink: &mut Sink<'_>,
        moved: &Moved,
        last: bool,
    ) -> Result<(), PumpError> {
        self.kept.settle();
        self.parted = false;
        let mut at = 0;
        while let Some(bytes) = self.kept.piece(at) {
            at += 1;
            moved.sent(bytes.len());
            sink.data(bytes).await?;
        }
        while !self.ended {
            let part = match self.next().now_or_never() {
                Some(part) => part?,
                None => {
                    self.parted = true;
                    sink.flush().await?;
                    self.next_while_read(sink, moved).await?
                }
            };
            match part {
                Part::Data(bytes) => {
                    self.kept.keep(&bytes);
                    moved.sent(bytes.len());
                    sink.data(bytes).await?;
                }
                Part::Trailers(trailers) => self.trailers = Some(trailers),
                Part::End => self.ended = true,
            }
        }
        if last { sink.end(self.trailers.clone()).await } else { sink.flush().await }
    }

    /// The client's side of the tunnel that begins behind the body: bytes that have come already, and where the
    /// others come from. `None`: it was taken before.
    pub(super) fn take_tunnel(&mut self) -> Option<(Bytes, Source<'a>)> {
        let source = self.source.take()?;
        Some((std::mem::take(&mut self.beyond), source.unframed()))
    }

    /// The next part. While a client is silent whose answer is complete, nothing but the sink shows that the reader of a
    /// stream has given it up.
    async fn next_while_read(&mut self, sink: &mut Sink<'_>, moved: &Moved) -> Result<Part, PumpError> {
        let mut next = pin!(self.next());
        poll_fn(|cx| match next.as_mut().poll(cx) {
            Poll::Pending if moved.answered.get() && is_given_up(sink, cx) => {
                Poll::Ready(Err(PumpError::SinkGone))
            }
            polled => polled,
        })
        .await
    }

    async fn next(&mut self) -> Result<Part, PumpError> {
        if !self.ahead.is_empty() {
            return Ok(Part::Data(std::mem::take(&mut self.ahead)));
        }
        if self.left == Some(0) {
            return Ok(Part::End);
        }
        let Some(source) = &mut self.source else { return Ok(Part::End) };
        let part = source.next().await?;
        let Some(left) = &mut self.left else { return Ok(part) };
        match part {
            Part::Data(mut bytes) => {
                let body = usize::try_from(*left).map_or(bytes.len(), |left| left.min(bytes.len()));
                self.beyond = bytes.split_off(body);
                *left -= body as u64;
                Ok(Part::Data(bytes))
            }
            Part::Trailers(_) | Part::End => {
                Err(PumpError::SourceMalformed("a body shorter than its Content-Length"))
            }
        }
    }
}

/// Whether the reader of a stream has given it up; if not, the task is woken when it does. A connection to an HTTP/1
/// server is looked at where answers come from.
fn is_given_up(sink: &mut Sink<'_>, cx: &mut Context<'_>) -> bool {
    match sink {
        Sink::Http1(_) => false,
        Sink::Mesh(_) | Sink::Http2(..) => pin!(sink.gone()).poll(cx).is_ready(),
    }
}

impl Kept {
    fn is_whole(&self) -> bool {
        self.bytes <= STREAM_CREDIT as usize
    }

    /// Keeps a piece for another attempt, as long as the whole fits.
    fn keep(&mut self, bytes: &Bytes) {
        let is_first = self.bytes == 0;
        self.bytes += bytes.len();
        if !self.is_whole() {
            self.first = Bytes::new();
            self.more = Vec::new();
            self.small = BytesMut::new();
        } else if is_first {
            // Most bodies are one piece.
            self.first = bytes.clone();
        } else if bytes.len() >= WORTH_HOLDING {
            self.settle();
            self.more.push(bytes.clone());
        } else {
            self.small.extend_from_slice(bytes);
        }
    }

    /// Makes a piece of the small ones.
    fn settle(&mut self) {
        if !self.small.is_empty() {
            self.more.push(self.small.split().freeze());
        }
    }

    /// The piece with this number, after [`Self::settle`].
    fn piece(&self, at: usize) -> Option<Bytes> {
        match at.checked_sub(1) {
            None => (!self.first.is_empty()).then(|| self.first.clone()),
            Some(at) => self.more.get(at).cloned(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(kept: &mut Kept) -> Vec<u8> {
        kept.settle();
        (0..).map_while(|at| kept.piece(at)).flat_map(|bytes| bytes.to_vec()).collect()
    }

    #[test]
    fn what_is_kept_comes_again_in_its_order() {
        let mut kept = Kept::default();
        let pieces =
            [vec![1; 10], vec![2; 20], vec![3; WORTH_HOLDING], vec![4; 5], vec![5; WORTH_HOLDING + 1]];
        for piece in &pieces {
            kept.keep(&Bytes::from(piece.clone()));
        }
        assert_eq!(all(&mut kept), pieces.concat());
        kept.keep(&Bytes::from_static(b"more"));
        assert_eq!(all(&mut kept), [pieces.concat(), b"more".to_vec()].concat());
    }

    #[tokio::test]
    async fn a_body_that_was_read_ahead_is_sent_whole_also_where_it_is_too_long_to_be_kept() {
        for (length, fits) in [(0, true), (5, true), (STREAM_CREDIT as usize, true), (200_000, false)] {
            let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
            let address = listener.local_addr().unwrap();
            let mut client = tokio::net::TcpStream::connect(address).await.unwrap();
            let (near, _) = listener.accept().await.unwrap();
            let sent = vec![b'x'; length];
            let head = format!("POST / HTTP/1.1\r\nhost: a\r\ncontent-length: {length}\r\n\r\n");
            let bytes = [head.as_bytes(), &sent].concat();
            let sending = tokio::spawn(async move {
                use tokio::io::AsyncWriteExt as _;
                client.write_all(&bytes).await.unwrap();
                client
            });
            let (mut reader, _writer) = crate::http1::conn::split(near, BytesMut::new());
            let head = reader.request().await.unwrap().unwrap();
            let mut body = RequestBody::new(Source::Http1(&mut reader), head.framing, false);
            assert_eq!(body.read_ahead().await, Ok(fits), "{length}");
            if fits {
                assert_eq!(body.copy(), sent, "{length}");
            }
            let mut read = body.copy().to_vec();
            while !body.ended {
                match body.next().await.unwrap() {
                    Part::Data(bytes) => read.extend_from_slice(&bytes),
                    Part::Trailers(_) => {}
                    Part::End => body.ended = true,
                }
            }
            assert!(read == sent, "{length}");
            drop(sending.await);
        }
    }

    #[test]
    fn a_body_that_outgrows_the_first_credit_is_not_kept() {
        let mut kept = Kept::default();
        kept.keep(&Bytes::from(vec![0; STREAM_CREDIT as usize]));
        assert!(kept.is_whole());
        kept.keep(&Bytes::from_static(b"x"));
        assert!(!kept.is_whole());
        assert_eq!(all(&mut kept), [0u8; 0]);
    }
}
