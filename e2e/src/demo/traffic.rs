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
        let alone = self.beside_a_failing_pod("without a policy")?;
        ensure!(alone.failed > 0, "no request failed although a pod fails all: it got none");
        self.apply_sample("policy-timeout-retry.yaml")?;
        self.in_force("payments-retry")?;
        let retried = self.beside_a_failing_pod("with retries")?;
        ensure!(retried.failed == 0, "{} requests failed although they could be retried", retried.failed);
        ensure!(retried.at_bad > 0, "the failing pod got no request");
        // Latency, the default, soon avoids a pod that fails, and a breaker has little to do.
        println!(
            "$ sed 's/by: Latency/by: RoundRobin/' config/samples/policy-breaker-balance.yaml | kubectl apply -f -"
        );
        let sample = install::sample("policy-breaker-balance.yaml")?;
        print!("{}", self.kube.apply(&sample.replace("by: Latency", "by: RoundRobin"))?);
        self.in_force("payments-breaker")?;
        let broken = self.beside_a_failing_pod("with a breaker, and pods in turns")?;
        ensure!(broken.failed == 0, "{} requests failed although they could be retried", broken.failed);
        ensure!(broken.ejected > 0, "nobody has ejected the failing pod");
        println!("ejected by {} of its callers", broken.ejected);
        self.show(&["get", "meshpolicies", "-n", NAMESPACE])?;
        self.remove("meshpolicy", &["payments-retry", "payments-breaker"])
    }

    fn in_force(&self, policy: &str) -> Result<()> {
        let object = format!("meshpolicy/{policy}");
        self.kube.wait_for("every sidecar to acknowledge the policy", 30, || {
            Ok(self.kube.field(NAMESPACE, &object, ".status.conditions[0].status")? == "True")
        })
    }

    /// Counts the requests of the load from before a pod that fails comes until some seconds after, and prints the
    /// counts. Clients soon know the pod, so each call begins with one that nobody knows.
    fn beside_a_failing_pod(&self, when: &str) -> Result<Counted> {
        let before = self.counts_after_in_flight()?;
        self.kube.apply(&failing_pod())?;
        self.kube.rolled_out(NAMESPACE, "deployment/payments-bad", 60)?;
        thread::sleep(COUNTED);
        let after = self.counts_after_in_flight()?;
        let (sent, failed) = (after.sent - before.sent, after.failed - before.failed);
        let inbound = ["tulle_requests_total{", "direction=\"inbound\""];
        let at_bad = self.sum("fails=always", &inbound)?;
        let ejected = self.sum("app=checkout", &["tulle_ejected_endpoints{"])?;
        println!("{when}: {failed} of {sent} requests failed; {at_bad} attempts reached the failing pod");
        self.remove("deployment", &["payments-bad"])?;
        let gone = ["wait", "-n", NAMESPACE, "--for=delete", "pod", "-l", "fails=always", "--timeout=60s"];
        self.kube.run(&gone)?;
        Ok(Counted { failed, at_bad, ejected })
    }

    /// A metric, summed over the pods with a label.
    fn sum(&self, label: &str, parts: &[&str]) -> Result<u64> {
        let pods = self.kube.pods(NAMESPACE, label)?;
        pods.iter().map(|pod| self.kube.metric(NAMESPACE, pod, parts)).sum()
    }

    fn remove(&self, kind: &str, names: &[&str]) -> Result<()> {
        self.kube.run(&[&["delete", "-n", NAMESPACE, "--ignore-not-found", kind], names].concat()).map(drop)
    }
}

/// What happened to the load's requests.
struct Counted {
    failed: u64,
    /// Attempts that reached the failing pod.
    at_bad: u64,
    /// Endpoints that its callers have ejected, summed over them.
    ejected: u64,
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
