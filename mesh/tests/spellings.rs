//! What real servers make of unusual spellings of a path: whenever one of them takes a spelling for a route, a
//! deny of that route matches it.
//!
//! Starts the servers in `tests/servers` that this machine has on the loopback interface, and sends them the
//! spellings of `tests/spellings.txt` and others that are put together at random. A server that is missing is
//! skipped, with a line on standard error.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that panics has failed")]

use std::fs;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use tulle_mesh::canonical::readings;
use tulle_mesh::policy::{Access, Http, Subject};
use tulle_mesh::proto;

/// The routes of every server, and the rules that deny them.
const ROUTES: [(&str, &str); 4] =
    [("A", "/admin/**"), ("D", "/v1/*:delete"), ("E", "/metrics"), ("P", "/api/v1/*")];

/// What spellings are put together from.
const PIECES: &[&str] = &[
    "/",
    "/",
    "//",
    "admin",
    "%61dmin",
    "x",
    "..",
    "%2e%2e",
    ".",
    "%2F",
    "%5C",
    "\\",
    ";a",
    "%3B",
    "%252F",
    "%252e",
    "%00",
    "%23",
    "%3F",
    "#",
    "%20",
    "h",
    "%C0%AF",
    "v1",
    "y:delete",
    "y%3Adelete",
    "metrics",
    "%FF",
    "%09",
    "@",
    ":",
    ".%2e",
    "api",
    "%2561dmin",
];
const ENDS: &[&str] =
    &["/admin/x", "", "/%61dmin", "%2Fadmin%2Fx", "/v1/y%3Adelete", "/metrics", "/api/v1/x"];

/// A server that is running.
struct Server {
    name: &'static str,
    process: Child,
    port: u16,
    /// Removed at the end.
    folder: Option<PathBuf>,
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        if let Some(folder) = &self.folder {
            let _ = fs::remove_dir_all(folder);
        }
    }
}

#[test]
fn whatever_python_takes_for_a_route_is_denied_as_that_route() {
    check(printing_its_port("python3", &["--version"], "http_server.py"), &["x"]);
}

#[test]
fn whatever_flask_takes_for_a_route_is_denied_as_that_route() {
    check(printing_its_port("python3", &["-c", "import flask"], "flask_app.py"), &["x"]);
}

#[test]
fn whatever_node_takes_for_a_route_is_denied_as_that_route() {
    check(printing_its_port("node", &["--version"], "node.js"), &["x"]);
}

#[test]
fn whatever_go_takes_for_a_route_is_denied_as_that_route() {
    if !has("go", &["version"]) {
        return skipped("go");
    }
    let folder = scratch("go");
    let program = folder.join("server");
    let mut build = Command::new("go");
    build.args(["build", "-o"]).arg(&program).arg("main.go").current_dir(servers());
    build.env("GO111MODULE", "off").env("GOFLAGS", "").env("GOTOOLCHAIN", "local");
    assert!(build.status().unwrap().success(), "go build failed");
    check(started("go", Command::new(program), Some(folder)), &["x"]);
}

#[test]
fn whatever_nginx_takes_for_a_route_is_denied_as_that_route() {
    let Some(program) = ["nginx", "/usr/sbin/nginx"].into_iter().find(|program| has(program, &["-v"])) else {
        return skipped("nginx");
    };
    let folder = scratch("nginx");
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let config = fs::read_to_string(servers().join("nginx.conf")).unwrap();
    let config = config.replace("PREFIX", folder.to_str().unwrap()).replace("PORT", &port.to_string());
    fs::write(folder.join("nginx.conf"), config).unwrap();
    let mut command = Command::new(program);
    command.arg("-e").arg(folder.join("error.log")).arg("-c").arg(folder.join("nginx.conf"));
    let process = command.stdout(Stdio::null()).stderr(Stdio::inherit()).spawn().unwrap();
    let server = Server { name: "nginx", process, port, folder: Some(folder) };
    // The second one is the virtual host that does not merge slashes.
    check(Some(server), &["x", "raw"]);
}

fn servers() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/servers")
}

fn scratch(name: &str) -> PathBuf {
    let folder = std::env::temp_dir().join(format!("tulle-spellings-{name}-{}", std::process::id()));
    fs::create_dir_all(&folder).unwrap();
    folder
}

fn has(program: &str, arguments: &[&str]) -> bool {
    let quiet = Command::new(program).args(arguments).stdout(Stdio::null()).stderr(Stdio::null()).status();
    quiet.is_ok_and(|status| status.success())
}

fn skipped(name: &str) {
    eprintln!("skipped: no {name}");
}

fn printing_its_port(program: &str, test: &[&str], script: &'static str) -> Option<Server> {
    if !has(program, test) {
        skipped(script);
        return None;
    }
    let mut command = Command::new(program);
    command.arg(script).current_dir(servers());
    started(script, command, None)
}

/// Starts a server that prints its port first.
fn started(name: &'static str, mut command: Command, folder: Option<PathBuf>) -> Option<Server> {
    let mut process = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(process.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let port = line.trim().parse().unwrap_or_else(|_| panic!("{name} printed {line:?} instead of its port"));
    Some(Server { name, process, port, folder })
}

/// Sends every spelling to a server, and compares the routes that it took with what is denied.
fn check(server: Option<Server>, hosts: &[&str]) {
    let Some(server) = server else { return };
    let deadline = Instant::now() + Duration::from_secs(10);
    while TcpStream::connect((Ipv4Addr::LOCALHOST, server.port)).is_err() {
        assert!(Instant::now() < deadline, "{} does not listen", server.name);
        std::thread::sleep(Duration::from_millis(20));
    }
    let table = include_str!("spellings.txt").lines().filter(|line| !line.starts_with('#'));
    let mut spellings: Vec<String> =
        table.filter_map(|line| Some(line.split_whitespace().next()?.to_owned())).collect();
    spellings.extend(random_spellings(400));
    let rules = ROUTES.map(|(route, pattern)| (route, denying(pattern)));
    let mut routed = 0;
    for target in &spellings {
        for host in hosts {
            let answer = ask(server.port, host, target);
            for (reader, route) in answer.split(' ').filter_map(|word| word.split_once('=')) {
                let Some((_, rule)) = rules.iter().find(|(name, _)| *name == route) else { continue };
                routed += 1;
                assert!(denies(rule, target), "{} ({reader}) takes {target} for {route}", server.name);
            }
        }
    }
    eprintln!("{}: {routed} routes for {} spellings, all of them denied", server.name, spellings.len());
    let plain = ["/admin/x", "/metrics", "/api/v1/users"];
    for (target, route) in plain.into_iter().zip(["A", "E", "P"]) {
        assert!(ask(server.port, "x", target).contains(&format!("={route}")), "{}: {target}", server.name);
    }
}

fn denying(pattern: &str) -> Access {
    let operation = proto::Operation { paths: vec![pattern.to_owned()], ..Default::default() };
    let rule = proto::Rule { from: vec![], to: vec![operation] };
    Access::compile(&proto::Access { deny: vec![rule], ..Default::default() }).unwrap()
}

fn denies(rule: &Access, target: &str) -> bool {
    let found = readings(target);
    let readings = || &found;
    let http = Some(Http { method: "GET", readings: &readings });
    let address = IpAddr::V4(Ipv4Addr::LOCALHOST);
    !rule.decide(&Subject { identity: None, address, port: 80, http }).allowed
}

/// The body of a 200; otherwise nothing.
fn ask(port: u16, host: &str, target: &str) -> String {
    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let request = format!("GET {target} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = Vec::new();
    // A server that refuses a spelling may reset the connection.
    let _ = stream.read_to_end(&mut answer);
    let answer = String::from_utf8_lossy(&answer).into_owned();
    match answer.split_once("\r\n\r\n") {
        // Node's answer is in chunks: one line with its length, and then the words.
        Some((head, body)) if head.split(' ').nth(1) == Some("200") => body.replace("\r\n", " "),
        _ => String::new(),
    }
}

/// The same on every run (xorshift).
fn random_spellings(count: usize) -> impl Iterator<Item = String> {
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let mut next = move |below: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state % below as u64) as usize
    };
    (0..count).map(move |_| {
        let mut spelling = String::from("/");
        for _ in 0..2 + next(6) {
            spelling.extend(PIECES.get(next(PIECES.len())).copied());
        }
        spelling.extend(ENDS.get(next(ENDS.len())).copied());
        spelling
    })
}
