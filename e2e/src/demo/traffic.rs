//! The part of the demo about routes, retries and the breaker.

use std::thread;
use std::time::Duration;

use anyhow::{Result, ensure};
use serde_json::Value;

use super::{Demo, NAMESPACE};
use crate::{gateway, install};

/// How long requests are counted.
const COUNTED: Duration = Duration::from_secs(6);

impl Demo {
    /// Applies a sample, and prints that.
    fn apply_sample(&self, name: &str) -> Result<()> {
        println!("$ kubectl apply -f config/samples/{name}");
        print!("{}", self.kube.apply(&install::sample(name)?)?);
        Ok(())
    }

    /// Sends a request that takes the route, until its answer is as expected; prints it.
    fn routed_to(&self, more: &[&str], expected: impl Fn(&str, &str) -> bool) -> Result<()> {
        let (mut status, mut answer) = (String::new(), String::new());
        let waited = self.kube.wait_for("the route to take effect", 20, || {
            (status, answer) = self.call_with("web", "checkout", more)?;
            Ok(expected(&status, &answer))
        });
        println!("web → checkout {}: {status} {answer}", more.join(" "));
        waited
    }

    pub(super) fn routed(&self) -> Result<()> {
        self.heading(
            "A route of the Gateway API: testers get the beta version, and an old path is redirected",
        );
        gateway::install(&self.kube)?;
        self.apply_sample("httproute-header-match.yaml")?;
        self.kube.rolled_out(NAMESPACE, "deployment/checkout-beta", 60)?;
        let version = |expected: &'static str| {
            move |status: &str, answer: &str| {
                let answer: Value = serde_json::from_str(answer).unwrap_or_default();
                status == "200" && answer["version"] == expected
            }
        };
        self.routed_to(&["--header=x-tester: yes"], version("beta"))?;
        self.routed_to(&[], version("v1"))?;
        self.apply_sample("httproute-redirect.yaml")?;
        self.routed_to(&["--path=/cart/7"], |status, location| {
            status == "308" && location == "http://checkout/basket/7"
        })?;
        self.show(&["get", "httproutes", "-n", NAMESPACE])?;
        self.remove("httproute", &["checkout", "checkout-paths"])?;
        self.remove("service,deployment", &["checkout-beta"])
    }

    pub(super) fn saved(&self) -> Result<()> {
        self.heading("A pod of payments fails every request: retries save them, and a breaker ejects it");
        self.kube.apply(&failing_pod())?;
        self.kube.rolled_out(NAMESPACE, "deployment/payments-bad", 60)?;
        let without = self.counted("without a policy")?;
        ensure!(without.failed > 0, "the failing pod got no request");
        self.apply_sample("policy-timeout-retry.yaml")?;
        self.in_force("payments-retry")?;
        let retried = self.counted("with retries")?;
        ensure!(retried.failed == 0, "{} requests failed although they could be retried", retried.failed);
        self.apply_sample("policy-breaker-balance.yaml")?;
        self.in_force("payments-breaker")?;
        let mut last = None;
        self.kube.wait_for("the failing pod to be ejected", 60, || {
            thread::sleep(Duration::from_secs(3));
            let reached = Some(self.reached_bad()?);
            Ok(std::mem::replace(&mut last, reached) == reached)
        })?;
        let ejected = self.counted("with a breaker")?;
        ensure!(ejected.failed == 0, "{} requests failed after the pod was ejected", ejected.failed);
        ensure!(
            ejected.at_bad <= 4,
            "{} requests reached the failing pod after it was ejected",
            ejected.at_bad
        );
        self.show(&["get", "meshpolicies", "-n", NAMESPACE])?;
        self.remove("meshpolicy", &["payments-retry", "payments-breaker"])?;
        self.remove("deployment", &["payments-bad"])
    }

    fn in_force(&self, policy: &str) -> Result<()> {
        let object = format!("meshpolicy/{policy}");
        self.kube.wait_for("every sidecar to acknowledge the policy", 30, || {
            Ok(self.kube.field(NAMESPACE, &object, ".status.conditions[0].status")? == "True")
        })
    }

    /// Counts the requests of the load for some seconds, and prints the counts.
    fn counted(&self, when: &str) -> Result<Counted> {
        let read = || -> Result<(u64, u64, u64)> {
            let counts = self.counts_after_in_flight()?;
            Ok((counts.sent, counts.failed, self.reached_bad()?))
        };
        thread::sleep(Duration::from_millis(1200));
        let before = read()?;
        thread::sleep(COUNTED);
        let after = read()?;
        let (sent, failed, at_bad) = (after.0 - before.0, after.1 - before.1, after.2 - before.2);
        println!("{when}: {failed} of {sent} requests failed; {at_bad} attempts reached the failing pod");
        Ok(Counted { failed, at_bad })
    }

    /// How many requests have reached the failing pod.
    fn reached_bad(&self) -> Result<u64> {
        let inbound = ["tulle_requests_total{", "direction=\"inbound\""];
        let pods = self.kube.pods(NAMESPACE, "fails=always")?;
        pods.iter().map(|pod| self.kube.metric(NAMESPACE, pod, &inbound)).sum()
    }

    fn remove(&self, kind: &str, names: &[&str]) -> Result<()> {
        self.kube.run(&[&["delete", "-n", NAMESPACE, "--ignore-not-found", kind], names].concat()).map(drop)
    }
}

/// What happened to the load's requests.
struct Counted {
    failed: u64,
    at_bad: u64,
}

/// A Deployment of one more pod behind Service payments, which answers every request 503.
fn failing_pod() -> String {
    let pod = serde_json::json!({
        "metadata": {"labels": {"app": "payments", "fails": "always"}},
        "spec": {"serviceAccountName": "payments", "containers": [{
            "name": "payments", "image": "tulle.local/shop:dev", "ports": [{"containerPort": 8080}],
            "args": ["serve", "--name=payments", "--errors=100", "--status=503"],
            "readinessProbe": {"httpGet": {"path": "/ready", "port": 8080}, "periodSeconds": 1},
        }]},
    });
    let deployment = serde_json::json!({
        "apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "payments-bad", "namespace": NAMESPACE},
        "spec": {"replicas": 1, "selector": {"matchLabels": {"fails": "always"}}, "template": pod},
    });
    deployment.to_string()
}
