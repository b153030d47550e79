//! The retry matrix: method × body × how the server ends × kept or fresh connection × one or two endpoints, for
//! HTTP/1 and HTTP/2, with a sidecar at the server and without.
//!
//! In every cell the client's outcome and the number of requests that servers have read to their end are known
//! beforehand ([`Cell::expect`]). A request that may have been read is never sent again unless its method allows that.

use std::sync::Arc;

use futures::stream::{self, StreamExt as _};
use tokio::net::TcpStream;

use crate::harness::http2::Client;
use crate::harness::script::{Ending, Script};
use crate::harness::{Application, Cluster, Outcome, Pod, http1, http2, within};

/// Cells that run at the same time.
const AT_ONCE: usize = 6;
/// More than is kept to be sent again.
const LARGE: usize = 100 * 1024;
const SMALL: usize = 100;
const METHODS: [&str; 3] = ["GET", "POST", "PUT"];

const HTTP1: [Ending; 8] = [
    Ending::Answers,
    Ending::ClosesUnread,
    Ending::EndsUnread,
    Ending::ResetsHalfRead,
    Ending::ResetsRead,
    Ending::ClosesRead,
    Ending::HalfHead,
    Ending::HalfAnswer,
];
const HTTP2: [Ending; 6] = [
    Ending::Answers,
    Ending::RefusesStream,
    Ending::GoesAway,
    Ending::ClosesRead,
    Ending::ResetsStream,
    Ending::HalfAnswer,
];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Protocol {
    Http1,
    Http2,
}

/// One cell of the matrix.
#[derive(Clone, Copy, Debug)]
struct Cell {
    protocol: Protocol,
    method: &'static str,
    body: usize,
    ending: Ending,
    /// Whether one request only ends like this.
    once: bool,
    kept: bool,
    endpoints: usize,
}

/// What was seen in a cell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Seen {
    outcome: Outcome,
    /// Requests that servers have read to their end.
    whole: usize,
    /// The ending was met on a connection that had carried a request before.
    on_kept: bool,
}

/// Every combination of these.
fn cells(protocol: Protocol, endings: &[Ending], once: bool, bodies: &[usize]) -> Vec<Cell> {
    let mut cells = Vec::new();
    for method in METHODS {
        for &body in bodies {
            for &ending in endings {
                for kept in [false, true] {
                    for endpoints in [1, 2] {
                        cells.push(Cell { protocol, method, body, ending, once, kept, endpoints });
                    }
                }
            }
        }
    }
    cells
}

impl Cell {
    /// Whether `seen` is what must be.
    fn expect(&self, seen: Seen) -> bool {
        let saved = |whole| seen.outcome == Outcome::Whole(200) && seen.whole == whole;
        let failed = seen.outcome == Outcome::Whole(502) && seen.whole == 1;
        let elsewhere = self.endpoints == 2 || seen.on_kept;
        match self.ending {
            Ending::Answers => saved(1),
            Ending::HalfAnswer => seen.outcome == Outcome::CutShort(200) && seen.whole == 1,
            // It may have been carried out.
            ending if ending.is_reset() && self.method == "POST" => {
                let whole = usize::from(!ending.is_unread());
                seen.outcome != Outcome::Whole(200)
                    && seen.whole == whole
                    && (self.body == LARGE || seen.outcome == Outcome::Whole(502))
            }
            // It depends on how much was under way whether it can be sent again. A server that takes no more of a
            // request ends its client's connection, perhaps before that has read the answer.
            ending if ending.is_unread() && self.body == LARGE => {
                saved(1) || (seen.outcome != Outcome::Whole(200) && seen.whole == 0)
            }
            ending if ending.is_unread() => saved(1),
            _ if self.method == "POST" || self.body == LARGE => failed,
            Ending::ResetsRead => saved(2),
            // Once on this connection, which may have been closed for being idle, or at this endpoint.
            _ if elsewhere => saved(2),
            _ => failed,
        }
    }

    async fn run(&self, cluster: &Cluster, pods: &[Pod]) -> Seen {
        let script = Arc::new(Script::new(self.ending, self.once));
        let start = |pod| {
            let script = Arc::clone(&script);
            match self.protocol {
                Protocol::Http1 => {
                    Application::start(pod, move |stream| http1::serve(stream, Arc::clone(&script)))
                }
                Protocol::Http2 => {
                    Application::start(pod, move |stream| http2::serve(stream, Arc::clone(&script)))
                }
            }
        };
        let applications: Vec<Application> = pods.iter().take(self.endpoints).map(start).collect();
        let ports: Vec<_> = applications.iter().map(|application| &application.port).collect();
        let declared = if self.protocol == Protocol::Http1 { "http" } else { "kubernetes.io/h2c" };
        let service = cluster.service(Some(declared), &ports).await;
        if self.kept {
            // With two endpoints, it is likely that both have one.
            for _ in 0..self.endpoints * 2 {
                let stream = cluster.client.dial(service).await;
                let outcome = self.ask(stream, "GET", 0, || {}).await;
                assert_eq!(outcome, Outcome::Whole(200), "{self:?}: before it begins");
            }
        }
        script.arm();
        let stream = cluster.client.dial(service).await;
        let outcome = self.ask(stream, self.method, self.body, || script.head_arrived.notify_one()).await;
        Seen { outcome, whole: script.whole(), on_kept: script.was_met_on_kept() }
    }

    async fn ask(&self, mut stream: TcpStream, method: &str, body: usize, on_head: impl FnOnce()) -> Outcome {
        match self.protocol {
            Protocol::Http1 => within(http1::ask(&mut stream, &http1::request(method, body), on_head)).await,
            Protocol::Http2 => within(Client::new(stream).await.ask(method, body, on_head)).await,
        }
    }
}

/// Runs all cells, and returns those in which something else was seen than `expect` allows.
async fn wrong(
    meshed: bool,
    cells: Vec<Cell>,
    expect: impl Fn(&Cell, Seen) -> bool,
) -> (Vec<String>, Vec<(Cell, Seen)>) {
    let cluster = Cluster::start().await;
    let pods = [cluster.pod(meshed).await, cluster.pod(meshed).await];
    let (cluster, pods) = (&cluster, &pods);
    let running = cells.into_iter().map(|cell| async move { (cell, cell.run(cluster, pods).await) });
    let seen: Vec<(Cell, Seen)> = stream::iter(running).buffer_unordered(AT_ONCE).collect().await;
    let wrong = seen.iter().filter(|(cell, seen)| !expect(cell, *seen));
    (wrong.map(|(cell, seen)| format!("{cell:?}: {seen:?}")).collect(), seen)
}

async fn matrix(protocol: Protocol, meshed: bool, endings: &[Ending]) {
    let cells = cells(protocol, endings, true, &[0, SMALL, LARGE]);
    let (wrong, seen) = wrong(meshed, cells, Cell::expect).await;
    assert!(wrong.is_empty(), "{} of {} cells:\n{}", wrong.len(), seen.len(), wrong.join("\n"));
    // Where there is one endpoint, connections are kept, or half of the matrix is not what it says.
    let kept =
        seen.iter().filter(|(cell, _)| cell.kept && cell.endpoints == 1 && cell.ending != Ending::Answers);
    let (on_kept, others) = kept.fold((0, 0), |(on_kept, others), (_, seen)| match seen.on_kept {
        true => (on_kept + 1, others),
        false => (on_kept, others + 1),
    });
    assert!(on_kept > others * 4, "{on_kept} kept, {others} not");
}

#[tokio::test]
async fn http1_requests_are_repeated_where_it_is_safe() {
    matrix(Protocol::Http1, false, &HTTP1).await;
}

#[tokio::test]
async fn http1_requests_between_sidecars_are_repeated_where_it_is_safe() {
    matrix(Protocol::Http1, true, &HTTP1).await;
}

#[tokio::test]
async fn http2_requests_are_repeated_where_it_is_safe() {
    matrix(Protocol::Http2, false, &HTTP2).await;
}

#[tokio::test]
async fn http2_requests_between_sidecars_are_repeated_where_it_is_safe() {
    matrix(Protocol::Http2, true, &HTTP2).await;
}

/// A server that is broken for good: every attempt fails, there are few of them, and a POST is read once at most.
#[tokio::test]
async fn a_request_to_servers_that_always_fail_is_given_up_soon() {
    const MOST: usize = 6;
    let expect = |cell: &Cell, seen: Seen| {
        let failed = matches!(seen.outcome, Outcome::Whole(502 | 503));
        let read = match (cell.ending.is_unread(), cell.method) {
            (true, _) => seen.whole == 0,
            (false, "POST") => seen.whole == 1,
            (false, _) => (1..=MOST).contains(&seen.whole),
        };
        failed && read
    };
    for meshed in [false, true] {
        let mut all = cells(
            Protocol::Http1,
            &[Ending::ClosesUnread, Ending::ResetsRead, Ending::ClosesRead],
            false,
            &[0, SMALL],
        );
        let http2 = [Ending::RefusesStream, Ending::GoesAway, Ending::ResetsStream];
        all.extend(cells(Protocol::Http2, &http2, false, &[0, SMALL]));
        let (wrong, seen) = wrong(meshed, all, expect).await;
        assert!(wrong.is_empty(), "{meshed}, {} of {}:\n{}", wrong.len(), seen.len(), wrong.join("\n"));
    }
}
