//! `tulle/1` as a server reads it: frames, heads of streams, and a whole connection.
#![no_main]

use std::future::poll_fn;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use libfuzzer_sys::fuzz_target;
use tokio::runtime::{Builder, Runtime};
use tokio::time::timeout;
use tulle_mesh::wire::frame::{self, Code, Frame};
use tulle_mesh::wire::head::Fields;
use tulle_sidecar::wire::{Connection, Event, Receiver, Role, Sender, drive};

thread_local! {
    static RUNTIME: Runtime = Builder::new_current_thread().enable_time().build().expect("a runtime");
}

fuzz_target!(|bytes: &[u8]| {
    let whole = frames(bytes, bytes.len());
    assert_eq!(whole, frames(bytes, 1), "pieces make a difference");
    let mut written = BytesMut::new();
    for frame in &whole {
        frame::encode(&mut written, frame.kind, frame.flags, frame.stream, &frame.payload);
        head(&frame.payload);
    }
    assert!(bytes.starts_with(&written), "a frame is written as other bytes");
    RUNTIME.with(|runtime| runtime.block_on(connection(bytes)));
});

/// The frames of bytes that arrive in pieces of this length, up to the first that is refused.
fn frames(bytes: &[u8], piece: usize) -> Vec<Frame> {
    let (mut buffer, mut frames) = (BytesMut::new(), Vec::new());
    for piece in bytes.chunks(piece.max(1)) {
        buffer.extend_from_slice(piece);
        loop {
            match frame::decode(&mut buffer) {
                Ok(Some(frame)) => frames.push(frame),
                Ok(None) => break,
                Err(_) => return frames,
            }
        }
    }
    frames
}

/// The fields of a head, written again, are read as the same fields.
fn head(block: &Bytes) {
    let Ok(fields) = Fields::decode(&mut block.clone()) else { return };
    let mut written = BytesMut::new();
    fields.encode(&mut written);
    let mut written = written.freeze();
    assert_eq!(Fields::decode(&mut written).as_ref(), Ok(&fields));
    assert!(written.is_empty());
}

/// A server that answers, reads, refuses or drops the streams of a peer that sends these bytes and closes.
async fn connection(bytes: &[u8]) {
    let server = Connection::new(Role::Server);
    let driven = drive(server.clone(), tokio::io::join(bytes, tokio::io::sink()));
    let served = async {
        while let Some((head, sender, receiver)) = poll_fn(|cx| server.poll_accept(cx)).await {
            serve(head.last().copied().unwrap_or(0), &sender, receiver).await;
        }
    };
    let both = async { tokio::join!(driven, served) };
    timeout(Duration::from_secs(5), both).await.expect("the connection outlives its peer");
    assert!(server.is_closed() && server.active() == 0, "streams are left");
}

async fn serve(how: u8, sender: &Sender, mut receiver: Receiver) {
    match how % 4 {
        0 => return sender.reset(Code::NotProcessed),
        1 => return,
        2 => {
            sender.head(b"ok", false);
            let _ = sender.data(Bytes::from_static(&[0; 4096])).await;
            sender.end();
        }
        _ => sender.head(b"ok", true),
    }
    // Each stream has an end, since its connection has.
    while !matches!(receiver.next().await, Event::End | Event::Reset(_) | Event::Lost) {}
}
