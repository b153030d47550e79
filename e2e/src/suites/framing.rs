//! HTTP/1 messages that two readers could interpret differently, and what a server behind the sidecars sees
//! of them. The peers are raw: a client that sends any bytes, and a server that records every connection and
//! request.

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

use super::Test;
use super::namespace::{TestNamespace, borrows, service};
use crate::kubectl::Kube;

pub(super) const TESTS: &[Test] = &[
    ("ambiguous heads are refused, and the server sees nothing of them", heads),
    ("malformed chunks never become a whole request", chunks),
    ("early answers, upgrades without 101 and aborted bodies carry nothing over to the next request", desync),
    ("when a client leaves while the application is silent, the application's connection ends too", left),
    ("well-formed requests arrive as they were sent, also from HTTP/1.0 clients", well_formed),
];

/// What a client sends, and the expected result.
struct Case {
    what: String,
    send: Vec<String>,
    leave: bool,
    /// The answers that the client sees.
    statuses: Vec<u64>,
    /// Requests that the server sees whole.
    whole: u64,
    /// Heads that the server sees at most.
    heads: u64,
    /// Whether the client's connection is closed.
    closed: bool,
    /// Whether the server's connection must have ended a little later.
    passed_on: bool,
}

const SERVER: &str = include_str!("../../peers/raw_server.py");
const CLIENT: &str = include_str!("../../peers/raw_client.py");

fn heads(kube: &Kube) -> Result<()> {
    let post = |lines: &str| format!("POST / HTTP/1.1\r\nHost: a\r\n{lines}\r\n\r\n");
    let lines = [
        "Content-Length: 6\r\nTransfer-Encoding: chunked",
        "Transfer-Encoding: chunked\r\nContent-Length: 6",
        "Content-Length: 6\r\nContent-Length: 7",
        "Content-Length: 6, 6",
        "Content-Length: +6",
        "Content-Length: -0",
        "Content-Length: 0x6",
        "Content-Length: 6 6",
        "Content-Length:",
        "Content-Length: 18446744073709551616",
        "Transfer-Encoding: xchunked",
        "Transfer-Encoding: \u{b}chunked",
        "Transfer-Encoding: chunked;q=1",
        "Transfer-Encoding: ,chunked",
        "Transfer-Encoding: identity",
        "Transfer-Encoding: chunked\r\nTransfer-Encoding: xchunked",
        "Transfer-Encoding : chunked",
        ": x",
        "X: a\rb",
        "X: a\nTransfer-Encoding: chunked",
        "X: 1\r\n Transfer-Encoding: chunked",
        "X: a\0b",
        "X y: a",
        "Host: b",
        "Connection: close, authorization",
        "Connection: tulle-client-id",
        "Expect: 100-continue, 200-ok",
    ];
    let mut cases: Vec<Case> = lines
        .iter()
        .map(|lines| refused(lines, &[&post(lines), "0\r\n\r\nGET /admin HTTP/1.1\r\nHost: a\r\n\r\n"]))
        .collect();
    for text in [
        "GET / HTTP/1.1\r\n\r\n",
        "GET /#x HTTP/1.1\r\nHost: a\r\n\r\n",
        "GET http://b/ HTTP/1.1\r\nHost: a\r\n\r\n",
        "POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    ] {
        cases.push(refused(text, &[text]));
    }
    // A line feed alone ends no line of HTTP. The bytes pass, and this server waits for more of its line. What a lenient
    // one sees of them is a test of suite `applications`.
    let (line, claim) = ("GET / HTTP/1.1\nHost: a\n", "Tulle_Client-Id: spiffe://x\n\n");
    for pieces in [&[format!("{line}{claim}")][..], &[line.to_owned(), claim.to_owned()]] {
        let pieces: Vec<&str> = pieces.iter().map(String::as_str).collect();
        cases.push(Case {
            statuses: vec![],
            closed: false,
            ..refused("a claim of another identity", &pieces)
        });
    }
    let long = format!("GET / HTTP/1.1\r\nHost: a\r\nX: {}\r\n\r\n", "x".repeat(70_000));
    cases.push(Case { statuses: vec![431], ..refused("a head of 70 kB", &[&long]) });
    try_all(kube, "t-heads", &cases)
}

fn chunks(kube: &Kube) -> Result<()> {
    let cases: Vec<Case> = [
        "5;\nAAAAA\r\n",
        "5 \r\nAAAAA\r\n",
        "+5\r\nAAAAA\r\n",
        "0x5\r\nAAAAA\r\n",
        "00000000000000005\r\nAAAAA\r\n",
        "5\r\nAAAAAB\r\n",
        "5\nAAAAA\r\n",
        "0\r\nX: y\n\r\n",
        "0\r\n X: y\r\n",
        "-5\r\nAAAAA\r\n",
    ]
    .iter()
    .map(|body| {
        let head = "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n";
        // A lenient reader would take these bytes for the end of the body and another request.
        let tail = "0\r\n\r\nGET /admin HTTP/1.1\r\nHost: a\r\n\r\n";
        Case { heads: 1, ..refused(body, &[head, body, tail]) }
    })
    .collect();
    try_all(kube, "t-chunks", &cases)
}

fn desync(kube: &Kube) -> Result<()> {
    let upgrade = "GET / HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n";
    let admin = "GET /admin HTTP/1.1\r\nHost: a\r\n\r\n";
    let next = "GET /next HTTP/1.1\r\nHost: a\r\n\r\n";
    let ok = |what: &str, send: &[&str], whole: u64, heads: u64| Case {
        statuses: vec![200],
        whole,
        heads,
        ..refused(what, send)
    };
    // A server that does not switch is asked again, on another connection: what follows is a request of its own.
    let both =
        |what: &str, send: &[&str]| Case { statuses: vec![200, 200], closed: false, ..ok(what, send, 2, 2) };
    let cases = [
        both("an upgrade that is answered 200", &[upgrade, admin]),
        both("an upgrade with a request right behind it", &[&format!("{upgrade}{admin}")]),
        // The rest of the body goes on as without a mesh, on a connection that gets no other request.
        Case {
            closed: false,
            ..ok(
                "an early answer",
                &["POST /early HTTP/1.1\r\nHost: a\r\nContent-Length: 100000\r\n\r\n", "of the body"],
                0,
                1,
            )
        },
        Case {
            leave: true,
            statuses: vec![],
            ..ok(
                "a body that its client aborts",
                &["POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n0123456789"],
                0,
                1,
            )
        },
        Case {
            leave: true,
            statuses: vec![],
            ..ok(
                "chunks that their client aborts",
                &["POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n64\r\n0123456789"],
                0,
                1,
            )
        },
        Case { statuses: vec![200], closed: false, ..ok("the request of the next client", &[next], 1, 1) },
    ];
    try_all(kube, "t-desync", &cases)
}

fn left(kube: &Kube) -> Result<()> {
    let hang = |what: &str, send: &[&str]| Case {
        leave: true,
        statuses: vec![],
        whole: 1,
        heads: 1,
        passed_on: true,
        ..refused(what, send)
    };
    try_all(
        kube,
        "t-left",
        &[
            hang("a GET", &["GET /hang HTTP/1.1\r\nHost: a\r\n\r\n"]),
            hang("a POST", &["POST /hang HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\n12345"]),
            hang(
                "a GET with another behind it",
                &["GET /hang HTTP/1.1\r\nHost: a\r\n\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n"],
            ),
        ],
    )
}

fn well_formed(kube: &Kube) -> Result<()> {
    let passed = |what: &str, send: &[&str], requests: u64, closed: bool| Case {
        statuses: vec![200; requests as usize],
        whole: requests,
        heads: requests,
        closed,
        ..refused(what, send)
    };
    let get = "GET / HTTP/1.1\r\nHost: a\r\n\r\n";
    let chunked = "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n";
    try_all(
        kube,
        "t-formed",
        &[
            passed("a request", &[get], 1, false),
            passed(
                "a method that the standard does not define",
                &["get / HTTP/1.1\r\nHost: a\r\n\r\n"],
                1,
                false,
            ),
            passed(
                "an upgrade with a body, which the server ignores",
                &[
                    "POST / HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\nConnection: upgrade\r\nContent-Length: 6\r\n\r\n123456",
                    get,
                ],
                2,
                false,
            ),
            passed("two requests in one piece", &[&format!("{get}{get}")], 2, false),
            passed("a head byte by byte", &["GE", "T / HT", "TP/1.1\r", "\nHost: a\r\n\r", "\n"], 1, false),
            passed(
                "a body",
                &["POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\n", "12345", get],
                2,
                false,
            ),
            passed(
                "chunks",
                &[chunked, "5\r\n12345\r\n", "3;x=y\r\nabc\r\n", "0\r\nX-Sum: 1\r\n\r\n", get],
                2,
                false,
            ),
            passed("a last request", &["GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"], 1, true),
            passed("HTTP/1.0", &["GET / HTTP/1.0\r\n\r\n"], 1, true),
            passed("HTTP/1.0 with a body", &["POST / HTTP/1.0\r\nContent-Length: 5\r\n\r\n12345"], 1, true),
            Case {
                statuses: vec![100, 200],
                ..passed(
                    "a client that waits to be asked for its body",
                    &[
                        "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n",
                        "12345",
                    ],
                    1,
                    false,
                )
            },
        ],
    )
}

/// A case that is answered 400 and of which the server sees nothing.
fn refused(what: &str, send: &[&str]) -> Case {
    Case {
        what: what.to_owned(),
        send: send.iter().map(|piece| (*piece).to_owned()).collect(),
        leave: false,
        statuses: vec![400],
        whole: 0,
        heads: 0,
        closed: true,
        passed_on: false,
    }
}

/// Tries every case through both sidecars, and through the server's alone.
fn try_all(kube: &Kube, namespace: &str, cases: &[Case]) -> Result<()> {
    borrows(kube)?;
    let field = TestNamespace::meshed(kube, namespace)?;
    let plain = TestNamespace::plain(kube, &format!("{namespace}-plain"))?;
    let ports = json!([
        {"name": "http", "port": 80, "targetPort": 8080}, {"name": "seen", "port": 81, "targetPort": 8081},
    ]);
    field.apply(service("server", json!({"ports": ports})))?;
    field.host_pod("server", "default", &["/usr/bin/python3", "-c", SERVER, "8080", "8081"])?;
    field.client("client")?;
    plain.client("client")?;
    let sent: Vec<Value> = cases.iter().map(Case::for_client).collect();
    let sent = Value::from(sent).to_string();
    for (through, client) in [("both sidecars", &field), ("the server's sidecar", &plain)] {
        let host = format!("server.{namespace}.svc.cluster.local");
        let command = ["/usr/bin/python3", "-c", CLIENT, &host, "80", "81", &sent];
        let printed = client.exec("client", &command)?;
        let results: Vec<Value> =
            serde_json::from_str(&printed).context("the client did not print a list of results")?;
        ensure!(results.len() == cases.len(), "{} results for {} cases", results.len(), cases.len());
        let wrong: Vec<String> =
            cases.iter().zip(&results).filter_map(|(case, result)| case.differs(result)).collect();
        ensure!(wrong.is_empty(), "through {through}:\n{}", wrong.join("\n"));
    }
    Ok(())
}

impl Case {
    fn for_client(&self) -> Value {
        // Whether a client that has ended its side has left shows when something is sent to it. Bytes of a client that
        // leaves may reach the server later.
        let wait = match (self.passed_on, self.leave) {
            (true, _) => 3.0,
            (false, true) => 1.0,
            (false, false) => 0.05,
        };
        json!({"send": self.send, "leave": self.leave, "wait": wait})
    }

    /// Describes the result if it differs from what the case expects.
    fn differs(&self, result: &Value) -> Option<String> {
        let requests: Vec<&Value> = result["connections"]
            .as_array()
            .into_iter()
            .flatten()
            .flat_map(|connection| connection["requests"].as_array().into_iter().flatten())
            .collect();
        let whole = requests.iter().filter(|request| request["whole"] == true).count() as u64;
        let statuses: Vec<u64> =
            result["statuses"].as_array().into_iter().flatten().filter_map(Value::as_u64).collect();
        let closed = self.leave || result["closed"] == self.closed;
        // Unread bytes on a connection must not contain a request either.
        let smuggled = result["connections"].to_string().contains("/admin") && self.whole + self.heads < 3;
        let open = result["connections"].as_array().into_iter().flatten().any(|c| c["open"] == true);
        let right = statuses == self.statuses
            && !(self.passed_on && open)
            && whole == self.whole
            && requests.len() as u64 <= self.heads
            && closed
            && !smuggled;
        (!right).then(|| format!("        {:?}: {result}", self.what))
    }
}
