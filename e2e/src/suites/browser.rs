//! The page in a real Chromium: what `e2e/browser/page.mjs` looks at, of a mesh with traffic and of a large one.
//!
//! In: Debian's Chromium and Node, and two packages that `e2e/browser/package-lock.json` pins, kept outside the clone.
//! Out: screenshots of every view in `screenshots` below cargo's target directory. The page runs in the cluster's network,
//! and the browser in one of its own (`e2e/browser/apart.mjs`): pods that start beside it would stop what it loads.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};

use super::namespace::TestNamespace;
use super::seeing::page::Page;
use super::seeing::rollout::{deploy, flows, phase, reaches};
use super::{Skip, Test};
use crate::build::cargo;
use crate::host;
use crate::images;
use crate::kubectl::Kube;
use crate::progress::say;

pub(super) const TESTS: &[Test] = &[
    (
        "every view of the page works in a browser: accessible, by keyboard, without a script, light and dark",
        on_cluster,
    ),
    ("a browser shows two thousand workloads at once, and whatever a view can say", many_workloads),
];

/// Programs, and the Debian packages that contain them.
const PROGRAMS: &[(&str, &str)] = &[(CHROMIUM, "chromium"), ("node", "nodejs"), ("npm", "npm")];
const CHROMIUM: &str = "/usr/bin/chromium";

/// For how many seconds the browser looks at most. Other tests keep the machine busy meanwhile.
const SECONDS: u64 = 280;

/// Workloads of the large mesh.
const WORKLOADS: u64 = 2_000;

/// Installs the browser, its driver and axe, and compiles the page of the large mesh.
pub(super) fn prepare() -> Result<()> {
    host::install_packages(PROGRAMS)?;
    modules()?;
    large_mesh().map(drop)
}

/// The folder whose `node_modules` has what the lock file pins. Outside the clone: named after its content.
fn modules() -> Result<PathBuf> {
    let files = ["package.json", "package-lock.json"].map(|file| source().join(file));
    let paths: Vec<&Path> = files.iter().map(PathBuf::as_path).collect();
    let folder = host::cache()?.join(format!("browser-{}", host::content_key(&paths, "")?));
    if folder.is_dir() {
        return Ok(folder);
    }
    let half = folder.with_extension(format!("{}.half", std::process::id()));
    fs::create_dir_all(&half).with_context(|| format!("cannot create {}", half.display()))?;
    for file in &paths {
        let name = file.file_name().context("the file has no name")?;
        fs::copy(file, half.join(name)).with_context(|| format!("cannot copy {}", file.display()))?;
    }
    let mut npm = Command::new("npm");
    npm.current_dir(&half).args(["ci", "--ignore-scripts", "--no-audit", "--no-fund"]);
    host::output_within(&mut npm, Duration::from_secs(300))?;
    if let Err(error) = fs::rename(&half, &folder) {
        // Another run may have been faster.
        ensure!(folder.is_dir(), "cannot create {}: {error}", folder.display());
        fs::remove_dir_all(&half)?;
    }
    Ok(folder)
}

fn source() -> PathBuf {
    host::workspace().join("e2e/browser")
}

/// Compiles the program that serves the page of a mesh without a cluster.
fn large_mesh() -> Result<PathBuf> {
    // The same selection of packages as for the tests, so that cargo compiles nothing again.
    let of = ["--locked", "--workspace", "--exclude", "tulle-e2e", "--example", "page"];
    cargo("compiling the page of a large mesh", &[&["build"][..], &of].concat())?;
    Ok(images::target()?.join("debug/examples/page"))
}

/// Skips a test where the browser cannot be had.
fn needs_browser(kube: &Kube) -> Result<()> {
    let missing = PROGRAMS.iter().any(|(program, _)| !host::is_installed(program));
    if matches!(kube, Kube::Context(_)) && missing {
        bail!(Skip("this machine has no Chromium, Node or npm"));
    }
    prepare()
}

fn on_cluster(kube: &Kube) -> Result<()> {
    needs_browser(kube)?;
    let field = TestNamespace::meshed(kube, "t-browser")?;
    field.service("good", 1, &[])?;
    field.service("bad", 1, &["--errors=30"])?;
    field.load("to-good", "good:80", 20)?;
    field.load("to-bad", "bad:80", 10)?;
    field.apply(json!({"apiVersion": "tulle.dev/v1alpha1", "kind": "Canary", "metadata": {"name": "good"},
        "spec": {"target": {"kind": "Deployment", "name": "good"}, "steps": [{"weight": 50, "hold": "5s"}]}}))?;
    field.apply(json!({"apiVersion": "tulle.dev/v1alpha1", "kind": "MeshPolicy", "metadata": {"name": "bad"},
        "spec": {"target": {"kind": "Workload", "selector": {"matchLabels": {"app": "bad"}}}, "mtls": "Strict"}}))?;
    kube.wait_for("the Canary", 60, || Ok(field.get("canary/good", ".status.phase")? == "Stable"))?;
    kube.wait_for("failures to be counted", 60, || {
        let stat = kube.tulle_json(&["-n", &field.namespace, "stat", "workload", "--window", "10m"])?;
        let failures = |name: &str| {
            let mut rows = stat["rows"].as_array().into_iter().flatten();
            rows.find(|row| row["party"]["name"] == name).and_then(|row| row["golden"]["failures"].as_u64())
        };
        Ok(failures("bad") > Some(0) && failures("good").is_some())
    })?;
    let page = Page::open(kube, &["-n", &field.namespace])?;
    let paths = [
        "/?window=10m",
        "/workload/t-browser/bad?window=10m",
        "/workload/t-browser/good?window=10m",
        "/canaries",
        "/canary/t-browser/good",
        "/health",
    ];
    look(kube, "cluster", &page.login(), &["--filter", "bad"], &paths)?;
    acts(&field)
}

/// The buttons of a Canary whose rollout is at its first step, pressed by keyboard.
fn acts(field: &TestNamespace<'_>) -> Result<()> {
    field.service("web", 2, &["--version=v1"])?;
    field.load("to-web", "web:80", 20)?;
    field.apply(json!({"apiVersion": "tulle.dev/v1alpha1", "kind": "Canary", "metadata": {"name": "web"},
        "spec": {"target": {"kind": "Deployment", "name": "web"}, "steps": [{"weight": 20, "hold": "600s"}]}}))?;
    reaches(field, "Stable")?;
    deploy(field, "v2")?;
    flows(field, "20%")?;
    let page = Page::open_with(field.kube, &["-n", &field.namespace], &["--allow-actions"])?;
    let paths = ["/canary/t-browser/web", "/canary/t-browser/web/pause"];
    look(field.kube, "actions", &page.login(), &["--pause", "/canary/t-browser/web"], &paths)?;
    ensure!(phase(field)? == "Paused", "the browser has paused the rollout, but it is {}", phase(field)?);
    Ok(())
}

fn many_workloads(kube: &Kube) -> Result<()> {
    needs_browser(kube)?;
    let mesh = LargeMesh::start(kube)?;
    let paths = [
        "/?namespace=shop&name=&window=10m",
        "/?namespace=nowhere&name=",
        "/workload/shop/checkout?window=10m",
        "/workload/shop/orders?window=1m",
        "/workload/shop/reports",
        "!/workload/shop/nobody",
        "/canaries",
        "/canary/shop/checkout",
        "/canary/shop/cart",
        "/canary/shop/checkout/promote",
        "/canary/shop/cart/pause",
        "/health",
    ];
    // As `tulle dashboard --allow-actions` sends them. Nobody takes a form here.
    let may = ["--header", "tulle-may: canary-actions", "--header", "tulle-form-token: none"];
    let more = ["--token", &mesh.token, "--paint", "/", "--filter", "service-0013"];
    let more = [&more[..], &may].concat();
    let seen = look(kube, "large", &mesh.login, &more, &paths)?;
    let paint = &seen["paint"];
    let number = |name: &str| paint[name].as_u64();
    ensure!(number("rows") >= Some(WORKLOADS), "not every workload is shown: {paint}");
    // The goal is one second. It is printed only: the machine is busy with other tests, and the operator's code is not
    // optimised here.
    let first = number("firstPaintMs").with_context(|| format!("nothing was painted: {paint}"))?;
    say(&format!(
        "browser: {} rows, {} KB: the answer after {} ms, the first paint after {first} ms",
        number("rows").unwrap_or_default(),
        number("bytes").unwrap_or_default() / 1_000,
        number("answerMs").unwrap_or_default(),
    ));
    Ok(())
}

/// The page of a mesh that does not exist, served until this is dropped.
struct LargeMesh {
    program: Child,
    login: String,
    /// What each request carries: `tulle dashboard` adds it where there is a cluster.
    token: String,
}

impl LargeMesh {
    fn start(kube: &Kube) -> Result<Self> {
        let program = large_mesh()?.display().to_string();
        let mut command = kube.program(&program)?;
        command.arg(WORKLOADS.to_string()).stdin(Stdio::piped()).stdout(Stdio::piped());
        let program = command.spawn().with_context(|| format!("cannot run {program}"))?;
        let mut mesh = Self { program, login: String::new(), token: String::new() };
        let output = mesh.program.stdout.take().context("the program has no standard output")?;
        let mut line = String::new();
        BufReader::new(output).read_line(&mut line)?;
        let printed = line.trim().split_once(' ').with_context(|| format!("it has printed {line:?}"))?;
        (mesh.login, mesh.token) = (printed.0.to_owned(), printed.1.to_owned());
        Ok(mesh)
    }
}

impl Drop for LargeMesh {
    fn drop(&mut self) {
        // It ends with its standard input.
        drop(self.program.stdin.take());
        let _ = self.program.wait();
    }
}

/// Looks at views with the browser. Fails unless it finds nothing wrong; returns what it has measured.
fn look(kube: &Kube, name: &str, login: &str, more: &[&str], paths: &[&str]) -> Result<Value> {
    let shots = images::target()?.join("screenshots").join(name);
    if shots.exists() {
        fs::remove_dir_all(&shots).with_context(|| format!("cannot remove {}", shots.display()))?;
    }
    // The browser may be in other namespaces than this process, so that only a program beside it can end both.
    let mut command = kube.program("timeout")?;
    // A network of its own takes root's rights, which are there where the cluster is the embedded one.
    let script = if matches!(kube, Kube::Context(_)) { "page.mjs" } else { "apart.mjs" };
    command.args(["--kill-after=10", &SECONDS.to_string(), "node"]).arg(source().join(script));
    command.args(["--login", login, "--browser", CHROMIUM]).arg("--shots").arg(&shots);
    command.arg("--modules").arg(modules()?).args(more).arg("--").args(paths);
    let ended = host::ended_within(&mut command, Duration::from_secs(SECONDS + 30))?;
    let seen: Value = serde_json::from_str(&ended.stdout)
        .with_context(|| format!("the browser's program: {}\n{}", ended.status, ended.stderr.trim_end()))?;
    say(&format!("browser: screenshots are in {}", shots.display()));
    let problems: Vec<&str> =
        seen["problems"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    ensure!(
        seen["failed"].is_null(),
        "{}\n{}\n{}",
        seen["failed"],
        ended.stderr.trim_end(),
        problems.join("\n")
    );
    ensure!(problems.is_empty(), "{} problems:\n{}", problems.len(), problems.join("\n"));
    let looked = seen["views"].as_object().map_or(0, serde_json::Map::len);
    ensure!(looked == paths.len(), "the browser has looked at {looked} views of {}", paths.len());
    Ok(seen)
}
