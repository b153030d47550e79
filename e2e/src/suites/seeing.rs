//! What people see: `tulle`, the operator's query API behind it, and the page.
//!
//! ```text
//!   counted    stat, edges and routes against what the load has counted
//!   rights     what the token of a namespace shows
//!   grpc       the query API over gRPC, as a client reads it that is not ours
//!   explained  explain against what real requests get
//!   behind     explain about a sidecar that takes nothing new
//!   policies   diff against what Shadow counts; lint and inject
//!   checked    check, and the commands that it names
//!   rollout    canary
//!   logs       access logs, as policies ask for them
//!   tap        single requests, with filters and without secrets
//!   page       the page, through tulle dashboard
//!   acts       what the page changes with --allow-actions, and what it does not
//!   leader     (suite operations) the history survives a change of leader
//!   quiet      (suite operations) the commands change nothing
//!   traces     (suite operations) spans at a collector
//! ```

mod acts;
mod behind;
mod checked;
mod counted;
mod explained;
mod grpc;
pub(super) mod leader;
mod logs;
pub(super) mod page;
mod policies;
pub(super) mod quiet;
mod rights;
pub(super) mod rollout;
mod tap;
pub(super) mod traces;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use super::Test;
use super::namespace::{Account, TestNamespace};

pub(super) const TESTS: &[Test] = &[
    ("tulle stat, edges and routes show who talks to whom, how fast and how it fails", counted::who_talks),
    ("tulle stat and edges count refused requests as denied, and as no success", counted::denials),
    (
        "a token of one namespace shows that namespace only, and the refusal names the right to add",
        rights::one_namespace,
    ),
    ("grpcurl gets over gRPC what is answered as JSON, and what is refused is refused", grpc::of_grpcurl),
    ("tulle explain and the sidecar agree", explained::agree),
    (
        "tulle explain doubts a targetPort that no container declares, and knows addresses outside the mesh",
        explained::doubts,
    ),
    ("tulle explain answers by what a sidecar has that takes nothing new", behind::is_explained),
    ("tulle check finds what is broken, and names the command that fixes it", checked::broken),
    (
        "tulle canary promotes, pauses, resumes and aborts, and its status ends with the rollout",
        rollout::actions,
    ),
    ("tulle diff names the edges that a policy would deny, and Shadow counts the same", policies::denied),
    ("tulle lint and inject read manifests without changing anything", policies::manifests),
    ("the page ranks workloads, and needs a token", page::ranks),
    (
        "with --allow-actions the page acts on a Canary for those who may, and without it for nobody",
        acts::on_canaries,
    ),
    ("a policy logs errors, a share or all, and never a query or a credential", logs::of_policies),
    ("tulle tap shows requests by filter, never a credential, and restarts nothing", tap::requests),
];

/// The longest window in which a test's traffic is the only one of its namespace, and which is summed from slots of 10 s.
const WINDOW: &str = "10m";

/// A directory for files of a test, removed with it.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Result<Self> {
        let folder = std::env::temp_dir().join(format!("tulle-{name}-{}", std::process::id()));
        fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
        Ok(Self(folder))
    }

    /// Writes a file; returns its path.
    fn file(&self, name: &str, content: &str) -> Result<String> {
        let path = self.0.join(name);
        fs::write(&path, content).with_context(|| format!("cannot write {}", path.display()))?;
        text(&path)
    }

    /// A path in it that does not exist yet.
    fn path(&self, name: &str) -> Result<String> {
        text(&self.0.join(name))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn text(path: &Path) -> Result<String> {
    Ok(path.to_str().context("the path is not UTF-8")?.to_owned())
}

/// A name for a namespace that no earlier run has used: the operator knows for hours what was counted there.
fn fresh(name: &str) -> String {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    format!("{name}-{:x}", since.as_secs())
}

/// The entry of a list that `wanted` holds for; null where there is none.
fn find(list: &Value, wanted: impl Fn(&Value) -> bool) -> Value {
    list.as_array().into_iter().flatten().find(|entry| wanted(entry)).cloned().unwrap_or(Value::Null)
}

/// The requests of a row or edge.
fn requests(row: &Value) -> u64 {
    row["golden"]["requests"].as_u64().unwrap_or(0)
}

/// The row of `tulle stat` with this name; `by` is such as `workload` or `service`.
fn row(field: &TestNamespace<'_>, by: &str, name: &str) -> Result<Value> {
    let stat = field.kube.tulle_json(&["-n", &field.namespace, "stat", by, "--window", WINDOW])?;
    Ok(find(&stat["rows"], |row| row["party"]["name"] == name))
}

/// Waits until a row has counted, but for a tenth, what load has: nothing else sends to it. Returns the row, and what the
/// load had counted just before.
fn agrees(field: &TestNamespace<'_>, load: &str, by: &str, name: &str) -> Result<(Value, Account)> {
    let mut seen = None;
    // Sidecars report every five seconds, which is more than a tenth of what they have counted in the first minute.
    let waited = field.kube.wait_for(&format!("{by} {name} to have what the load has counted"), 120, || {
        let before = field.account(load)?;
        let found = row(field, by, name)?;
        let after = field.account(load)?;
        let counted = requests(&found);
        // The load prints once in a second what it has sent, so that a part of it is not printed yet.
        let agrees = counted * 10 >= before.ended * 9 && counted * 10 <= after.sent * 11;
        let enough = before.ended > 300;
        seen = Some((found, before));
        Ok(agrees && enough)
    });
    waited.with_context(|| format!("last seen: {seen:?}"))?;
    seen.context("nothing was seen")
}

/// Waits until all sidecars enforce a policy.
fn enforced(field: &TestNamespace<'_>, policy: &str) -> Result<()> {
    let object = format!("meshpolicy/{policy}");
    field.kube.wait_for(&format!("{policy} to be enforced"), 60, || {
        let generation = field.get(&object, ".metadata.generation")?;
        let ready =
            |part: &str| field.get(&object, &format!(".status.conditions[?(@.type==\"Ready\")].{part}"));
        Ok(ready("status")? == "True" && ready("observedGeneration")? == generation)
    })
}

/// Fails unless a text has all these parts.
fn says(text: &str, parts: &[&str]) -> Result<()> {
    for part in parts {
        ensure!(text.contains(part), "no {part:?} in:\n{text}");
    }
    Ok(())
}
