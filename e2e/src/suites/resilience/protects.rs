//! Timeouts, deadlines, balancing, limits, faults, and all of them in shadow mode.

use std::collections::{BTreeMap, BTreeSet};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

use super::{in_seconds, ready_policy};
use crate::kubectl::Kube;
use crate::suites::namespace::{TestNamespace, borrows, service};

/// Status and seconds of an answer.
fn timed(field: &TestNamespace<'_>, url: &str) -> Result<(String, f64)> {
    let script = format!("curl -s -m 20 -o /dev/null -w '%{{http_code}} %{{time_total}}' {url}");
    let text = field.exec("client", &["/bin/sh", "-c", &script])?;
    let (status, seconds) = text.split_once(' ').with_context(|| format!("curl printed {text:?}"))?;
    Ok((status.to_owned(), seconds.parse()?))
}

/// Waits until a URL is answered with a status.
fn answers(field: &TestNamespace<'_>, url: &str, status: &str) -> Result<()> {
    let mut last = String::new();
    let waited = field.kube.wait_for(&format!("{url} to be answered {status}"), 60, || {
        last = field.status("client", url)?;
        Ok(last == status)
    });
    waited.map_err(|error| error.context(format!("the last answer was {last}")))
}

pub(super) fn timeouts(kube: &Kube) -> Result<()> {
    borrows(kube)?;
    let field = TestNamespace::meshed(kube, "t-s-timeout")?;
    field.service("slow", 1, &["--delay=10000"])?;
    // Sends the head at once, and the body over two seconds.
    let long = "import http.server, time
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.send_header('content-length', '4'); self.end_headers()
        for _ in range(4): time.sleep(0.5); self.wfile.write(b'x'); self.wfile.flush()
http.server.ThreadingHTTPServer(('', 8080), Handler).serve_forever()";
    field.apply(service("long", json!({})))?;
    field.server_pod("long", 8080, &["/usr/bin/python3", "-c", long])?;
    field.client("client")?;
    for name in ["slow", "long"] {
        ready_policy(&field, name, json!({"timeout": {"request": "500ms"}}))?;
    }
    // The application itself would answer 200.
    answers(&field, "http://slow/", "504")?;
    let (status, seconds) = timed(&field, "http://slow/")?;
    ensure!(status == "504" && seconds >= 0.5, "{status} after {seconds} s");
    let (status, seconds) = timed(&field, "http://long/")?;
    ensure!(status == "200" && seconds >= 1.9, "a long answer ended with {status} after {seconds} s");
    Ok(())
}

/// Calls a method of the counter; prints code and answer. Arguments: target, method, request, timeout.
const CALL: &str = "import json, sys, grpc
call = grpc.insecure_channel(sys.argv[1]).unary_unary(f'/shop.Counter/{sys.argv[2]}')
try: print(json.dumps(['OK', call(sys.argv[3].encode(), timeout=float(sys.argv[4])).decode()]))
except grpc.RpcError as error: print(json.dumps([error.code().name, error.details() or '']))";

pub(super) fn deadlines(kube: &Kube) -> Result<()> {
    borrows(kube)?;
    let field = TestNamespace::meshed(kube, "t-s-deadline")?;
    field.apply(service("counter", json!({"ports": [{"port": 80, "targetPort": 50051}]})))?;
    let server = include_str!("../../../peers/grpc_server.py");
    field.server_pod("counter", 50051, &["/usr/bin/python3", "-c", server, "50051"])?;
    field.client("client")?;
    let call = |request: &str, timeout: &str| -> Result<(String, String)> {
        let command = ["/usr/bin/python3", "-c", CALL, "counter:80", "Slow", request, timeout];
        let text = field.exec("client", &command)?;
        serde_json::from_str(&text).with_context(|| format!("the client printed {text:?}"))
    };
    let (code, remaining) = call("0", "60")?;
    let seconds: f64 = remaining.parse().with_context(|| format!("{code}: {remaining:?}"))?;
    ensure!(seconds > 30.0 && seconds <= 60.0, "of 60 s the application saw {seconds} s");
    let (code, why) = call("3000", "0.3")?;
    ensure!(code == "DEADLINE_EXCEEDED", "a call beyond its own deadline ended with {code}: {why}");
    ready_policy(&field, "counter", json!({"timeout": {"request": "800ms"}}))?;
    kube.wait_for("the policy's timeout to end a call", 60, || {
        Ok(call("3000", "8")?.0 == "DEADLINE_EXCEEDED")
    })?;
    let mut remaining = String::new();
    kube.wait_for("an answer within the policy's timeout", 60, || {
        let (code, seen) = call("0", "8")?;
        remaining = seen;
        Ok(code == "OK")
    })?;
    let seconds: f64 = remaining.parse().with_context(|| format!("the call ended with {remaining:?}"))?;
    ensure!(seconds <= 0.8, "of 8 s, and 0.8 s by the policy, the application saw {seconds} s");
    Ok(())
}

pub(super) fn hash(kube: &Kube) -> Result<()> {
    let field = TestNamespace::meshed(kube, "t-s-hash")?;
    field.service("web", 4, &[])?;
    field.client("client")?;
    ready_policy(&field, "web", json!({"balance": {"by": "Hash", "hash": {"header": "x-user"}}}))?;
    ensure!(field.status("client", "http://web/")? == "200", "no answer");
    thread::sleep(Duration::from_secs(1));
    let script = "for user in $(seq 12); do for i in 1 2 3 4; do
        echo \"$user $(curl -s -m 8 -H x-user:$user http://web/)\"; done; done";
    let text = field.exec("client", &["/bin/sh", "-c", script])?;
    let mut pods: BTreeMap<&str, BTreeSet<String>> = BTreeMap::new();
    for line in text.lines() {
        let (user, answer) = line.split_once(' ').with_context(|| format!("the client printed {line:?}"))?;
        let answer: Value = serde_json::from_str(answer).with_context(|| format!("answered {answer:?}"))?;
        pods.entry(user).or_default().insert(answer["pod"].as_str().unwrap_or("").to_owned());
    }
    ensure!(pods.len() == 12 && pods.values().all(|of| of.len() == 1), "pods of each user: {pods:?}");
    let all: BTreeSet<&String> = pods.values().flatten().collect();
    ensure!(all.len() >= 2, "twelve users are all on one pod of four: {pods:?}");
    Ok(())
}

/// Sends so many requests at once; prints how often there was which status, with `+` where Retry-After was set.
const AT_ONCE: &str = "import collections, http.client, json, sys, threading
seen, lock = collections.Counter(), threading.Lock()
def one():
    connection = http.client.HTTPConnection(sys.argv[1], timeout=15)
    connection.request('GET', '/')
    answer = connection.getresponse(); answer.read()
    with lock: seen[f'{answer.status}' + ('+' if answer.getheader('retry-after') else '')] += 1
threads = [threading.Thread(target=one) for _ in range(int(sys.argv[2]))]
[thread.start() for thread in threads]; [thread.join() for thread in threads]
print(json.dumps(seen))";

fn at_once(field: &TestNamespace<'_>, host: &str, number: u32) -> Result<BTreeMap<String, u64>> {
    let text = field.exec("client", &["/usr/bin/python3", "-c", AT_ONCE, host, &number.to_string()])?;
    serde_json::from_str(&text).with_context(|| format!("the client printed {text:?}"))
}

/// Events of a kind that the sidecars of an app have counted.
fn events(field: &TestNamespace<'_>, app: &str, kind: &str) -> Result<u64> {
    let kind = format!("kind=\"{kind}");
    field.pods(app)?.iter().map(|pod| field.metric(pod, &["tulle_events_total{", &kind])).sum()
}

pub(super) fn concurrency(kube: &Kube) -> Result<()> {
    let field = TestNamespace::meshed(kube, "t-s-limit")?;
    // So long that all twelve come before the first has its answer.
    field.service("web", 1, &["--delay=6000"])?;
    field.client("client")?;
    ready_policy(&field, "web", json!({"limits": {"concurrency": 3}}))?;
    let seen = at_once(&field, "web", 12)?;
    let (answered, shed) = (seen.get("200").copied().unwrap_or(0), seen.get("503+").copied().unwrap_or(0));
    ensure!(
        answered == 3 && shed == 9,
        "12 requests at once with a concurrency of 3: expected 3 times 200 and 9 times 503 with Retry-After, found {seen:?}"
    );
    ensure!(events(&field, "web", "limited")? >= 9, "the metrics do not count what was refused");
    let seen = at_once(&field, "web", 3)?;
    ensure!(seen.get("200") == Some(&3), "within the limit: {seen:?}");
    Ok(())
}

pub(super) fn faults(kube: &Kube) -> Result<()> {
    let field = TestNamespace::meshed(kube, "t-s-faults")?;
    field.service("web", 1, &[])?;
    field.client("client")?;
    ensure!(field.status("client", "http://web/")? == "200", "no answer without faults");
    let aborted = |seconds: u32| -> Result<()> {
        let abort = json!({"status": 418, "of": "100%"});
        ready_policy(&field, "web", json!({"faults": {"abort": abort, "until": in_seconds(seconds)?}}))
    };
    aborted(600)?;
    let ask = "for i in $(seq 20); do curl -s -m 8 -o /dev/null -w '%{http_code} ' http://web/; done";
    let (mut seen, mut reached) = (String::new(), 0);
    let waited = kube.wait_for("every request to be aborted", 60, || {
        let before = field.received("web")?;
        seen = field.exec("client", &["/bin/sh", "-c", ask])?;
        reached = field.received("web")? - before;
        Ok(seen.matches("418").count() == 20 && reached == 0)
    });
    waited.with_context(|| format!("the answers were {seen}; {reached} requests reached the application"))?;
    // The policy stays as it is while its time ends.
    aborted(10)?;
    answers(&field, "http://web/", "200")?;
    let faults = json!({"delay": {"by": "700ms", "of": "100%"}, "until": in_seconds(600)?});
    ready_policy(&field, "web", json!({"faults": faults}))?;
    kube.wait_for("requests to be delayed", 60, || {
        let (status, seconds) = timed(&field, "http://web/")?;
        Ok(status == "200" && (0.7..3.0).contains(&seconds))
    })
}

pub(super) fn shadow(kube: &Kube) -> Result<()> {
    let field = TestNamespace::meshed(kube, "t-s-shadow")?;
    field.service("web", 1, &["--delay=400"])?;
    field.client("client")?;
    let sections = json!({
        "mode": "Shadow", "timeout": {"request": "100ms"}, "limits": {"concurrency": 1},
        "faults": {"abort": {"status": 503, "of": "100%"}, "until": in_seconds(600)?},
    });
    ready_policy(&field, "web", sections)?;
    // The client's sidecar has the sections once it knows the Service.
    let counted = || {
        Ok::<_, anyhow::Error>((events(&field, "client", "would_")?, events(&field, "web", "would_limit")?))
    };
    let mut all = BTreeMap::new();
    kube.wait_for("the sections to be counted", 60, || {
        for (status, count) in at_once(&field, "web", 4)? {
            *all.entry(status).or_insert(0) += count;
        }
        let (client, server) = counted()?;
        Ok(client > 0 && server > 0)
    })?;
    ensure!(all.keys().all(|status| status == "200"), "shadow sections changed answers: {all:?}");
    Ok(())
}
