//! What is measured of a pair of proxies, and with which load generator.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Read as _};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;

use super::proxies::ProxyPair;
use super::testbed::{CLIENT, Testbed};
use crate::host;

/// Figures by the name of their row.
pub type Figures = BTreeMap<&'static str, f64>;

/// Duration of each load, in seconds.
const SECONDS: u64 = 8;
/// Idle connections that are held.
const HELD: usize = 1000;
/// Time after the load at which memory is looked at again.
const REST: Duration = Duration::from_secs(60);

/// The clients that no load generator offers.
const CLIENTS: &str = include_str!("clients.py");

/// Measures everything. The order matters: memory is looked at before the first load, and again when all has rested.
pub fn all(testbed: &Testbed, pair: &mut ProxyPair<'_>) -> Result<Figures> {
    let mut figures = memory(testbed, pair)?;
    sleep(Duration::from_secs(2));
    let http1 = url(&pair.targets.http1, "");
    let (rate, cpu) = with_cpu(pair, || wrk(testbed, &http1, &[], SECONDS))?;
    figures.extend([("http1_rate", rate), ("http1_cpu", cpu)]);
    figures.extend(streams(testbed, pair)?);
    let opaque = url(&pair.targets.opaque, "");
    figures.insert("opaque_cpu", with_cpu(pair, || wrk(testbed, &opaque, &[], SECONDS))?.1);
    let close = ["-H", "Connection: close"];
    let (rate, cpu) = with_cpu(pair, || wrk(testbed, &opaque, &close, SECONDS / 2))?;
    figures.extend([("connections", rate), ("connection_cpu", cpu)]);
    let load = open_loop(testbed, &host_and_port(&pair.targets.http1), 1000, SECONDS)?;
    figures.extend([("p50", load.p50), ("p99", load.p99)]);
    figures.extend(bulk(testbed, pair)?);
    if pair.memory() > 0.0 {
        sleep(REST);
        let idle = figures.get("idle").copied().unwrap_or(0.0);
        figures.insert("rested", pair.memory() / idle);
    }
    Ok(figures)
}

/// Memory of the outbound proxy after its start, and with connections that rest.
pub fn memory(testbed: &Testbed, pair: &mut ProxyPair<'_>) -> Result<Figures> {
    let mut figures = Figures::new();
    testbed.wait_for(&host_and_port(&pair.targets.http1))?;
    if let Some(milliseconds) = start_up(testbed, pair)? {
        figures.insert("start", milliseconds);
    }
    sleep(Duration::from_secs(2));
    figures.insert("idle", pair.memory());
    for (name, target) in [("http_idle", &pair.targets.http1), ("tcp_idle", &pair.targets.opaque)] {
        let clients = Held::open(testbed, target)?;
        figures.insert(name, pair.memory());
        drop(clients);
    }
    Ok(figures)
}

/// Requests over HTTP/2.
pub fn streams(testbed: &Testbed, pair: &ProxyPair<'_>) -> Result<Figures> {
    let streams = url(&pair.targets.http2, "");
    let (rate, cpu) = with_cpu(pair, || http2(testbed, &streams, false, SECONDS))?;
    let calls = url(&pair.targets.http2, "post");
    let (_, post) = with_cpu(pair, || http2(testbed, &calls, true, SECONDS))?;
    Ok([("http2_rate", rate), ("http2_cpu", cpu), ("post_cpu", post)].into())
}

/// A target, as most programs want it.
pub fn host_and_port((host, port): &(String, u16)) -> String {
    format!("{host}:{port}")
}

/// The URL of a path, without its first slash, at a target.
pub fn url(target: &(String, u16), path: &str) -> String {
    format!("http://{}/{path}", host_and_port(target))
}

/// Rate of a load, and CPU seconds of both proxies per million of its requests.
pub fn with_cpu(pair: &ProxyPair<'_>, load: impl FnOnce() -> Result<(f64, f64)>) -> Result<(f64, f64)> {
    let before = pair.cpu_seconds();
    let (rate, requests) = load()?;
    ensure!(requests > 0.0, "a load generator sent no request");
    Ok((rate, (pair.cpu_seconds() - before) * 1e6 / requests))
}

/// Milliseconds from the start of the outbound proxy to the first successful response through it.
fn start_up(testbed: &Testbed, pair: &mut ProxyPair<'_>) -> Result<Option<f64>> {
    pair.stop_outbound();
    let (host, port) = &pair.targets.http1;
    let mut waiting = clients(testbed, &["first", host, &port.to_string()]).stdout(Stdio::piped()).spawn()?;
    sleep(Duration::from_millis(500));
    let started = SystemTime::now().duration_since(UNIX_EPOCH)?;
    if !pair.start_outbound()? {
        let _ = waiting.kill();
        let _ = waiting.wait();
        return Ok(None);
    }
    let mut text = String::new();
    waiting.stdout.take().context("the client has no output")?.read_to_string(&mut text)?;
    ensure!(waiting.wait()?.success(), "no response through the proxy that was started again");
    let first: f64 = text.trim().parse().context("the client printed no time")?;
    Ok(Some((first - started.as_secs_f64()) * 1000.0))
}

fn clients(testbed: &Testbed, arguments: &[&str]) -> Command {
    let mut command = testbed.inside(CLIENT.0, "python3");
    command.args(["-c", CLIENTS]).args(arguments);
    command
}

/// Connections that have each served one request and stay open.
struct Held(Child);

impl Held {
    fn open(testbed: &Testbed, (host, port): &(String, u16)) -> Result<Self> {
        let arguments = ["hold", host, &port.to_string(), &HELD.to_string()];
        let mut command = clients(testbed, &arguments);
        let mut held = Self(command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?);
        let mut line = String::new();
        BufReader::new(held.0.stdout.take().context("the client has no output")?).read_line(&mut line)?;
        ensure!(line.trim() == "held", "{HELD} connections could not be held");
        sleep(Duration::from_secs(3));
        Ok(held)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// As many requests as 64 connections allow: their rate and number.
pub fn wrk(testbed: &Testbed, url: &str, more: &[&str], seconds: u64) -> Result<(f64, f64)> {
    let duration = format!("-d{seconds}s");
    let mut command = testbed.inside(CLIENT.0, "wrk");
    let text = host::output(command.args(["-t1", "-c64", &duration]).args(more).arg(url))?;
    if text.contains("Non-2xx") || text.contains("Socket errors") {
        bail!("requests to {url} failed:\n{text}");
    }
    Ok((figure(&text, "Requests/sec", 1)?, figure(&text, "requests in", 0)?))
}

/// Requests of h2load, as many as its arguments say: the number of those that were answered.
pub fn h2load(testbed: &Testbed, url: &str, post: bool, arguments: &[&str]) -> Result<f64> {
    let body = testbed.folder.join("request");
    let body = body.display().to_string();
    let mut command = testbed.inside(CLIENT.0, "h2load");
    command.arg("-t1").args(arguments);
    if post {
        command.args(["-d", &body, "-H", "content-type: application/grpc", "-H", "te: trailers"]);
    }
    let text = host::output(command.arg(url))?;
    let done = figure(&text, "requests: ", 5)?;
    let good = text.contains(" 0 failed, 0 errored, 0 timeout") && text.contains(" 0 4xx, 0 5xx");
    ensure!(good && done > 0.0, "requests to {url} failed:\n{text}");
    Ok(done)
}

/// As many requests as 16 HTTP/2 connections with 8 streams each allow: their rate and number.
pub fn http2(testbed: &Testbed, url: &str, post: bool, seconds: u64) -> Result<(f64, f64)> {
    let done = h2load(testbed, url, post, &["-c16", "-m8", "-D", &seconds.to_string()])?;
    Ok((done / seconds as f64, done))
}

/// The number that is word `place` of the line with this text.
fn figure(text: &str, line: &str, place: usize) -> Result<f64> {
    let found = text.lines().find(|found| found.contains(line));
    let word = found.and_then(|found| found.split_whitespace().nth(place));
    let number = word.and_then(|word| word.parse().ok());
    number.with_context(|| format!("no {line:?} in the output of a load generator:\n{text}"))
}

/// Result of requests at a fixed rate.
pub struct OpenLoop {
    /// Number of requests that were sent. Each was answered with success.
    pub sent: f64,
    /// Median of the response times in microseconds.
    pub p50: f64,
    /// Their p99 in microseconds.
    pub p99: f64,
}

/// Sends `rate` requests per second, independent of the response times.
pub fn open_loop(testbed: &Testbed, target: &str, rate: u64, seconds: u64) -> Result<OpenLoop> {
    let shop = std::env::current_exe()?.with_file_name("shop");
    let mut command = testbed.inside(CLIENT.0, &shop.display().to_string());
    command.args(["load", "--post-every=0", "--any-body"]).arg(format!("--rate={rate}"));
    command.arg(format!("--target={target}")).arg(format!("--seconds={seconds}"));
    let text = host::output(&mut command)?;
    let line: Value = serde_json::from_str(text.lines().last().context("no output of the load generator")?)?;
    let value = |name: &str| line[name].as_f64().unwrap_or(0.0);
    let sent = value("sent");
    ensure!(sent > 0.0 && value("ok") >= sent, "requests failed: {line}");
    Ok(OpenLoop { sent, p50: value("p50_us"), p99: value("p99_us") })
}

/// Bytes through one connection, in GB per second.
pub fn bulk(testbed: &Testbed, pair: &ProxyPair<'_>) -> Result<Figures> {
    let (host, port) = &pair.targets.bulk;
    let (port, seconds) = (port.to_string(), (SECONDS / 2).to_string());
    let mut command = testbed.inside(CLIENT.0, "iperf3");
    let text = host::output(command.args(["-c", host, "-p", &port, "-t", &seconds, "-J"]))?;
    let result: Value = serde_json::from_str(&text)?;
    let bits = result["end"]["sum_received"]["bits_per_second"].as_f64();
    Ok([("bulk", bits.context("no rate in the output of iperf3")? / 8e9)].into())
}
