//! The page, as a browser gets it through `tulle dashboard`.

use std::io::{BufRead as _, BufReader};
use std::process::{Child, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};

use super::says;
use crate::host;
use crate::kubectl::Kube;
use crate::suites::Skip;
use crate::suites::namespace::TestNamespace;

/// Runs a program until its standard input is closed, and for five minutes at most.
pub(super) const UNTIL_CLOSED: &str = "\"$@\" & pid=$!; read -r -t 300 _; kill $pid; wait $pid";

/// A page that `tulle dashboard` has opened.
pub(in crate::suites) struct Page<'a> {
    kube: &'a Kube,
    command: Child,
    /// `http://127.0.0.1:PORT`.
    address: String,
    key: String,
}

/// An answer of the page.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) status: String,
    /// In lower case, one in a line.
    pub(super) headers: String,
    pub(super) body: String,
}

impl<'a> Page<'a> {
    /// Opens it with these arguments of `tulle`.
    pub(in crate::suites) fn open(kube: &'a Kube, arguments: &[&str]) -> Result<Self> {
        Self::open_with(kube, arguments, &[])
    }

    /// The same with these options of `dashboard`.
    pub(in crate::suites) fn open_with(kube: &'a Kube, arguments: &[&str], options: &[&str]) -> Result<Self> {
        let words = kube.tulle_words(&[arguments, &["dashboard", "--port", "0"], options].concat())?;
        let mut command = kube.program("bash")?;
        command.args(["-c", UNTIL_CLOSED, "bash"]).args(words);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut command = command.spawn().context("cannot run bash")?;
        let output = command.stdout.take().context("the command has no standard output")?;
        let mut line = String::new();
        let read = BufReader::new(output).read_line(&mut line);
        let opened = line.trim().split_once("/open?key=");
        let (address, key) = match opened {
            Some((address, key)) => (address.to_owned(), key.to_owned()),
            None => {
                drop(command.stdin.take());
                command.wait()?;
                bail!("tulle dashboard has printed {line:?} instead of an address ({read:?})");
            }
        };
        Ok(Self { kube, command, address, key })
    }

    /// The printed address, which lets a browser in.
    pub(in crate::suites) fn login(&self) -> String {
        format!("{}/open?key={}", self.address, self.key)
    }

    /// What a browser sends as the origin of a form of this page.
    pub(super) fn origin(&self) -> String {
        format!("origin: {}", self.address)
    }

    /// Asks for a path; `more` are arguments of curl.
    pub(super) fn ask(&self, path: &str, more: &[&str]) -> Result<Answer> {
        let mut curl = self.kube.program("curl")?;
        curl.args(["-s", "-i", "-m", "15"]).args(more).arg(format!("{}{path}", self.address));
        let text = host::output_within(&mut curl, Duration::from_secs(30))?;
        let (head, body) = text.split_once("\r\n\r\n").with_context(|| format!("no answer: {text:?}"))?;
        let status = head.split_whitespace().nth(1).unwrap_or("").to_owned();
        Ok(Answer { status, headers: head.to_lowercase(), body: body.to_owned() })
    }

    /// The cookie that the printed address sets, as a browser gets it. The token is not in it.
    pub(super) fn enter(&self) -> Result<String> {
        let opened = self.ask(&format!("/open?key={}", self.key), &[])?;
        ensure!(
            opened.status == "303",
            "the printed address was answered {}: {}",
            opened.status,
            opened.body
        );
        let cookie = opened.headers.lines().find_map(|line| line.strip_prefix("set-cookie: "));
        let cookie = cookie.context("the printed address sets no cookie")?;
        says(cookie, &["tulle-key-", "httponly", "samesite=strict"])?;
        ensure!(!cookie.contains("eyj"), "the cookie has a token: {cookie}");
        ensure!(opened.headers.lines().any(|line| line == "location: /"), "{}", opened.headers);
        let cookie = cookie.split(';').next().unwrap_or_default();
        Ok(cookie.to_owned())
    }

    /// The same cookie with another value.
    fn forged(cookie: &str) -> String {
        let name = cookie.split('=').next().unwrap_or_default();
        format!("{name}=0000000000000000000000000000000000000000000000000000000000000000")
    }
}

impl Drop for Page<'_> {
    fn drop(&mut self) {
        drop(self.command.stdin.take());
        let _ = self.command.wait();
    }
}

pub(super) fn ranks(kube: &Kube) -> Result<()> {
    if !host::is_installed("curl") {
        bail!(Skip("this machine has no curl"));
    }
    let field = TestNamespace::meshed(kube, "t-see-page")?;
    field.service("good", 1, &[])?;
    field.service("bad", 1, &["--errors=30"])?;
    field.load("to-good", "good:80", 40)?;
    field.load("to-bad", "bad:80", 10)?;
    field.apply(json!({"apiVersion": "tulle.dev/v1alpha1", "kind": "Canary", "metadata": {"name": "good"},
        "spec": {"target": {"kind": "Deployment", "name": "good"}, "steps": [{"weight": 50, "hold": "5s"}]}}))?;
    kube.wait_for("the Canary", 60, || Ok(field.get("canary/good", ".status.phase")? == "Stable"))?;
    let page = Page::open(kube, &["-n", &field.namespace])?;
    let cookie = page.enter()?;
    let session = ["-b", cookie.as_str()];
    without_key(&page, &cookie)?;
    ranking(&page, &session)?;
    workload(&page, &session)?;
    rest(&page, &session)?;
    other_namespaces(&page, &session)
}

/// Every page, and the API, needs the key, and the address that the command has printed.
fn without_key(page: &Page<'_>, cookie: &str) -> Result<()> {
    let forged = Page::forged(cookie);
    let nothing: &[&str] = &[];
    let (forged, token): (&[&str], &[&str]) =
        (&["-b", &forged], &["-H", "authorization: Bearer eyJhbGciOiJub25lIn0.e30.x"]);
    let paths = [
        "/",
        "/workload/t-see-page/bad",
        "/canaries",
        "/canary/t-see-page/good",
        "/health",
        "/api/v1/stat?namespace=t-see-page",
        "/open?key=wrong",
    ];
    for path in paths {
        for more in [nothing, forged, token] {
            let answer = page.ask(path, more)?;
            ensure!(answer.status == "403", "{path} without the key: {}", answer.status);
            says(&answer.body, &["tulle dashboard"])?;
            ensure!(!answer.body.contains("to-bad"), "{path} shows who calls: {}", answer.body);
            ensure!(!answer.headers.contains("set-cookie"), "{answer:?}");
            policy(&answer)?;
        }
        // A name of somebody else that points to this machine.
        let rebound = page.ask(path, &["-b", cookie, "-H", "host: evil.example"])?;
        ensure!(rebound.status == "421", "{path} by another name: {}", rebound.status);
        ensure!(!rebound.body.contains("to-bad"), "{path} shows who calls: {}", rebound.body);
    }
    Ok(())
}

/// What protects every page from others.
fn policy(answer: &Answer) -> Result<()> {
    let policy = ["content-security-policy:", "default-src 'none'", "frame-ancestors 'none'"];
    says(&answer.headers, &policy)?;
    says(&answer.headers, &["cache-control: no-store", "referrer-policy: no-referrer"])?;
    ensure!(!answer.headers.contains("unsafe-inline"), "{}", answer.headers);
    Ok(())
}

/// A page with status 200 and the headers of every page.
fn shown(page: &Page<'_>, path: &str, session: &[&str]) -> Result<String> {
    let answer = page.ask(path, session)?;
    ensure!(answer.status == "200", "{path}: {} {}", answer.status, answer.body);
    policy(&answer)?;
    for from in ["src=\"http", "href=\"http", "src=\"//", "href=\"//"] {
        ensure!(!answer.body.contains(from), "{path} loads from elsewhere: {}", answer.body);
    }
    Ok(answer.body)
}

/// The worst comes first, although it has fewer requests.
fn ranking(page: &Page<'_>, session: &[&str]) -> Result<()> {
    let mut last = String::new();
    let waited = page.kube.wait_for("the workload that fails to come first", 60, || {
        last = shown(page, "/", session)?;
        let place = |name: &str| last.find(&format!("/workload/t-see-page/{name}"));
        Ok(place("bad").is_some() && place("good").is_some() && place("bad") < place("good"))
    });
    waited.with_context(|| format!("the page is {last}"))?;
    says(&last, &["tulle", "stat", "<table", "<main"])
}

fn workload(page: &Page<'_>, session: &[&str]) -> Result<()> {
    let body = shown(page, "/workload/t-see-page/bad?window=10m", session)?;
    says(&body, &["t-see-page", "bad", "tulle", "<table"])?;
    // Its caller and its pod.
    let pods = page.kube.pods("t-see-page", "app=bad")?;
    let pod = pods.first().context("bad has no pod")?;
    says(&body, &["to-bad", pod])?;
    let nobody = page.ask("/workload/t-see-page/nobody", session)?;
    ensure!(nobody.status == "404", "a workload that does not exist: {}", nobody.status);
    policy(&nobody)?;
    // Names that a shell would run, or a browser.
    let script = page.ask("/workload/t-see-page/%3Cscript%3Ealert(1)%3C%2Fscript%3E", session)?;
    ensure!(script.status == "404" && !script.body.contains("<script>alert"), "{script:?}");
    let script = page.ask("/?name=%22%3E%3Cscript%3Ealert(1)%3C%2Fscript%3E", session)?;
    ensure!(!script.body.contains("<script>alert"), "{script:?}");
    Ok(())
}

fn rest(page: &Page<'_>, session: &[&str]) -> Result<()> {
    says(&shown(page, "/canaries", session)?, &["/canary/t-see-page/good", "stable"])?;
    says(&shown(page, "/canary/t-see-page/good", session)?, &["good", "stable", "tulle", "canary"])?;
    // Its workload shows the same evidence: none, because nothing was rolled out.
    let parts = ["/canary/t-see-page/good", "No attempt has been counted"];
    says(&shown(page, "/workload/t-see-page/good", session)?, &parts)?;
    says(&shown(page, "/health", session)?, &["Findings", "tulle check", "T0501"])?;
    for asset in ["/assets/page.css", "/assets/page.js"] {
        let answer = page.ask(asset, session)?;
        ensure!(answer.status == "200" && !answer.body.is_empty(), "{asset}: {}", answer.status);
    }
    // Nothing is changed through the page.
    for method in ["POST", "PUT", "DELETE"] {
        let answer = page.ask("/canary/t-see-page/good", &[session, &["-X", method]].concat())?;
        ensure!(answer.status == "405", "{method}: {}", answer.status);
    }
    Ok(())
}

/// The command's token is one of a namespace, at the API and at the page.
fn other_namespaces(page: &Page<'_>, session: &[&str]) -> Result<()> {
    let own = page.ask("/api/v1/stat?namespace=t-see-page&window=600", session)?;
    ensure!(own.status == "200" && own.headers.contains("application/json"), "{own:?}");
    for path in [
        "/api/v1/stat?namespace=kube-system",
        "/api/v1/stat",
        "/api/v1/edges",
        "/api/v1/sidecars",
        "/api/v1/tap?namespace=kube-system",
        "/api/v1/tap",
    ] {
        let answer = page.ask(path, session)?;
        ensure!(answer.status == "403", "{path}: {}", answer.status);
        let refusal: Value = serde_json::from_str(&answer.body)?;
        says(refusal["error"].as_str().unwrap_or(""), &["may not see"])?;
        says(refusal["hint"].as_str().unwrap_or(""), &["tulle-telemetry", "resources: [telemetry]"])?;
    }
    let answer = page.ask("/workload/kube-system/coredns", session)?;
    ensure!(answer.status == "403", "the page of another namespace: {}", answer.status);
    for path in ["/api/v1/stat?namespce=t-see-page", "/api/v1/stat?namespace=t-see-page&window=1"] {
        let answer = page.ask(path, session)?;
        ensure!(answer.status == "400", "{path}: {}", answer.status);
    }
    Ok(())
}
