//! One stream: what its two halves can do.

use std::cell::RefCell;
use std::future::poll_fn;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use bytes::{Bytes, BytesMut};
use tulle_mesh::wire::frame::{self, Code, Kind};
use tulle_mesh::wire::{MAX_HEAD, MAX_STREAM_CREDIT, STREAM_CREDIT};

use super::connection::{BULK, Connection, OUTPUT, QUIET, SMALL_OUTPUT, TURN};
use crate::arrived::{Arrival, Arrived};

/// What arrives on a stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The head of the answer.
    Head(Bytes),
    /// Bytes of the body.
    Data(Bytes),
    /// Trailers.
    Trailers(Bytes),
    /// Nothing more in this direction.
    End,
    /// The peer gave the stream up.
    Reset(Code),
    /// The connection is gone.
    Lost,
}

/// Why a stream cannot go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StreamError {
    /// The connection takes no more streams; nothing was sent.
    #[error("the connection takes no more streams")]
    Unopened,
    /// The peer gave the stream up.
    #[error("the peer reset the stream: {0:?}")]
    Reset(Code),
    /// The connection is gone.
    #[error("the connection between the sidecars was lost")]
    Lost,
}

/// The part of a stream that both halves and the driver share.
pub(super) struct StreamState {
    arrived: Arrived<Event>,
    receiver: Option<Waker>,
    sender: Option<Waker>,
    /// Bytes that the peer still takes.
    credit: u32,
    /// Bytes that the peer may still send.
    granted: u32,
    /// What may be under way to us; grows while we keep up.
    window: u32,
    consumed: u32,
    /// The window goes back to what it was at first.
    narrows: bool,
    /// Bytes of DATA, both ways: since the stream was last quiet, and in this second.
    moved: u32,
    recent: u32,
    bulk: bool,
    partial: Option<BytesMut>,
    send_ended: bool,
    receive_ended: bool,
    /// The peer has sent its end, read or not.
    peer_ended: bool,
    /// The head of the answer has come, or gone.
    answered: bool,
    failed: Option<StreamError>,
}

impl StreamState {
    pub(super) fn shared(send_ended: bool) -> Rc<RefCell<Self>> {
        Rc::new(RefCell::new(Self {
            arrived: Arrived::default(),
            receiver: None,
            sender: None,
            credit: STREAM_CREDIT,
            granted: STREAM_CREDIT,
            window: STREAM_CREDIT,
            consumed: 0,
            narrows: false,
            moved: 0,
            recent: 0,
            bulk: false,
            partial: None,
            send_ended,
            receive_ended: false,
            peer_ended: false,
            answered: false,
            failed: None,
        }))
    }

    pub(super) fn push(&mut self, event: Event) {
        match &event {
            Event::Reset(code) => self.failed = Some(StreamError::Reset(*code)),
            Event::Lost => self.failed = Some(StreamError::Lost),
            Event::End => self.peer_ended = true,
            Event::Head(_) => self.answered = true,
            _ => {}
        }
        if self.failed.is_some()
            && let Some(waker) = self.sender.take()
        {
            waker.wake();
        }
        self.queue(event);
        if let Some(waker) = self.receiver.take() {
            waker.wake();
        }
    }

    fn queue(&mut self, event: Event) {
        match event {
            Event::Data(bytes) => self.arrived.push_data(bytes),
            other => self.arrived.push(other),
        }
    }

    fn pop(&mut self) -> Option<Event> {
        Some(match self.arrived.pop()? {
            Arrival::Data(bytes) => Event::Data(bytes),
            Arrival::Other(event) => event,
        })
    }

    /// Joins the frames of a head: `None` when it is too long, `Some(None)` until it is whole.
    pub(super) fn join(&mut self, payload: Bytes, flags: u8) -> Option<Option<Bytes>> {
        if flags & frame::MORE == 0 && self.partial.is_none() {
            return Some(Some(payload));
        }
        let partial = self.partial.get_or_insert_default();
        partial.extend_from_slice(&payload);
        if partial.len() > MAX_HEAD {
            return None;
        }
        if flags & frame::MORE != 0 {
            return Some(None);
        }
        Some(self.partial.take().map(BytesMut::freeze))
    }

    /// Whether the peer has ended its direction.
    pub(super) fn has_ended(&self) -> bool {
        self.peer_ended
    }

    /// Whether its answer has begun: to an opaque connection, that the application has taken it.
    pub(super) fn is_answered(&self) -> bool {
        self.answered
    }

    /// The head that was sent or read last was an interim one: the answer has begun only if another has come behind it.
    fn was_interim(&mut self) {
        self.answered = self.arrived.others().any(|event| matches!(event, Event::Head(_)));
    }

    /// Heads and trailers that nobody has read yet: how many, and their bytes.
    pub(super) fn blocks(&self) -> (usize, usize) {
        self.arrived.others().fold((0, 0), |(count, bytes), event| match event {
            Event::Head(block) | Event::Trailers(block) => (count + 1, bytes + block.len()),
            _ => (count, bytes),
        })
    }

    /// Counts bytes of DATA; whether they make this a stream that carries bulk.
    pub(super) fn moved(&mut self, bytes: u32) -> bool {
        self.recent = self.recent.saturating_add(bytes);
        self.moved = self.moved.saturating_add(bytes);
        let begins = !self.bulk && self.moved >= BULK;
        self.bulk |= begins;
        begins
    }

    /// A second has passed; whether the stream carries bulk no more. `scarce`: others need its window.
    pub(super) fn tick(&mut self, scarce: bool) -> bool {
        let quiet = std::mem::take(&mut self.recent) < QUIET;
        self.narrows = quiet && scarce && self.window > STREAM_CREDIT;
        if quiet {
            self.moved = 0;
        }
        quiet && std::mem::take(&mut self.bulk)
    }

    /// Whether a head has begun and not ended.
    pub(super) fn is_opening(&self) -> bool {
        self.partial.is_some()
    }

    pub(super) fn take_granted(&mut self, length: u32) -> bool {
        match self.granted.checked_sub(length) {
            Some(left) => {
                self.granted = left;
                true
            }
            None => false,
        }
    }

    /// What the peer may send in addition, now that `length` bytes have been taken: nothing until half of
    /// the window has been; then that, and as much again while `growth` lasts.
    fn grant(&mut self, length: u32, growth: &mut u32) -> u32 {
        self.consumed += length;
        if self.narrows {
            // Bytes that are not granted again.
            let back = self.consumed.min(self.window.saturating_sub(STREAM_CREDIT));
            self.consumed -= back;
            self.window -= back;
            *growth += back;
            self.narrows = self.window > STREAM_CREDIT;
        }
        if self.consumed < self.window / 2 || self.peer_ended {
            return 0;
        }
        let widest = if self.narrows { 0 } else { MAX_STREAM_CREDIT.saturating_sub(self.window) };
        let wider = self.window.min(widest).min(*growth);
        *growth -= wider;
        self.window += wider;
        let grant = std::mem::take(&mut self.consumed) + wider;
        self.granted = self.granted.saturating_add(grant);
        grant
    }

    /// What the window has grown by, to be given to other streams.
    fn grown(&mut self) -> u32 {
        let grown = self.window.saturating_sub(STREAM_CREDIT);
        self.window = STREAM_CREDIT;
        grown
    }

    pub(super) fn add_credit(&mut self, grant: u32) -> bool {
        let Some(credit) = self.credit.checked_add(grant) else { return false };
        self.credit = credit;
        if let Some(waker) = self.sender.take() {
            waker.wake();
        }
        true
    }

    fn finished(&self) -> bool {
        self.send_ended && self.receive_ended
    }
}

/// The half that sends. Dropped before its end, it resets the stream.
pub struct Sender {
    connection: Connection,
    id: u32,
    state: Rc<RefCell<StreamState>>,
}

/// The half that receives.
pub struct Receiver {
    connection: Connection,
    id: u32,
    state: Rc<RefCell<StreamState>>,
}

impl Sender {
    pub(super) fn new(connection: Connection, id: u32, state: Rc<RefCell<StreamState>>) -> Self {
        Self { connection, id, state }
    }

    /// Sends the head of an answer.
    pub fn head(&self, head: &[u8], end: bool) {
        self.state.borrow_mut().answered = true;
        self.block(Kind::Head, head, end);
    }

    /// What was sent last was an interim head: the answer has not begun.
    pub fn was_interim(&self) {
        self.state.borrow_mut().was_interim();
    }

    /// Sends trailers, which end this direction.
    pub fn trailers(&self, block: &[u8]) {
        self.block(Kind::Trailers, block, true);
    }

    fn block(&self, kind: Kind, block: &[u8], end: bool) {
        if self.state.borrow().failed.is_some() {
            return;
        }
        let mut shared = self.connection.shared.borrow_mut();
        shared.out.block(kind, if end { frame::END } else { 0 }, self.id, block);
        shared.wake_driver();
        drop(shared);
        if end {
            self.ended();
        }
    }

    /// Sends bytes; waits for credit, and for its turn while much waits to be written.
    ///
    /// # Errors
    /// [`StreamError`] when the peer or the connection has given up.
    pub async fn data(&self, mut bytes: Bytes) -> Result<(), StreamError> {
        let _turn = InLine(self);
        while !bytes.is_empty() {
            let room = poll_fn(|cx| self.poll_room(cx, bytes.len())).await?;
            let piece = bytes.split_to(room);
            let mut shared = self.connection.shared.borrow_mut();
            shared.out.data(self.id, piece);
            shared.wake_driver();
            shared.next_turn();
        }
        Ok(())
    }

    /// Ends this direction, unless it was opened as ended or has been.
    pub fn end(&self) {
        if self.state.borrow().send_ended {
            return;
        }
        let mut shared = self.connection.shared.borrow_mut();
        shared.out.frame(Kind::Data, frame::END, self.id, &[]);
        shared.wake_driver();
        drop(shared);
        self.ended();
    }

    /// Resolves when the peer has given the stream up, or the connection is gone.
    pub async fn gone(&self) {
        poll_fn(|cx| {
            let mut state = self.state.borrow_mut();
            if state.failed.is_some() {
                return Poll::Ready(());
            }
            state.sender = Some(cx.waker().clone());
            Poll::Pending
        })
        .await;
    }

    /// Gives the stream up, with a reason.
    pub fn reset(&self, code: Code) {
        reset(&self.connection, self.id, &self.state, code);
    }

    fn ended(&self) {
        let mut state = self.state.borrow_mut();
        state.send_ended = true;
        if state.finished() {
            self.connection.shared.borrow_mut().forget(self.id);
        }
    }

    /// How many of `wanted` bytes may be sent now; they are taken off the credit.
    fn poll_room(&self, cx: &mut Context<'_>, wanted: usize) -> Poll<Result<usize, StreamError>> {
        let mut state = self.state.borrow_mut();
        if let Some(error) = state.failed {
            return Poll::Ready(Err(error));
        }
        let mut shared = self.connection.shared.borrow_mut();
        let granted = (state.credit as usize).min(shared.credit as usize);
        if granted == 0 {
            // One that the peer holds up holds up nobody here.
            if shared.turns.leave(self.id) {
                shared.next_turn();
            }
            if shared.credit == 0 {
                shared.credit_turns.join(self.id, cx.waker());
            }
            state.sender = Some(cx.waker().clone());
            return Poll::Pending;
        }
        let waiting = shared.waiting();
        let small = state.recent < QUIET && waiting < SMALL_OUTPUT;
        if !small && (waiting >= OUTPUT || !shared.turns.is_turn_of(self.id)) {
            shared.turns.join(self.id, cx.waker());
            state.sender = Some(cx.waker().clone());
            return Poll::Pending;
        }
        shared.turns.leave(self.id);
        let room = wanted.min(TURN).min(granted);
        state.credit -= room as u32;
        shared.credit -= room as u32;
        if state.moved(room as u32) {
            shared.carries_bulk(self.id);
        }
        Poll::Ready(Ok(room))
    }

    /// Whether it is of this stream.
    pub(super) fn is(&self, id: u32) -> bool {
        self.id == id
    }
}

/// A sender that may wait in line; it leaves when it has sent everything or given up.
struct InLine<'a>(&'a Sender);

impl Drop for InLine<'_> {
    fn drop(&mut self) {
        let mut shared = self.0.connection.shared.borrow_mut();
        shared.credit_turns.leave(self.0.id);
        if shared.turns.leave(self.0.id) {
            shared.next_turn();
        }
    }
}

impl Drop for Sender {
    fn drop(&mut self) {
        let ended = { self.state.borrow().send_ended };
        if !ended {
            self.reset(Code::Cancel);
        }
    }
}

pub(super) fn reset(connection: &Connection, id: u32, state: &Rc<RefCell<StreamState>>, code: Code) {
    {
        let mut state = state.borrow_mut();
        state.send_ended = true;
        if state.failed.is_some() {
            return;
        }
        state.push(Event::Reset(code));
    }
    let mut shared = connection.shared.borrow_mut();
    if shared.forget(id) && !shared.closed {
        shared.out.frame(Kind::Reset, 0, id, &code.to_u32().to_be_bytes());
        shared.wake_driver();
    }
}

impl Receiver {
    pub(super) fn new(connection: Connection, id: u32, state: Rc<RefCell<StreamState>>) -> Self {
        Self { connection, id, state }
    }

    /// The next event; after [`Event::End`], [`Event::Reset`] or [`Event::Lost`] there is none.
    pub async fn next(&mut self) -> Event {
        poll_fn(|cx| self.poll_next(cx)).await
    }

    /// What was received last was an interim head: the answer has not begun.
    pub fn was_interim(&self) {
        self.state.borrow_mut().was_interim();
    }

    /// Whether the end has come with what was received last.
    pub fn has_end(&self) -> bool {
        self.state.borrow().arrived.front() == Some(&Event::End)
    }

    /// Takes the end, if it has come with what was received last.
    pub fn take_end(&mut self) -> bool {
        let mut state = self.state.borrow_mut();
        if state.arrived.front() != Some(&Event::End) {
            return false;
        }
        state.arrived.pop();
        drop(state);
        self.ended();
        true
    }

    /// The peer has sent everything: what its window has grown by is there for others.
    fn ended(&self) {
        let (grown, finished) = {
            let mut state = self.state.borrow_mut();
            state.receive_ended = true;
            (state.grown(), state.finished())
        };
        let mut shared = self.connection.shared.borrow_mut();
        shared.growth += grown;
        if finished {
            shared.forget(self.id);
        }
    }

    /// As [`Self::next`], to be polled.
    pub fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Event> {
        let mut state = self.state.borrow_mut();
        let Some(event) = state.pop() else {
            if let Some(error) = state.failed {
                return Poll::Ready(match error {
                    StreamError::Reset(code) => Event::Reset(code),
                    _ => Event::Lost,
                });
            }
            if state.receive_ended {
                return Poll::Ready(Event::End);
            }
            state.receiver = Some(cx.waker().clone());
            return Poll::Pending;
        };
        match &event {
            Event::Data(bytes) => {
                let length = bytes.len() as u32;
                let mut shared = self.connection.shared.borrow_mut();
                let grant = state.grant(length, &mut shared.growth);
                drop(state);
                if grant > 0 && shared.streams.contains_key(&self.id) {
                    shared.out.frame(Kind::Credit, 0, self.id, &grant.to_be_bytes());
                    shared.wake_driver();
                }
                shared.give_back(length);
            }
            Event::End => {
                drop(state);
                self.ended();
            }
            _ => {}
        }
        Poll::Ready(event)
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        let (open, unread, grown) = {
            let mut state = self.state.borrow_mut();
            // The end that nobody has read yet is an end: no reset for it.
            if state.arrived.others().any(|event| *event == Event::End) {
                state.receive_ended = true;
            }
            let unread = state.arrived.clear();
            (!state.receive_ended && state.failed.is_none(), unread, state.grown())
        };
        let mut shared = self.connection.shared.borrow_mut();
        shared.growth += grown;
        shared.give_back(unread as u32);
        if self.state.borrow().finished() {
            shared.forget(self.id);
        }
        drop(shared);
        if open {
            reset(&self.connection, self.id, &self.state, Code::Cancel);
        }
    }
}

#[cfg(test)]
mod tests;
