//! One stream: its state, and what its two halves can do.

use std::cell::RefCell;
use std::future::poll_fn;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use bytes::Bytes;
use tulle_mesh::wire::frame::Code;

use super::block::Block;
use super::connection::{OUTPUT, Role, Shared, TURN};
use super::frame::ErrorCode;
use super::head::{self, Answered};
use crate::arrived::{Arrival, Arrived};
use crate::http1::{Head, Part};
use crate::message::PumpError;

/// Heads and trailers that may wait to be read on one stream: interim answers and the final one.
const MAX_BLOCKS: usize = 16;
/// Memory of them.
const MAX_BLOCK_BYTES: usize = 2 * super::MAX_HEADER_LIST as usize;

/// What arrives on a stream beside DATA.
#[derive(Debug)]
pub(super) enum Event {
    /// The head of an answer, and whether nothing follows.
    Head(Box<Block>, bool),
    /// Trailers.
    Trailers(Vec<(Bytes, Bytes)>),
    /// Nothing more.
    End,
}

/// Why a stream cannot go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Failed {
    /// The peer reset it.
    Reset(ErrorCode),
    /// The peer, a server, has not looked at the request.
    Unprocessed,
    /// It was ended here, or its connection is gone.
    Lost,
}

/// The part of a stream that both halves and the driver share.
pub(super) struct StreamState {
    arrived: Arrived<Event>,
    receiver: Option<Waker>,
    sender: Option<Waker>,
    /// Bytes that the peer still takes; less than none when it has made its windows smaller.
    pub(super) send_window: i64,
    /// Bytes that the peer may still send.
    granted: u32,
    /// What it may send at most, and what of that has been read and not granted again.
    window: u32,
    consumed: u32,
    /// Bytes that are still to come of those that were declared.
    left: Option<u64>,
    /// The request was HEAD or CONNECT: the length that its answer declares is none of a body.
    pub(super) is_unmeasured: bool,
    /// The final head of the answer has come.
    is_answered: bool,
    /// The peer has sent its end.
    pub(super) peer_ended: bool,
    /// Its end has been read.
    is_read: bool,
    pub(super) send_ended: bool,
    /// Nobody reads what the peer sends.
    is_unread: bool,
    failed: Option<Failed>,
}

impl StreamState {
    pub(super) fn new(window: u32, send_window: i64) -> Self {
        Self {
            arrived: Arrived::default(),
            receiver: None,
            sender: None,
            send_window,
            granted: window,
            window,
            consumed: 0,
            left: None,
            is_unmeasured: false,
            is_answered: false,
            peer_ended: false,
            is_read: false,
            send_ended: false,
            is_unread: false,
            failed: None,
        }
    }

    /// Of a request that has arrived.
    pub(super) fn of_request(window: u32, send_window: i64, block: &Block, end: bool) -> Self {
        let is_connect = block.method.as_deref() == Some(b"CONNECT");
        Self {
            left: if is_connect { None } else { block.declared() },
            is_answered: true,
            peer_ended: end,
            is_read: end,
            ..Self::new(window, send_window)
        }
    }

    pub(super) fn is_ended(&self) -> bool {
        self.send_ended && self.peer_ended
    }

    fn wake_receiver(&mut self) {
        if let Some(waker) = self.receiver.take() {
            waker.wake();
        }
    }

    pub(super) fn wake_sender(&mut self) {
        if let Some(waker) = self.sender.take() {
            waker.wake();
        }
    }

    /// The stream cannot go on.
    pub(super) fn fail(&mut self, failed: Failed) {
        self.failed.get_or_insert(failed);
        self.wake_receiver();
        self.wake_sender();
    }

    /// Bytes that wait to be read; they are dropped.
    #[cfg(test)]
    pub(super) fn unread(&mut self) -> usize {
        self.arrived.clear()
    }

    /// How much of the content of a frame will be read by somebody.
    pub(super) fn keeps(&self, content: &Bytes) -> u32 {
        if self.is_unread { 0 } else { content.len() as u32 }
    }

    /// DATA has arrived: its content, the bytes of its payload, and whether it is the last.
    ///
    /// # Errors
    /// With what the stream has to be reset.
    pub(super) fn data(&mut self, content: Bytes, taken: u32, end: bool) -> Result<(), ErrorCode> {
        if self.peer_ended {
            return Err(ErrorCode::STREAM_CLOSED);
        }
        if !self.is_answered {
            return Err(ErrorCode::PROTOCOL_ERROR);
        }
        self.granted = self.granted.checked_sub(taken).ok_or(ErrorCode::FLOW_CONTROL_ERROR)?;
        if let Some(left) = &mut self.left {
            *left = left.checked_sub(content.len() as u64).ok_or(ErrorCode::PROTOCOL_ERROR)?;
            if end && *left > 0 {
                return Err(ErrorCode::PROTOCOL_ERROR);
            }
        }
        // Padding is not read: it is granted again with what is.
        self.consumed += taken - content.len() as u32;
        if !content.is_empty() && !self.is_unread {
            self.arrived.push_data(content);
        }
        if end {
            return self.end(None);
        }
        self.wake_receiver();
        Ok(())
    }

    /// A head or trailers have arrived.
    ///
    /// # Errors
    /// With what the stream has to be reset.
    pub(super) fn block(&mut self, block: Block, end: bool) -> Result<(), ErrorCode> {
        if self.peer_ended {
            return Err(ErrorCode::STREAM_CLOSED);
        }
        if self.is_answered {
            if !end || !block.is_trailers() || block.is_too_large {
                return Err(ErrorCode::PROTOCOL_ERROR);
            }
            return self.end(Some(block.headers));
        }
        if !block.is_response(end) || block.is_too_large {
            return Err(ErrorCode::PROTOCOL_ERROR);
        }
        if !matches!(block.status, Some(..200)) {
            self.is_answered = true;
            let has_body = !self.is_unmeasured && !matches!(block.status, Some(204 | 304));
            self.left = if has_body { block.declared() } else { None };
        }
        let waiting = self.arrived.others().filter_map(|event| match event {
            Event::Head(block, _) => Some(block.size()),
            _ => None,
        });
        let (count, bytes) =
            waiting.fold((0, block.size()), |(count, bytes), size| (count + 1, bytes + size));
        if count >= MAX_BLOCKS || bytes > MAX_BLOCK_BYTES {
            return Err(ErrorCode::ENHANCE_YOUR_CALM);
        }
        if end && self.left.is_some_and(|left| left > 0) {
            return Err(ErrorCode::PROTOCOL_ERROR);
        }
        self.peer_ended = end;
        self.arrived.push(Event::Head(Box::new(block), end));
        self.wake_receiver();
        Ok(())
    }

    /// The peer wants no more of this stream, and has sent all that it had declared: Node resets a long answer so, in the
    /// place of its end.
    pub(super) fn end_by_length(&mut self) {
        if self.left == Some(0) && !self.peer_ended {
            let _ = self.end(None);
        }
    }

    fn end(&mut self, trailers: Option<Vec<(Bytes, Bytes)>>) -> Result<(), ErrorCode> {
        if self.left.is_some_and(|left| left > 0) {
            return Err(ErrorCode::PROTOCOL_ERROR);
        }
        self.peer_ended = true;
        if let Some(trailers) = trailers {
            self.arrived.push(Event::Trailers(trailers));
        }
        self.arrived.push(Event::End);
        self.wake_receiver();
        Ok(())
    }

    /// What the peer may send in addition, now that so many bytes have been read: nothing until half of its window has
    /// been.
    fn read(&mut self, bytes: u32) -> u32 {
        self.consumed += bytes;
        if self.consumed < self.window / 2 || self.peer_ended {
            return 0;
        }
        let grant = std::mem::take(&mut self.consumed);
        self.granted += grant;
        grant
    }

    /// The peer takes so many bytes more.
    ///
    /// # Errors
    /// They are more than fit.
    pub(super) fn widen(&mut self, bytes: i64) -> Result<(), ErrorCode> {
        self.send_window += bytes;
        if self.send_window > i64::from(i32::MAX) {
            return Err(ErrorCode::FLOW_CONTROL_ERROR);
        }
        if self.send_window > 0 {
            self.wake_sender();
        }
        Ok(())
    }
}

/// The half that sends. Dropped before its end, it resets the stream.
pub struct SendStream {
    connection: Rc<RefCell<Shared>>,
    id: u32,
    state: Rc<RefCell<StreamState>>,
    has_head: bool,
}

/// The half that receives.
pub struct RecvStream {
    connection: Rc<RefCell<Shared>>,
    id: u32,
    state: Rc<RefCell<StreamState>>,
}

/// Both halves of a stream.
pub(super) fn halves(
    connection: &Rc<RefCell<Shared>>,
    id: u32,
    state: Rc<RefCell<StreamState>>,
) -> (SendStream, RecvStream) {
    connection.borrow_mut().live += 1;
    let receive = RecvStream { connection: Rc::clone(connection), id, state: Rc::clone(&state) };
    (SendStream { connection: Rc::clone(connection), id, state, has_head: false }, receive)
}

/// Why there is no head of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unanswered {
    /// The server has not looked at the request (RFC 9113 §8.7, §6.8).
    Unprocessed,
    /// Its stream or its connection has ended.
    Lost,
}

impl SendStream {
    /// Sends the head of an answer. `end`: nothing follows.
    ///
    /// # Errors
    /// [`PumpError::SinkRefused`] for a head that HTTP/2 cannot carry, [`PumpError::SinkGone`].
    pub fn head(&mut self, head: &Head, end: bool) -> Result<(), PumpError> {
        if !head::is_status(head.status()) {
            return Err(PumpError::SinkRefused("the head"));
        }
        self.has_head = true;
        self.block(end, |to| head::encode_response(to, head))
    }

    /// Whether it has sent the head of an answer.
    pub fn has_head(&self) -> bool {
        self.has_head
    }

    /// Sends an interim answer. 101 has no meaning in HTTP/2 (RFC 9113 §8.6).
    ///
    /// # Errors
    /// [`PumpError::SinkGone`].
    pub fn interim(&mut self, head: &Head) -> Result<(), PumpError> {
        if head.status() == 101 {
            return Ok(());
        }
        self.block(false, |to| head::encode_response(to, head))
    }

    /// Sends a block of fields, and the end behind it.
    fn block(&mut self, end: bool, encode: impl FnOnce(&mut bytes::BytesMut)) -> Result<(), PumpError> {
        if self.state.borrow().failed.is_some() {
            return Err(PumpError::SinkGone);
        }
        self.connection.borrow_mut().block(self.id, end, encode);
        if end {
            self.ended();
        }
        Ok(())
    }

    /// Sends bytes as the peer grants room for them, and waits for its turn while much waits to be written.
    ///
    /// # Errors
    /// [`PumpError::SinkGone`].
    pub async fn data(&mut self, mut bytes: Bytes) -> Result<(), PumpError> {
        let turn = InLine(self);
        while !bytes.is_empty() {
            let room = poll_fn(|cx| turn.0.poll_room(cx, bytes.len())).await?;
            let piece = bytes.split_to(room);
            let mut shared = turn.0.connection.borrow_mut();
            shared.data(turn.0.id, piece);
            shared.next_turn();
            shared.next_window_turns();
        }
        Ok(())
    }

    /// Ends the message, with trailers or without.
    ///
    /// # Errors
    /// [`PumpError::SinkGone`].
    pub fn end(&mut self, trailers: Option<&[(Bytes, Bytes)]>) -> Result<(), PumpError> {
        if self.state.borrow().send_ended {
            return Ok(());
        }
        if let Some(trailers) = trailers {
            return self.block(true, |to| head::encode_fields(to, trailers));
        }
        if self.state.borrow().failed.is_some() {
            return Err(PumpError::SinkGone);
        }
        self.connection.borrow_mut().end(self.id);
        self.ended();
        Ok(())
    }

    /// Gives the stream up.
    pub fn reset(&mut self, code: ErrorCode) {
        reset(&self.connection, self.id, &self.state, code);
    }

    /// Resolves when the peer has given the stream up, or the connection is gone.
    pub async fn gone(&mut self) {
        poll_fn(|cx| {
            let mut state = self.state.borrow_mut();
            if state.failed.is_some() {
                return Poll::Ready(());
            }
            remember(&mut state.sender, cx);
            Poll::Pending
        })
        .await;
    }

    fn ended(&self) {
        self.state.borrow_mut().send_ended = true;
        settle(&self.connection, self.id, &self.state);
    }

    /// How many of `wanted` bytes may be sent now; they are taken off the windows.
    fn poll_room(&self, cx: &mut Context<'_>, wanted: usize) -> Poll<Result<usize, PumpError>> {
        let mut state = self.state.borrow_mut();
        if state.failed.is_some() || state.send_ended {
            return Poll::Ready(Err(PumpError::SinkGone));
        }
        let mut shared = self.connection.borrow_mut();
        let granted = usize::try_from(state.send_window.min(shared.send_window)).unwrap_or(0);
        if granted == 0 {
            // One that the peer holds up holds up nobody here.
            if shared.turns.leave(self.id) {
                shared.next_turn();
            }
            if shared.send_window <= 0 {
                shared.window_turns.join(self.id, cx.waker());
            } else if shared.window_turns.leave(self.id) {
                shared.next_window_turns();
            }
            remember(&mut state.sender, cx);
            return Poll::Pending;
        }
        if shared.out.len() >= OUTPUT || !shared.turns.is_turn_of(self.id) {
            shared.turns.join(self.id, cx.waker());
            remember(&mut state.sender, cx);
            return Poll::Pending;
        }
        shared.turns.leave(self.id);
        shared.window_turns.leave(self.id);
        let room = wanted.min(TURN).min(granted);
        state.send_window -= room as i64;
        shared.send_window -= room as i64;
        Poll::Ready(Ok(room))
    }
}

/// Keeps the waker of the task that waits.
fn remember(place: &mut Option<Waker>, cx: &Context<'_>) {
    if !place.as_ref().is_some_and(|known| known.will_wake(cx.waker())) {
        *place = Some(cx.waker().clone());
    }
}

/// A sender that may wait in line; it leaves when it has sent everything or given up.
struct InLine<'a>(&'a SendStream);

impl Drop for InLine<'_> {
    fn drop(&mut self) {
        let mut shared = self.0.connection.borrow_mut();
        if shared.window_turns.leave(self.0.id) {
            shared.next_window_turns();
        }
        if shared.turns.leave(self.0.id) {
            shared.next_turn();
        }
    }
}

impl Drop for SendStream {
    fn drop(&mut self) {
        self.connection.borrow_mut().live -= 1;
        let is_ended = self.state.borrow().send_ended;
        if !is_ended {
            self.reset(ErrorCode::CANCEL);
        }
    }
}

/// The stream leaves its connection once both sides have ended it. A server whose answer is complete asks for no more of a
/// request that nobody reads (RFC 9113 §8.1).
fn settle(connection: &Rc<RefCell<Shared>>, id: u32, state: &Rc<RefCell<StreamState>>) {
    let (is_ended, is_unread, is_failed) = {
        let state = state.borrow();
        (state.is_ended(), state.is_unread, state.failed.is_some())
    };
    if is_failed {
        return;
    }
    if is_ended {
        connection.borrow_mut().ended(id);
    } else if is_unread && state.borrow().send_ended {
        connection.borrow_mut().has_let_end();
        reset(connection, id, state, ErrorCode::NO_ERROR);
    }
}

fn reset(connection: &Rc<RefCell<Shared>>, id: u32, state: &Rc<RefCell<StreamState>>, code: ErrorCode) {
    {
        let mut state = state.borrow_mut();
        state.send_ended = true;
        if state.failed.is_some() {
            return;
        }
        state.fail(Failed::Lost);
    }
    connection.borrow_mut().reset(id, code);
}

impl RecvStream {
    /// The next head of an answer to a request with this method. May be given up and called again, until it has
    /// returned [`Answered::Final`] or an error.
    ///
    /// # Errors
    /// [`Unanswered`].
    pub async fn answer(&mut self) -> Result<Answered, Unanswered> {
        loop {
            match poll_fn(|cx| self.poll_next(cx)).await {
                Ok(Arrival::Other(Event::Head(block, end))) => return Ok(Answered::of(block, end)),
                // The state lets nothing else pass before a head.
                Ok(_) => {}
                Err(Failed::Unprocessed | Failed::Reset(ErrorCode::REFUSED_STREAM)) => {
                    return Err(Unanswered::Unprocessed);
                }
                Err(_) => return Err(Unanswered::Lost),
            }
        }
    }

    /// The next part of a body.
    ///
    /// # Errors
    /// [`PumpError`] of the source.
    pub async fn part(&mut self) -> Result<Part, PumpError> {
        match poll_fn(|cx| self.poll_next(cx)).await {
            Ok(Arrival::Data(bytes)) => Ok(Part::Data(bytes)),
            Ok(Arrival::Other(Event::Trailers(lines))) => Ok(Part::Trailers(lines)),
            Ok(Arrival::Other(Event::End)) => Ok(Part::End),
            Ok(Arrival::Other(Event::Head(..))) => Err(PumpError::SourceMalformed("a second head")),
            Err(Failed::Reset(code)) => Err(match u8::try_from(code.0) {
                Ok(code) => PumpError::SourceReset(Code::Http2(code)),
                Err(_) => PumpError::SourceGone,
            }),
            Err(Failed::Unprocessed | Failed::Lost) => Err(PumpError::SourceGone),
        }
    }

    fn poll_next(&self, cx: &mut Context<'_>) -> Poll<Result<Arrival<Event>, Failed>> {
        let mut state = self.state.borrow_mut();
        if state.is_read {
            return Poll::Ready(Ok(Arrival::Other(Event::End)));
        }
        let Some(arrival) = state.arrived.pop() else {
            if let Some(failed) = state.failed {
                return Poll::Ready(Err(failed));
            }
            remember(&mut state.receiver, cx);
            return Poll::Pending;
        };
        match &arrival {
            Arrival::Data(bytes) => {
                let length = bytes.len() as u32;
                let grant = state.read(length);
                drop(state);
                let mut shared = self.connection.borrow_mut();
                if grant > 0 {
                    shared.grant(self.id, grant);
                }
                shared.give_back(length);
            }
            Arrival::Other(Event::End | Event::Head(_, true)) => state.is_read = true,
            Arrival::Other(_) => {}
        }
        Poll::Ready(Ok(arrival))
    }
}

impl Drop for RecvStream {
    fn drop(&mut self) {
        let unread = {
            let mut state = self.state.borrow_mut();
            state.is_unread = true;
            state.arrived.clear()
        };
        let role = {
            let mut shared = self.connection.borrow_mut();
            shared.give_back(unread as u32);
            shared.role
        };
        let has_ended = self.state.borrow().peer_ended;
        if role == Role::Client && !has_ended {
            return reset(&self.connection, self.id, &self.state, ErrorCode::CANCEL);
        }
        settle(&self.connection, self.id, &self.state);
    }
}
