//! The part of the demo about what `tulle` shows of the parts before.

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use super::{Demo, NAMESPACE};
use crate::cli::exit;
use crate::images;

/// The demo takes about as long.
const WINDOW: &str = "10m";

impl Demo {
    pub(super) fn seen(&self) -> Result<()> {
        self.heading("What has happened: success rates, latencies, and who talks to whom");
        let stat = self.show_tulle(exit::FINE, &["stat", "deploy", "-n", NAMESPACE, "--window", WINDOW])?;
        let words = |line: &str| line.split_whitespace().map(str::to_owned).collect::<Vec<String>>();
        let checkout =
            stat.lines().map(words).find(|words| words.first().is_some_and(|name| name == "checkout"));
        let checkout = checkout.with_context(|| format!("tulle stat shows no checkout: {stat}"))?.join(" ");
        let failures = checkout.contains('%') && !checkout.contains(" 100.00%");
        ensure!(failures, "the failures of the bad version are not shown: {checkout}");
        let edges = self.show_tulle(exit::FINE, &["edges", "-n", NAMESPACE, "--window", WINDOW])?;
        let secured = |line: &str| {
            let words = words(line);
            words.starts_with(&["load".to_owned(), "svc/checkout".to_owned()])
                && words.get(4).is_some_and(|mtls| mtls == "yes")
        };
        ensure!(edges.lines().any(secured), "no edge from load to checkout over mTLS: {edges}");
        self.explained()?;
        self.heading("The rollout that was stopped, and the page");
        let status = self.show_tulle(exit::FINE, &["canary", "status", "checkout", "-n", NAMESPACE])?;
        ensure!(
            status.contains("Failed") && status.contains("(stable)"),
            "the Canary has not failed: {status}"
        );
        self.page()
    }

    /// Why web may not call payments, since [`Demo::denied`].
    fn explained(&self) -> Result<()> {
        self.heading("Why web gets 403 from payments");
        let question = ["explain", "web", "payments", "-n", NAMESPACE];
        let told = self.show_tulle(exit::FINDINGS, &question)?;
        let (status, _) = self.call("web", "payments")?;
        let agrees = told.contains("does not reach") && told.contains(&status);
        ensure!(agrees && told.contains("MeshPolicy/shop/payments"), "a real request got {status}: {told}");
        let question = ["explain", "checkout", "payments", "-n", NAMESPACE, "-o", "json"];
        let allowed: Value = self.kube.tulle_expecting(exit::FINE, &question)?.json()?;
        let outcome = allowed["outcome"].as_str().context("tulle explain tells no outcome")?;
        println!("and checkout: {outcome}");
        Ok(())
    }

    /// How the page is opened, with the program that was built for this demo.
    fn page(&self) -> Result<()> {
        // The same way to the operator, with the same token.
        let version: Value = self.kube.tulle_json(&["version", "-n", NAMESPACE])?;
        ensure!(version["operator"]["leader"] == true, "the operator's leader does not answer: {version}");
        println!("\nThe same as a page in a browser:");
        println!("  {} dashboard -n {NAMESPACE}", images::tulle()?.display());
        println!(
            "It prints the address to open. The embedded cluster has a network of its own: run the command"
        );
        println!("within `cargo xtask cluster shell`, and fetch the address from there.");
        Ok(())
    }

    /// Runs `tulle`, which must end with this code, and prints the command and its output.
    fn show_tulle(&self, code: i32, arguments: &[&str]) -> Result<String> {
        println!("$ tulle {}", arguments.join(" "));
        let printed = self.kube.tulle_expecting(code, arguments)?;
        println!("{}", printed.stdout.trim_end());
        Ok(printed.stdout)
    }
}
