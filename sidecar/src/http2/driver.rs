//! The one task that reads and writes a connection.

use std::cell::RefCell;
use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::BytesMut;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt as _};
use tokio::time::timeout;

use super::MAX_HEADER_LIST;
use super::block::Block;
use super::connection::{Broken, Leaving, NO_READING, Role, Shared};
use super::frame::{self, ErrorCode, Header};
use super::hpack::Decoder;
use super::input::{Input, Read};
use super::stream::{RecvStream, SendStream, halves};
use crate::http1::Head;

/// How long a connection that ends may take for what it still has to write.
const GOODBYE: Duration = Duration::from_secs(1);
/// What is handled before it is the turn of the tasks of the streams, and of the writer.
const BATCH: usize = 128 * 1024;
/// What a frame costs beside its bytes, so that a batch of small ones ends as well.
const FRAME_COST: usize = 64;
/// The longest header block that is gathered from its frames, still encoded. One whose fields are longer than they may be is
/// refused by itself; one beyond this ends its connection.
const MAX_BLOCK: usize = 4 * MAX_HEADER_LIST as usize;
/// The most frames that a block may come in (CVE-2024-27316).
const MAX_BLOCK_FRAMES: u32 = 100;
/// Bytes of HEADERS that say something of priority, which nobody reads any more (RFC 9113 §5.3).
const PRIORITY_FIELDS: usize = 5;

/// A request that has come from a client.
#[derive(Debug)]
pub struct Incoming {
    /// Its fields.
    pub block: Block,
    /// Nothing follows.
    pub end: bool,
}

/// Why a connection has ended before its time.
#[derive(Debug, thiserror::Error)]
pub enum ConnectionError {
    /// The transport failed, or the peer closed amid a frame.
    #[error("the connection failed: {0}")]
    Io(#[from] io::Error),
    /// The peer broke the protocol, and has been told.
    #[error("HTTP/2: {1} ({0:?})")]
    Peer(ErrorCode, &'static str),
}

/// One end of a connection, which has to be polled for anything to happen on its streams.
struct Driver<S> {
    io: S,
    shared: Rc<RefCell<Shared>>,
    input: Input,
    decoder: Decoder,
    /// A header block that goes on: of which stream, whether that ends with it, how many frames it has come in, and itself.
    open_block: Option<(u32, bool, u32, BytesMut)>,
    /// Nothing is read any more.
    has_ended: bool,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Driver<S> {
    fn new(io: S, read: BytesMut, role: Role) -> Self {
        Self {
            io,
            shared: Rc::new(RefCell::new(Shared::new(role))),
            input: Input::new(read, role == Role::Server),
            decoder: Decoder::default(),
            open_block: None,
            has_ended: false,
        }
    }

    /// Reads and writes what can be. Ready when the connection has ended, and early where a request has come.
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), ConnectionError>> {
        loop {
            let may_read = self.shared.borrow().out.len() < NO_READING;
            if may_read {
                match self.poll_read(cx) {
                    Poll::Ready(Ok(Ok(()))) => return Poll::Ready(Ok(())),
                    Poll::Ready(Ok(Err(broken))) => return Poll::Ready(Err(self.broken(broken))),
                    Poll::Ready(Err(error)) => return Poll::Ready(Err(error.into())),
                    Poll::Pending => {}
                }
            }
            if !self.shared.borrow().accepted.is_empty() {
                return Poll::Pending;
            }
            let is_idle = self.poll_write(cx)?.is_ready();
            let mut shared = self.shared.borrow_mut();
            if may_read || shared.out.len() >= NO_READING {
                let is_done = shared.is_leaving || shared.leaving == Leaving::Heard;
                if is_idle && is_done && shared.streams.is_empty() {
                    return Poll::Ready(Ok(()));
                }
                if !shared.driver.as_ref().is_some_and(|known| known.will_wake(cx.waker())) {
                    shared.driver = Some(cx.waker().clone());
                }
                if is_idle && shared.streams.is_empty() {
                    shared.out.release();
                    self.input.release();
                    self.decoder.release();
                }
                return Poll::Pending;
            }
        }
    }

    /// Tells the peer what it did wrong.
    fn broken(&self, Broken { code, why }: Broken) -> ConnectionError {
        let mut shared = self.shared.borrow_mut();
        let last = if shared.role == Role::Server { shared.last_accepted() } else { 0 };
        shared.go_away(last, code, why);
        ConnectionError::Peer(code, why)
    }

    /// Ready when the peer has closed, or has broken the protocol.
    fn poll_read(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Result<(), Broken>>> {
        let mut read = 0;
        loop {
            if read >= BATCH {
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            let header = match ready!(self.input.poll_frame(&mut self.io, cx))? {
                Err(broken) => return Poll::Ready(Ok(Err(broken))),
                Ok(Read::End) if self.input.is_amid_frame() => {
                    return Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into()));
                }
                Ok(Read::End) => return Poll::Ready(Ok(Ok(()))),
                Ok(Read::Frame(header)) => header,
            };
            read += header.length + FRAME_COST;
            if let Err(broken) = self.frame(header) {
                return Poll::Ready(Ok(Err(broken)));
            }
        }
    }

    /// Takes the frame in front.
    fn frame(&mut self, header: Header) -> Result<(), Broken> {
        if let Some((stream, ..)) = &self.open_block
            && (header.kind != frame::CONTINUATION || header.stream != *stream)
        {
            return Err(Broken::protocol("a header block that breaks off"));
        }
        let is_of_stream = matches!(
            header.kind,
            frame::DATA | frame::HEADERS | frame::PRIORITY | frame::RST_STREAM | frame::CONTINUATION
        );
        let is_of_connection = matches!(header.kind, frame::SETTINGS | frame::PING | frame::GOAWAY);
        if (is_of_stream && header.stream == 0) || (is_of_connection && header.stream != 0) {
            return Err(Broken::protocol("a frame that belongs to no stream, or to one"));
        }
        match header.kind {
            frame::DATA => {
                let content = self.input.content(header).ok_or(Broken::protocol("too much padding"))?;
                return self.shared.borrow_mut().data_frame(header, content);
            }
            frame::HEADERS => self.headers(header)?,
            frame::CONTINUATION => self.continuation(header)?,
            _ => control(&mut self.shared.borrow_mut(), header, self.input.payload(header))?,
        }
        self.input.skip(header);
        Ok(())
    }

    fn headers(&mut self, header: Header) -> Result<(), Broken> {
        let missing = Broken::protocol("a header block without its beginning");
        let mut block = frame::without_padding(header, self.input.payload(header)).ok_or(missing)?;
        if header.has(frame::HAS_PRIORITY) {
            check_dependency(header, block)?;
            block = block.get(PRIORITY_FIELDS..).ok_or(missing)?;
        }
        let end = header.has(frame::END_STREAM);
        if header.has(frame::END_HEADERS) {
            return block_frame(&mut self.decoder, &self.shared, header.stream, end, block);
        }
        self.open_block = Some((header.stream, end, 1, BytesMut::from(block)));
        Ok(())
    }

    fn continuation(&mut self, header: Header) -> Result<(), Broken> {
        let Some((stream, end, frames, mut block)) = self.open_block.take() else {
            return Err(Broken::protocol("a header block without its beginning"));
        };
        let piece = self.input.payload(header);
        if block.len() + piece.len() > MAX_BLOCK || frames >= MAX_BLOCK_FRAMES {
            return Err(Broken {
                code: ErrorCode::ENHANCE_YOUR_CALM,
                why: "a header block that is too long",
            });
        }
        block.extend_from_slice(piece);
        if header.has(frame::END_HEADERS) {
            return block_frame(&mut self.decoder, &self.shared, stream, end, &block);
        }
        self.open_block = Some((stream, end, frames + 1, block));
        Ok(())
    }

    /// Ready when everything is written.
    fn poll_write(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut shared = self.shared.borrow_mut();
        while !shared.out.is_empty() {
            let written = ready!(shared.out.poll_write(Pin::new(&mut self.io), cx))?;
            shared.written();
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
        }
        Poll::Ready(Ok(()))
    }

    /// Ends the connection and all its streams. What is to be written still is, unless that takes long.
    async fn end(&mut self) {
        self.has_ended = true;
        let waiting = {
            let mut shared = self.shared.borrow_mut();
            let waiting = std::mem::take(&mut shared.out);
            shared.close();
            waiting
        };
        self.shared.borrow_mut().out = waiting;
        let goodbye = async {
            poll_fn(|cx| self.poll_write(cx)).await?;
            self.io.shutdown().await
        };
        let _ = timeout(GOODBYE, goodbye).await;
    }
}

/// A connection that ends without a word takes its streams with it.
impl<S> Drop for Driver<S> {
    fn drop(&mut self) {
        self.shared.borrow_mut().close();
    }
}

/// Decodes a whole block.
fn block_frame(
    decoder: &mut Decoder,
    shared: &Rc<RefCell<Shared>>,
    stream: u32,
    end: bool,
    bytes: &[u8],
) -> Result<(), Broken> {
    let mut block = Block::default();
    let error = Broken { code: ErrorCode::COMPRESSION_ERROR, why: "a header block that cannot be decoded" };
    decoder.decode(bytes, |field| block.take(field)).map_err(|_| error)?;
    shared.borrow_mut().block_frame(stream, end, block)
}

/// Nobody reads priorities any more, but no stream may depend on itself (RFC 7540 §5.3.1).
fn check_dependency(header: Header, fields: &[u8]) -> Result<(), Broken> {
    if first_number(fields) == Some(header.stream) {
        return Err(Broken::protocol("a stream that depends on itself"));
    }
    Ok(())
}

/// The 31 bits that a payload begins with.
fn first_number(payload: &[u8]) -> Option<u32> {
    Some(u32::from_be_bytes(*payload.first_chunk()?) & 0x7fff_ffff)
}

/// Frames that are neither DATA nor header blocks.
fn control(shared: &mut Shared, header: Header, payload: &[u8]) -> Result<(), Broken> {
    let number = || first_number(payload).unwrap_or(0);
    let is_ack = header.has(frame::ACK);
    match (header.kind, payload.len()) {
        (frame::RST_STREAM, 4) => {
            let code = payload.first_chunk().map_or(0, |code| u32::from_be_bytes(*code));
            shared.reset_frame(header.stream, ErrorCode(code))
        }
        (frame::SETTINGS, 0) if is_ack => shared.control(),
        (frame::SETTINGS, length) if !is_ack && length % 6 == 0 => shared.settings(payload),
        (frame::PING, 8) => shared.ping(is_ack, payload),
        (frame::GOAWAY, 8..) => {
            shared.goaway_frame(number());
            Ok(())
        }
        (frame::WINDOW_UPDATE, 4) => shared.window_update(header.stream, number()),
        (frame::PUSH_PROMISE, _) => Err(Broken::protocol("a push, which was not enabled")),
        (frame::RST_STREAM | frame::SETTINGS | frame::PING | frame::GOAWAY | frame::WINDOW_UPDATE, _) => {
            Err(Broken::size("a frame of a wrong size"))
        }
        (frame::PRIORITY, length) if length != 5 => Err(Broken::size("a frame of a wrong size")),
        (frame::PRIORITY, _) => check_dependency(header, payload).and_then(|()| shared.control()),
        // Kinds that are not known (RFC 9113 §4.1).
        _ => shared.control(),
    }
}

/// A client's connection, as the server sees it.
pub struct Server<S>(Driver<S>);

impl<S: AsyncRead + AsyncWrite + Unpin> Server<S> {
    /// Begins to serve a connection, of which these bytes have been read.
    pub fn new(io: S, read: BytesMut) -> Self {
        Self(Driver::new(io, read, Role::Server))
    }

    /// The next request; `None`: the connection has ended as it should. Everything on the connection happens in here, so it
    /// has to be called again at once. It may be given up and called again.
    ///
    /// # Errors
    /// [`ConnectionError`]; there is nothing more.
    pub async fn accept(&mut self) -> Option<Result<(Incoming, SendStream, RecvStream), ConnectionError>> {
        if self.0.has_ended {
            return None;
        }
        let ended = poll_fn(|cx| {
            let had = !self.0.shared.borrow().accepted.is_empty();
            // Requests whose connection has ended meanwhile are not begun.
            if !had && let Poll::Ready(ended) = self.0.poll(cx) {
                return Poll::Ready(Err(ended));
            }
            match self.0.shared.borrow_mut().accepted.pop_front() {
                Some(accepted) => Poll::Ready(Ok(accepted)),
                None => Poll::Pending,
            }
        })
        .await;
        match ended {
            Ok(accepted) => {
                let (send, receive) = halves(&self.0.shared, accepted.id, accepted.state);
                Some(Ok((Incoming { block: accepted.block, end: accepted.end }, send, receive)))
            }
            Err(ended) => {
                self.0.end().await;
                ended.err().map(Err)
            }
        }
    }

    /// Whether the client's SETTINGS have come.
    pub fn is_settled(&self) -> bool {
        self.0.shared.borrow().is_settled
    }

    /// Tells the client to open no more requests here: the connection ends with those that it has opened.
    pub fn leave(&mut self) {
        self.0.shared.borrow_mut().leave();
    }
}

/// A connection to a server, as its requests share it. The connection ends when this is dropped and all its streams have
/// ended.
pub struct Client {
    shared: Rc<RefCell<Shared>>,
}

/// Opens a connection to a server: what opens requests, and what has to run for anything to happen.
pub fn client<S>(io: S) -> (Client, impl Future<Output = Result<(), ConnectionError>>)
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let mut driver = Driver::new(io, BytesMut::new(), Role::Client);
    let client = Client { shared: Rc::clone(&driver.shared) };
    let driving = async move {
        let ended = poll_fn(|cx| driver.poll(cx)).await;
        driver.end().await;
        ended
    };
    (client, driving)
}

impl Client {
    /// Resolves when the server's SETTINGS have come, or the connection has ended. For one task.
    pub async fn settled(&self) {
        poll_fn(|cx| {
            let mut shared = self.shared.borrow_mut();
            if shared.is_settled || shared.is_closed {
                return Poll::Ready(());
            }
            shared.waits_for_settings = Some(cx.waker().clone());
            Poll::Pending
        })
        .await;
    }

    /// How many requests the server takes at once, if it has said so; `usize::MAX`: as many as one likes.
    pub fn max_streams(&self) -> Option<usize> {
        let shared = self.shared.borrow();
        shared.is_settled.then(|| shared.peer_streams.unwrap_or(usize::MAX))
    }

    /// Whether it takes requests.
    pub fn is_open(&self) -> bool {
        let shared = self.shared.borrow();
        !shared.is_closed && !shared.is_leaving
    }

    /// Whether it takes requests, and a server that has answered one early does not get the rest of that one still.
    pub fn is_shareable(&self) -> bool {
        self.is_open() && !self.shared.borrow().has_early_answer()
    }

    /// Sends the head of a request. `end`: nothing follows. `grpc_timeout` takes the place of the head's own. `None`: the
    /// connection takes no requests any more, and nothing was sent.
    pub fn open(
        &self,
        head: &Head,
        end: bool,
        grpc_timeout: Option<&[u8]>,
    ) -> Option<(SendStream, RecvStream)> {
        let is_unmeasured = head.request_line().0 == "HEAD" || head.is_connect();
        let (id, state) = {
            let mut shared = self.shared.borrow_mut();
            let opened = shared.open(is_unmeasured, end)?;
            shared.block(opened.0, end, |to| super::head::encode_request(to, head, grpc_timeout));
            opened
        };
        Some(halves(&self.shared, id, state))
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        let mut shared = self.shared.borrow_mut();
        shared.is_leaving = true;
        shared.wake_driver();
    }
}
