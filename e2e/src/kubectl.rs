//! Runs kubectl for the demo and the tests.

use std::io::Write as _;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use crate::cluster::{self, Cluster};
use crate::host::{self, Ended};

/// Time limit of a call of kubectl, so that one that hangs does not block the whole run.
const LIMIT: Duration = Duration::from_secs(300);

/// A cluster.
pub enum Kube {
    /// The embedded cluster.
    Embedded(Cluster),
    /// The cluster of a context of KUBECONFIG.
    Context(String),
}

impl Kube {
    /// A kubectl command with these arguments.
    pub fn command(&self, arguments: &[&str]) -> Result<Command> {
        let mut command = match self {
            Self::Embedded(cluster) => cluster.kubectl()?,
            Self::Context(name) => {
                let mut command = Command::new("kubectl");
                command.args(["--context", name]);
                command
            }
        };
        command.args(arguments);
        Ok(command)
    }

    /// Program and arguments of a call of kubectl, for a program that runs where [`Self::program`] runs them.
    pub fn words(&self, arguments: &[&str]) -> Result<Vec<String>> {
        let mut words = match self {
            Self::Embedded(_) => vec![cluster::binary()?.display().to_string(), "kubectl".to_owned()],
            Self::Context(name) => ["kubectl", "--context", name].map(str::to_owned).to_vec(),
        };
        words.extend(arguments.iter().map(|argument| (*argument).to_owned()));
        Ok(words)
    }

    /// Runs kubectl and returns its standard output.
    pub fn run(&self, arguments: &[&str]) -> Result<String> {
        host::output_within(&mut self.command(arguments)?, LIMIT)
    }

    /// Applies manifests; returns the output of kubectl, including warnings.
    pub fn apply(&self, manifests: &str) -> Result<String> {
        let (mut text, warnings) = self.run_with_input(&["apply", "-f", "-"], manifests)?;
        text.push_str(&warnings);
        Ok(text)
    }

    /// Applies manifests as a user who owns their fields; fails where a field has another owner.
    pub fn apply_server_side(&self, manifests: &str) -> Result<()> {
        self.run_with_input(&["apply", "--server-side", "-f", "-"], manifests).map(drop)
    }

    /// Creates objects and returns what kubectl prints about them in the format `output`.
    pub fn create(&self, manifests: &str, output: &str) -> Result<String> {
        Ok(self.run_with_input(&["create", "-o", output, "-f", "-"], manifests)?.0)
    }

    /// The object after admission, as JSON, without creating it.
    pub fn dry_run(&self, manifest: &str) -> Result<String> {
        Ok(self.run_with_input(&["create", "--dry-run=server", "-o", "json", "-f", "-"], manifest)?.0)
    }

    /// The warnings that creating an object would print.
    pub fn warnings(&self, manifest: &str) -> Result<String> {
        Ok(self.run_with_input(&["create", "--dry-run=server", "-f", "-"], manifest)?.1)
    }

    /// What a server-side apply of manifests would change, as `kubectl diff` prints it; empty: nothing.
    pub fn differences(&self, manifests: &str) -> Result<String> {
        let file = host::cache()?.join("compared.yaml");
        host::write(&file, manifests)?;
        let mut command = self.command(&["diff", "--server-side", "--force-conflicts", "-f"])?;
        let Ended { status, stdout, stderr } = host::ended_within(command.arg(&file), LIMIT)?;
        match status.code() {
            Some(0) => Ok(String::new()),
            Some(1) => Ok(stdout),
            _ => bail!("kubectl diff: {status} {stderr}"),
        }
    }

    /// Runs kubectl with standard input; returns its standard output and error.
    fn run_with_input(&self, arguments: &[&str], input: &str) -> Result<(String, String)> {
        let mut command = self.command(arguments)?;
        command.arg("--request-timeout=60s");
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("cannot run kubectl")?;
        child.stdin.take().context("kubectl has no standard input")?.write_all(input.as_bytes())?;
        let done = child.wait_with_output()?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let (output, error) = (text(&done.stdout), text(&done.stderr));
        if !done.status.success() {
            bail!("kubectl {}: {} {}", arguments.join(" "), output.trim(), error.trim());
        }
        Ok((output, error))
    }

    /// Runs kubectl with `-o json` and parses its output.
    pub fn json(&self, arguments: &[&str]) -> Result<Value> {
        let text = self.run(&[arguments, &["-o", "json"]].concat())?;
        Ok(serde_json::from_str(&text)?)
    }

    /// A field of an object, empty where it is absent.
    pub fn field(&self, namespace: &str, object: &str, path: &str) -> Result<String> {
        self.run(&["-n", namespace, "get", object, "-o", &format!("jsonpath={{{path}}}")])
    }

    /// The sum of the metrics of a pod's sidecar whose name and labels contain all of `parts`.
    pub fn metric(&self, namespace: &str, pod: &str, parts: &[&str]) -> Result<u64> {
        let path = format!("/api/v1/namespaces/{namespace}/pods/{pod}:26152/proxy/metrics");
        let metrics = self.run(&["get", "--raw", &path])?;
        let samples = metrics.lines().filter(|line| !line.starts_with('#'));
        let wanted = samples.filter(|line| parts.iter().all(|part| line.contains(part)));
        Ok(wanted.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum::<f64>() as u64)
    }

    /// The names of the pods with a label, such as `app=web`.
    pub fn pods(&self, namespace: &str, label: &str) -> Result<Vec<String>> {
        let names = ["-n", namespace, "get", "pods", "-l", label, "-o", "jsonpath={.items[*].metadata.name}"];
        Ok(self.run(&names)?.split_whitespace().map(str::to_owned).collect())
    }

    /// Waits until a rollout is complete.
    pub fn rolled_out(&self, namespace: &str, workload: &str, seconds: u64) -> Result<()> {
        let limit = format!("--timeout={seconds}s");
        self.run(&["-n", namespace, "rollout", "status", workload, &limit]).map(drop)
    }

    /// Waits until `holds` returns true, and calls it twice per second; `what` completes "waiting for".
    pub fn wait_for(&self, what: &str, seconds: u64, mut holds: impl FnMut() -> Result<bool>) -> Result<()> {
        let start = Instant::now();
        let mut last = None;
        while start.elapsed() < Duration::from_secs(seconds) {
            match holds() {
                Ok(true) => return Ok(()),
                Ok(false) => last = None,
                Err(error) => last = Some(error),
            }
            thread::sleep(Duration::from_millis(500));
        }
        match last {
            Some(error) => Err(error.context(format!("timed out after {seconds} s waiting for {what}"))),
            None => bail!("timed out after {seconds} s waiting for {what}"),
        }
    }
}
