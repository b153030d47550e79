//! The part of the demo about routes, retries and the breaker.

use anyhow::Result;
use serde_json::Value;

use super::{Demo, NAMESPACE};
use crate::{gateway, install};

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

    fn remove(&self, kind: &str, names: &[&str]) -> Result<()> {
        self.kube.run(&[&["delete", "-n", NAMESPACE, "--ignore-not-found", kind], names].concat()).map(drop)
    }
}
