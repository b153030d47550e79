//! A request that has ended, and what is shown of it.
//!
//! Never a query, never a credential, and nothing that is long: who may tap may see who calls what, and not act as them.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::time::Instant;
use tulle_mesh::proto::{self, TapEvent};
use tulle_mesh::reason::Reason;
use tulle_mesh::tap::{is_secret, shown_value};

use crate::call::{Call, Ended};
use crate::http1::{Head, logged_path};
use crate::telemetry::{Series, SeriesKey};

/// Headers that a tap shows at most.
const MAX_HEADERS: usize = 8;
/// The longest name of a header that is shown, in bytes.
const MAX_NAME: usize = 128;
/// Values are cut here, in bytes.
const MAX_VALUE: usize = 256;
/// Methods are cut here.
const MAX_METHOD: usize = 32;
/// Hosts are cut here: as long as a name in DNS may be.
const MAX_HOST: usize = 255;
/// Paths are cut here.
const MAX_PATH: usize = 512;

/// The headers that a tap shows: names in small letters.
#[derive(Debug, Default)]
pub struct ShownHeaders(Vec<String>);

impl ShownHeaders {
    /// Of those that were asked for the ones that may be shown, as many as are shown at most.
    pub fn of(asked: &[String]) -> Self {
        let mut names: Vec<String> = Vec::new();
        for name in asked.iter().map(|name| name.to_ascii_lowercase()) {
            let is_shown =
                !name.is_empty() && name.len() <= MAX_NAME && !is_secret(&name) && !names.contains(&name);
            if is_shown && names.len() < MAX_HEADERS {
                names.push(name);
            }
        }
        Self(names)
    }

    /// The first line of each name that a request has.
    fn lines(&self, head: &Head) -> Vec<proto::Header> {
        let line = |name: &String| {
            let value = text(head.header(name)?, MAX_VALUE);
            Some(proto::Header { name: name.clone(), value: shown_value(name, &value).to_owned() })
        };
        self.0.iter().filter_map(line).collect()
    }
}

/// A request that has ended.
#[derive(Debug)]
pub struct Request<'a> {
    /// Under what it was counted.
    pub(super) key: &'a SeriesKey,
    /// Its head, as it went on from here.
    pub(super) head: &'a Head,
    /// What its client got; 0: nothing.
    pub(super) status: u16,
    /// The same of gRPC.
    pub(super) grpc_status: Option<u16>,
    /// When its head had been read.
    pub(super) since: Instant,
    /// From its head to the end of the answer.
    pub(super) took: Duration,
    /// How often it was sent.
    pub(super) attempts: u8,
    /// Why it failed, or was refused by the server's sidecar.
    pub(super) reason: Option<Reason>,
}

impl<'a> Request<'a> {
    /// A request that has ended: the series that it was counted in, its outcome and its duration.
    pub fn of(call: &'a Call<'_>, series: &'a Series, ended: &Ended, took: Duration) -> Self {
        let (status, grpc_status) = match &ended.result {
            Ok(status) => (*status, ended.grpc_status),
            // Of an answer that was cut off only its end is known.
            Err(_) if ended.answered => (0, ended.grpc_status),
            Err(failure) => call.answer.statuses_of(&call.head, failure).unwrap_or_default(),
        };
        Self {
            key: &series.key,
            head: &call.head,
            status,
            grpc_status,
            since: call.since,
            took,
            attempts: call.attempts,
            reason: ended.reason(),
        }
    }

    /// What is shown of it.
    pub(super) fn event(&self, headers: &ShownHeaders) -> TapEvent {
        let (method, target) = self.head.request_line();
        let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        TapEvent {
            ended_unix_micros: i64::try_from(since_epoch.as_micros()).unwrap_or(i64::MAX),
            direction: self.key.wire_direction().into(),
            peer_namespace: self.key.namespace.clone(),
            peer: self.key.peer.clone(),
            method: cut(method, MAX_METHOD).to_owned(),
            host: self.head.header("host").map(|host| text(host, MAX_HOST)).unwrap_or_default(),
            path: cut(logged_path(target).unwrap_or_default(), MAX_PATH).to_owned(),
            status: self.status.into(),
            micros: u64::try_from(self.took.as_micros()).unwrap_or(u64::MAX),
            mtls: self.key.mtls,
            reason: self.reason.map(Reason::name).unwrap_or_default().to_owned(),
            headers: headers.lines(self.head),
            route: self.key.route.to_string(),
            protocol: self.key.protocol.to_owned(),
            attempts: self.attempts.into(),
            grpc_status: self.grpc_status.map(u32::from),
            revision: self.key.revision.clone(),
        }
    }
}

/// As much of a text as fits these bytes.
fn cut(text: &str, most: usize) -> &str {
    text.get(..text.floor_char_boundary(most)).unwrap_or(text)
}

/// The same of a value, which may not be text.
fn text(value: &[u8], most: usize) -> String {
    match std::str::from_utf8(value) {
        Ok(text) => cut(text, most).to_owned(),
        // A replacement character is longer than the byte for which it stands.
        Err(_) => cut(&String::from_utf8_lossy(value.get(..most).unwrap_or(value)), most).to_owned(),
    }
}
