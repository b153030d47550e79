//! Connections to addresses of which nothing is known: bytes as they are, for as long as it stays so.

use std::cell::Cell;
use std::net::SocketAddr;
use std::pin::pin;
use std::rc::Rc;
use std::time::Duration;

use bytes::BytesMut;
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep};

use super::reset_on_close;
use crate::attempt::proxy_tcp;
use crate::error::Failure;
use crate::http1::conn::split;
use crate::io::unless_reset;
use crate::pool::{self, PATIENT, Server};
use crate::worker::Worker;

/// A connection whose server spoke last, and on which nothing has moved for so long, is between two exchanges: most
/// likely it is kept for a next request.
const PAUSE: Duration = Duration::from_millis(250);
/// A shorter pause, which is enough once [`LONG_WAIT`] is over: a busy client leaves no longer ones.
const SHORT_PAUSE: Duration = Duration::from_millis(25);
/// How long a pause of [`PAUSE`] is waited for.
const LONG_WAIT: Duration = Duration::from_secs(5);
/// How long any pause is waited for. Then the connection is broken off wherever it is.
const LONGEST_WAIT: Duration = Duration::from_secs(10);
/// Time between two looks.
const LOOK: Duration = Duration::from_millis(10);

/// Bytes as they are to the address as it was dialled, until each way has ended. When `stop` resolves, the
/// connection is broken off between two exchanges.
pub(super) async fn serve(
    worker: &Rc<Worker>,
    client: TcpStream,
    destination: SocketAddr,
    stop: impl Future<Output = ()>,
) -> Result<(), Failure> {
    let series = worker.telemetry.outbound("", "_PASSTHROUGH", "", "opaque");
    let mut read = BytesMut::new();
    let mut stop = pin!(stop);
    let connecting = pin!(pool::connect(Server::from(destination), PATIENT));
    let connected = tokio::select! {
        biased;
        () = stop.as_mut() => Err(Failure::UpstreamConnect),
        connected = unless_reset(&client, &mut read, connecting) => {
            connected.unwrap_or(Err(Failure::ClientGaveUp))
        }
    };
    let server = match connected {
        Ok(server) => server,
        Err(failure) => {
            series.connection(Some(&failure), (0, 0));
            // The client sees what it would have seen: a connection that fails, not one that closes.
            reset_on_close(&client);
            return Err(failure);
        }
    };
    let (mut reader, mut writer) = split(client, read);
    let (mut from_server, mut to_server) = split(server, BytesMut::new());
    let ways = ((&mut reader, &mut writer), (&mut from_server, &mut to_server));
    let talk = Talk::default();
    let admit = |bytes| {
        talk.heard(Side::Client);
        Some(bytes)
    };
    let ends = async {
        stop.await;
        talk.pauses().await;
    };
    let joined = proxy_tcp(ways.0, ways.1, admit, || talk.heard(Side::Server), ends).await;
    series.connection(None, joined.bytes);
    Ok(())
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Side {
    Client,
    Server,
}

/// Who has spoken last, and when.
#[derive(Default)]
struct Talk(Cell<Option<(Side, Instant)>>);

impl Talk {
    fn heard(&self, side: Side) {
        self.0.set(Some((side, Instant::now())));
    }

    /// Resolves between two exchanges, or when that has been waited for in vain: in the middle of one, a request would be
    /// lost that the server may have carried out.
    async fn pauses(&self) {
        let since = Instant::now();
        loop {
            let waited = since.elapsed();
            let pause = if waited < LONG_WAIT { PAUSE } else { SHORT_PAUSE };
            let is_between = match self.0.get() {
                Some((Side::Client, _)) => false,
                Some((Side::Server, at)) => at.elapsed() >= pause,
                None => true,
            };
            if is_between || waited >= LONGEST_WAIT {
                return;
            }
            sleep(LOOK).await;
        }
    }
}
