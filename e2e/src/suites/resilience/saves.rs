//! Requests that are saved from pods that fail.

use std::thread;
use std::time::Duration;

use anyhow::{Result, ensure};
use serde_json::json;

use super::{member, ready_policy};
use crate::kubectl::Kube;
use crate::suites::namespace::TestNamespace;

/// Requests per second. They are GETs, because a POST that an application has answered is not repeated.
const RATE: u32 = 100;
const GETS: [&str; 1] = ["--post-every=0"];

/// Events of a kind at the load's sidecar.
fn events(field: &TestNamespace<'_>, kind: &str) -> Result<u64> {
    let kind = format!("kind=\"{kind}\"");
    field.pods("load")?.iter().map(|pod| field.metric(pod, &["tulle_events_total{", &kind])).sum()
}

pub(super) fn retries(kube: &Kube) -> Result<()> {
    let field = TestNamespace::meshed(kube, "t-s-retry")?;
    member(&field, "web", "good", 2, &[])?;
    member(&field, "web", "bad", 1, &["--errors=100", "--status=503"])?;
    field.load_with("load", "web:80", RATE, &GETS)?;
    kube.wait_for("requests to fail without a policy", 60, || Ok(field.account("load")?.failed > 3))?;
    // In turn, so that the bad pod gets its third however it has answered before.
    let sections =
        json!({"retry": {"on": ["5xx"], "attempts": 2, "budget": "100%"}, "balance": {"by": "RoundRobin"}});
    ready_policy(&field, "web", sections)?;
    kube.wait_for("the retries to begin", 60, || {
        let before = field.account("load")?;
        thread::sleep(Duration::from_secs(2));
        let after = field.account("load")?;
        Ok(after.ended > before.ended && after.failed == before.failed)
    })?;
    let bad = field.received("bad")?;
    let (retried, refused) = (events(&field, "retry")?, events(&field, "retry_refused")?);
    let (failed, why) = field.failed_during("load", || {
        thread::sleep(Duration::from_secs(10));
        Ok(())
    })?;
    let bad = field.received("bad")? - bad;
    let (retried, refused) = (events(&field, "retry")? - retried, events(&field, "retry_refused")? - refused);
    ensure!(bad > 50, "only {bad} requests reached the bad pod: the test proves nothing");
    // A budget saves ten retries at most. On a busy machine the load catches up with more requests than that at once.
    ensure!(
        failed <= refused && refused * 20 <= bad,
        "{failed} requests failed although {bad} attempts at the bad pod could be retried, but for {refused} that the \
         budget refused: {why}"
    );
    ensure!(retried >= bad / 2, "{bad} attempts failed, and the metrics count {retried} retries");
    Ok(())
}

pub(super) fn budget(kube: &Kube) -> Result<()> {
    let field = TestNamespace::meshed(kube, "t-s-budget")?;
    field.service("web", 2, &["--errors=100", "--status=503"])?;
    ready_policy(&field, "web", json!({"retry": {"on": ["5xx"], "attempts": 2, "budget": "20%"}}))?;
    field.load_with("load", "web:80", RATE / 2, &GETS)?;
    thread::sleep(Duration::from_secs(3));
    let (sent, received) = (field.account("load")?.sent, field.received("web")?);
    thread::sleep(Duration::from_secs(20));
    let (sent, received) = (field.account("load")?.sent - sent, field.received("web")? - received);
    // The counts are read one after the other, while some fifty requests a second go on.
    ensure!(
        received > sent && received * 100 <= sent * 125 + 10_000,
        "the application received {received} requests for {sent} that were sent, with a budget of 20 %"
    );
    Ok(())
}

pub(super) fn breaker(kube: &Kube) -> Result<()> {
    let field = TestNamespace::meshed(kube, "t-s-breaker")?;
    member(&field, "web", "good", 3, &[])?;
    member(&field, "web", "bad", 1, &["--errors=100"])?;
    field.load_with("load", "web:80", RATE, &GETS)?;
    // In turn, so that only the breaker keeps requests from the bad pod.
    ready_policy(&field, "web", json!({"balance": {"by": "RoundRobin"}}))?;
    let bad = || field.received("bad");
    // Requests at the bad pod, and all that were sent.
    let during = |seconds: u64| -> Result<(u64, u64)> {
        let (before, sent) = (bad()?, field.account("load")?.sent);
        thread::sleep(Duration::from_secs(seconds));
        Ok((bad()? - before, field.account("load")?.sent - sent))
    };
    let (share, sent) = during(6)?;
    // Half of the quarter: the load prints once in a second what it has sent.
    ensure!(share * 8 > sent, "without a breaker {share} of {sent} requests reached the bad pod");
    let sections =
        json!({"balance": {"by": "RoundRobin"}, "breaker": {"consecutiveFailures": 3, "ejectFor": "300s"}});
    ready_policy(&field, "web", sections)?;
    kube.wait_for("the bad pod to be ejected", 60, || {
        let (share, sent) = during(2)?;
        Ok(share == 0 && sent > 0)
    })?;
    let (failed, why) = field.failed_during("load", || {
        let (share, sent) = during(8)?;
        ensure!(share <= 2 && sent > 100, "with a breaker {share} of {sent} requests reached the bad pod");
        Ok(())
    })?;
    ensure!(failed <= 2, "{failed} requests failed after the pod was ejected: {why}");
    Ok(())
}
