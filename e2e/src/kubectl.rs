//! kubectl, as the demo and the tests use it.

use std::io::Write as _;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use crate::cluster::Cluster;
use crate::host;

/// No call of kubectl takes longer; one that hangs must not hold a whole run up.
const LIMIT: Duration = Duration::from_secs(300);

/// A cluster that can be asked and told.
pub enum Kube {
    /// The embedded one.
    Embedded(Cluster),
    /// A context of KUBECONFIG.
    Context(String),
}

impl Kube {
    /// kubectl with these arguments.
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

    /// What kubectl prints.
    pub fn run(&self, arguments: &[&str]) -> Result<String> {
        host::output_within(&mut self.command(arguments)?, LIMIT)
    }

    /// Applies manifests; returns what kubectl prints, warnings included.
    pub fn apply(&self, manifests: &str) -> Result<String> {
        let (mut text, warnings) = self.fed(&["apply", "-f", "-"], manifests)?;
        text.push_str(&warnings);
        Ok(text)
    }

    /// Applies manifests as a user who owns their fields; fails where a field has another owner.
    pub fn apply_server_side(&self, manifests: &str) -> Result<()> {
        self.fed(&["apply", "--server-side", "-f", "-"], manifests).map(drop)
    }

    /// Creates objects and returns what kubectl prints about them in the format `output`.
    pub fn create(&self, manifests: &str, output: &str) -> Result<String> {
        Ok(self.fed(&["create", "-o", output, "-f", "-"], manifests)?.0)
    }

    /// What would become of an object at admission, as JSON.
    pub fn dry_run(&self, manifest: &str) -> Result<String> {
        Ok(self.fed(&["create", "--dry-run=server", "-o", "json", "-f", "-"], manifest)?.0)
    }

    /// kubectl with something to read; what it prints on standard output and error.
    fn fed(&self, arguments: &[&str], input: &str) -> Result<(String, String)> {
        let mut command = self.command(arguments)?;
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("cannot run kubectl")?;
        child.stdin.take().context("kubectl's input")?.write_all(input.as_bytes())?;
        let done = child.wait_with_output()?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let (output, error) = (text(&done.stdout), text(&done.stderr));
        if !done.status.success() {
            bail!("kubectl {}: {} {}", arguments.join(" "), output.trim(), error.trim());
        }
        Ok((output, error))
    }

    /// An object, or a list.
    pub fn json(&self, arguments: &[&str]) -> Result<Value> {
        let text = self.run(&[arguments, &["-o", "json"]].concat())?;
        Ok(serde_json::from_str(&text)?)
    }

    /// A field of an object, empty where it is absent.
    pub fn field(&self, namespace: &str, object: &str, path: &str) -> Result<String> {
        self.run(&["-n", namespace, "get", object, "-o", &format!("jsonpath={{{path}}}")])
    }

    /// Waits until a rollout is complete.
    pub fn rolled_out(&self, namespace: &str, workload: &str, seconds: u64) -> Result<()> {
        let limit = format!("--timeout={seconds}s");
        self.run(&["-n", namespace, "rollout", "status", workload, &limit]).map(drop)
    }

    /// Waits until something holds; looks twice a second.
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
            Some(error) => Err(error.context(format!("waited {seconds} s in vain: {what}"))),
            None => bail!("waited {seconds} s in vain: {what}"),
        }
    }
}
