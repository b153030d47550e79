//! The load generator: sends requests at a fixed rate, independent of response times, and counts the outcomes.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::rc::Rc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::Request;
use hyper::client::conn::http1::SendRequest;
use hyper::header::{HeaderMap, SET_COOKIE};
use hyper_util::rt::TokioIo;
use serde_json::json;
use tokio::net::TcpStream;
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::{LocalSet, spawn_local};
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};

/// Sends requests at a fixed rate and counts the responses.
#[derive(clap::Parser)]
pub struct Load {
    /// `host:port` of the service.
    #[arg(long)]
    target: String,
    /// Requests per second.
    #[arg(long, default_value_t = 100)]
    rate: u64,
    /// Stops after this many seconds; 0 means at SIGTERM.
    #[arg(long, default_value_t = 0)]
    seconds: u64,
    /// Every n-th request is a POST with a body; 0 means none.
    #[arg(long, default_value_t = 4)]
    post_every: u64,
    /// Accepts any response body, for servers other than the shop.
    #[arg(long)]
    any_body: bool,
    /// Seconds after which a request is counted as failed.
    #[arg(long, default_value_t = 30)]
    timeout: u64,
    /// Header of every request, as `name: value`. May be repeated.
    #[arg(long = "header", value_parser = header)]
    headers: Vec<(String, String)>,
    /// Number of users who send the requests in turn. Each keeps the cookies that responses set, and waits for its
    /// response before it sends again. 0 means that nobody keeps cookies.
    #[arg(long, default_value_t = 0)]
    users: usize,
}

fn unix_time() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

fn header(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once(':').ok_or("a header is written as `name: value`")?;
    Ok((name.trim().to_owned(), value.trim().to_owned()))
}

/// Changes of the version that are kept of a user.
const MOVES: usize = 8;

/// Somebody who keeps cookies.
#[derive(Default)]
struct User {
    cookies: BTreeMap<String, String>,
    /// The version of the last response.
    version: Option<String>,
    /// The versions of earlier responses.
    left: BTreeSet<String>,
    /// Each change of the version: when, which pod answered, and the cookies then.
    moves: Vec<String>,
}

impl User {
    /// The value of header `cookie`; `None` without cookies.
    fn cookie(&self) -> Option<String> {
        let pairs: Vec<String> = self.cookies.iter().map(|(name, value)| format!("{name}={value}")).collect();
        (!pairs.is_empty()).then(|| pairs.join("; "))
    }

    /// Keeps the cookies that a response sets; returns their number.
    fn keep(&mut self, headers: &HeaderMap) -> u64 {
        let mut set = 0;
        for value in headers.get_all(SET_COOKIE).iter().filter_map(|value| value.to_str().ok()) {
            let pair = value.split(';').next().unwrap_or("");
            if let Some((name, value)) = pair.split_once('=') {
                self.cookies.insert(name.trim().to_owned(), value.trim().to_owned());
                set += 1;
            }
        }
        set
    }

    /// Takes a response's version over; returns whether the user comes back to a version that was left before.
    fn meet(&mut self, version: &str, pod: &str, number: u64) -> bool {
        if self.version.as_deref() == Some(version) {
            return false;
        }
        self.left.extend(self.version.replace(version.to_owned()));
        if self.moves.len() < MOVES {
            let cookies = self.cookie().unwrap_or_default();
            let at = unix_time().as_secs();
            self.moves.push(format!("{at}: request {number}, {version} in {pod}, {cookies}"));
        }
        self.left.contains(version)
    }
}

/// Counts of the requests by outcome.
#[derive(Default)]
struct Counts {
    sent: u64,
    ok: u64,
    failed: u64,
    /// Responses by version of the service.
    versions: BTreeMap<String, u64>,
    /// Users who came back to a version that they had left before.
    returned: u64,
    /// The moves of the first of them.
    first_return: Vec<String>,
    /// Cookies that were set.
    cookies: u64,
    /// Failures by error text.
    failures: BTreeMap<String, u64>,
    /// The first failures: when each was, and on which connection.
    lost: Vec<String>,
    micros: Vec<u32>,
}

/// What is kept of an answer.
#[derive(Default)]
struct Answer {
    version: String,
    pod: String,
    /// Cookies that it sets.
    cookies: u64,
}

/// A connection that carries requests, one after another.
struct Connection {
    sender: SendRequest<Full<Bytes>>,
    opened: Instant,
    local_port: u16,
    requests: u32,
}

/// Failures that are told one by one.
const LOST: usize = 20;

impl Load {
    /// Sends requests, and prints the counts once per second as a line of JSON.
    pub async fn run(self) -> anyhow::Result<()> {
        LocalSet::new().run_until(self.send()).await
    }

    async fn send(self) -> anyhow::Result<()> {
        let load = Rc::new(self);
        let counts = Rc::new(RefCell::new(Counts::default()));
        let idle: Rc<RefCell<Vec<Connection>>> = Rc::default();
        let users: VecDeque<User> = (0..load.users).map(|_| User::default()).collect();
        let users = Rc::new(RefCell::new(users));
        let mut ticks = interval(Duration::from_secs(1) / u32::try_from(load.rate.max(1))?);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Burst);
        let mut print = interval(Duration::from_secs(1));
        let mut terminate = signal(SignalKind::terminate())?;
        let end = Instant::now() + Duration::from_secs(if load.seconds == 0 { 86_400 } else { load.seconds });
        while Instant::now() < end {
            tokio::select! {
                scheduled = ticks.tick() => {
                    // The latency of a late request counts from its scheduled time, so that a stall is not hidden
                    // (coordinated omission). The timer's resolution of a millisecond does not count as late.
                    let late = scheduled.elapsed() > Duration::from_millis(2);
                    let since = if late { scheduled } else { Instant::now() };
                    let (load, counts, idle) = (Rc::clone(&load), Rc::clone(&counts), Rc::clone(&idle));
                    let users = Rc::clone(&users);
                    spawn_local(async move {
                        // While all wait for responses, one more comes.
                        let mut user = users.borrow_mut().pop_front().unwrap_or_default();
                        load.send_one(since, &counts, &idle, &mut user).await;
                        if load.users > 0 {
                            users.borrow_mut().push_back(user);
                        }
                    });
                }
                _ = print.tick() => println!("{}", counts.borrow().line()),
                _ = terminate.recv() => break,
            }
        }
        let waiting = Instant::now();
        while counts.borrow().in_flight() > 0 && waiting.elapsed() < Duration::from_secs(load.timeout) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        println!("{}", counts.borrow().line());
        Ok(())
    }

    async fn send_one(
        &self,
        since: Instant,
        counts: &RefCell<Counts>,
        idle: &RefCell<Vec<Connection>>,
        user: &mut User,
    ) {
        let number = {
            let mut counts = counts.borrow_mut();
            counts.sent += 1;
            counts.sent
        };
        let outcome = timeout(Duration::from_secs(self.timeout), self.exchange(number, idle, user)).await;
        let mut counts = counts.borrow_mut();
        counts.micros.push(u32::try_from(since.elapsed().as_micros()).unwrap_or(u32::MAX));
        match outcome.unwrap_or_else(|_| Err(anyhow::anyhow!("no response within the timeout"))) {
            Ok(Answer { version, pod, cookies }) => {
                counts.ok += 1;
                counts.cookies += cookies;
                if user.meet(&version, &pod, number) {
                    if counts.first_return.is_empty() {
                        counts.first_return = user.moves.clone();
                    }
                    counts.returned += 1;
                }
                *counts.versions.entry(version).or_default() += 1;
            }
            Err(error) => {
                counts.failed += 1;
                if counts.lost.len() < LOST {
                    counts.lost.push(format!("{}: request {number}: {error:#}", unix_time().as_millis()));
                }
                *counts.failures.entry(error.root_cause().to_string()).or_default() += 1;
            }
        }
    }

    /// One request.
    async fn exchange(
        &self,
        number: u64,
        idle: &RefCell<Vec<Connection>>,
        user: &mut User,
    ) -> anyhow::Result<Answer> {
        let kept = idle.borrow_mut().pop();
        let mut connection = match kept {
            Some(connection) if connection.sender.is_ready() => connection,
            _ => self.connect().await?,
        };
        connection.requests += 1;
        let post = self.post_every > 0 && number.is_multiple_of(self.post_every);
        let body = if post { Bytes::from(vec![b'x'; 2000]) } else { Bytes::new() };
        let mut request = Request::builder()
            .method(if post { "POST" } else { "GET" })
            .uri(format!("/?sequence={number}"))
            .header("host", &self.target);
        for (name, value) in &self.headers {
            request = request.header(name, value);
        }
        if let Some(cookie) = user.cookie() {
            request = request.header("cookie", cookie);
        }
        let request = request.body(Full::new(body))?;
        let response = match connection.sender.send_request(request).await {
            Ok(response) => response,
            Err(error) => return Err(anyhow::Error::new(error).context(connection.describe())),
        };
        let status = response.status();
        let cookies = user.keep(response.headers());
        let body = response.into_body().collect().await?.to_bytes();
        connection.sender.ready().await.ok();
        if connection.sender.is_ready() {
            idle.borrow_mut().push(connection);
        }
        if self.any_body && status.is_success() {
            return Ok(Answer { cookies, ..Answer::default() });
        }
        let text = String::from_utf8_lossy(&body);
        anyhow::ensure!(status.is_success(), "{status} {}", text.chars().take(80).collect::<String>().trim());
        let answer: serde_json::Value = serde_json::from_slice(&body)?;
        let field = |name: &str| answer.get(name).and_then(|v| v.as_str()).unwrap_or("").to_owned();
        Ok(Answer { version: field("version"), pod: field("pod"), cookies })
    }

    async fn connect(&self) -> anyhow::Result<Connection> {
        let stream = TcpStream::connect(&self.target).await?;
        stream.set_nodelay(true)?;
        let local_port = stream.local_addr()?.port();
        let (sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        tokio::spawn(connection);
        Ok(Connection { sender, opened: Instant::now(), local_port, requests: 0 })
    }
}

impl Connection {
    /// What tells a connection that was closed while it was idle from one that never carried anything.
    fn describe(&self) -> String {
        let (requests, age) = (self.requests, self.opened.elapsed().as_millis());
        format!(
            "request {requests} of a connection from port {}, {age} ms after its opening",
            self.local_port
        )
    }
}

impl Counts {
    fn in_flight(&self) -> u64 {
        self.sent - self.ok - self.failed
    }

    fn line(&self) -> serde_json::Value {
        let mut sorted = self.micros.clone();
        sorted.sort_unstable();
        let quantile = |q: usize| sorted.get(sorted.len() * q / 1000).copied().unwrap_or(0);
        json!({
            "sent": self.sent, "ok": self.ok, "failed": self.failed, "versions": self.versions,
            "failures": self.failures, "returned": self.returned,
            "lost": self.lost, "first_return": self.first_return, "cookies": self.cookies, "p50_us": quantile(500), "p99_us": quantile(990),
        })
    }
}
