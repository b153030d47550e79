//! What somebody sees who may look at one namespace.

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

use super::{Scratch, says};
use crate::cli::exit;
use crate::kubectl::Kube;
use crate::suites::namespace::TestNamespace;

/// The binding in Tulle's namespace, which is not removed with a test's own.
const BINDING: &str = "t-see-own-looks";

pub(super) fn one_namespace(kube: &Kube) -> Result<()> {
    let (own, other) =
        (TestNamespace::meshed(kube, "t-see-own")?, TestNamespace::plain(kube, "t-see-other")?);
    own.service("web", 1, &[])?;
    let scratch = Scratch::new("rights")?;
    own.apply(json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "looker"}}))?;
    let config = scratch.file("looker.yaml", &kubeconfig(kube, &own)?.to_string())?;
    let outcome = looks(kube, &own, &other, &config);
    let gone = ["-n", "tulle-system", "delete", "rolebinding", BINDING, "--ignore-not-found"];
    outcome.and(kube.run(&gone).map(drop))
}

fn looks(kube: &Kube, own: &TestNamespace<'_>, other: &TestNamespace<'_>, config: &str) -> Result<()> {
    let ask = |code: i32, namespace: &[&str]| {
        kube.tulle_expecting(code, &[&["--kubeconfig", config][..], namespace, &["stat"]].concat())
    };
    // Without any right, the first one that lacks is named.
    let refused = ask(exit::FAILED, &["-n", &own.namespace])?;
    says(&refused.stderr, &["hint:", "apiGroups", "tulle-system"])?;
    bind(kube, "tulle-system", BINDING, ("Role", "tulle-portforward"), own)?;
    // The way to the operator alone shows nothing.
    kube.wait_for("the right to the token to be the one that lacks", 60, || {
        let refused = ask(exit::FAILED, &["-n", &own.namespace])?;
        Ok(says(&refused.stderr, &["hint:", "serviceaccounts/token", &own.namespace]).is_ok())
    })?;
    bind(kube, &own.namespace, "looks", ("ClusterRole", "tulle-namespace-viewer"), own)?;
    kube.wait_for("the right to take effect", 60, || {
        Ok(kube.tulle_ended(&["--kubeconfig", config, "-n", &own.namespace, "stat"])?.code == exit::FINE)
    })?;
    let shown = ask(exit::FINE, &["-n", &own.namespace])?;
    ensure!(shown.stdout.lines().any(|line| line.starts_with("web")), "{shown:?}");

    let refused = ask(exit::FAILED, &["-n", &other.namespace])?;
    ensure!(refused.stdout.is_empty(), "it shows another namespace: {refused:?}");
    says(&refused.stderr, &["hint:", "serviceaccounts/token", "resourceNames: [default]", "create"])?;
    says(&refused.stderr, &[&other.namespace])?;
    let refused = ask(exit::FAILED, &["-A"])?;
    ensure!(refused.stdout.is_empty(), "it shows all namespaces: {refused:?}");
    says(&refused.stderr, &["hint:", "serviceaccounts/token", "resourceNames: [tulle-viewer]"])?;
    // A question about both ends needs both.
    let from = format!("{}/web", own.namespace);
    let to = format!("{}/web", other.namespace);
    let refused =
        kube.tulle_expecting(exit::FAILED, &["--kubeconfig", config, "-A", "explain", &from, &to])?;
    says(&refused.stderr, &["hint:"])
}

/// Gives account `looker` a role in a namespace.
pub(super) fn bind(
    kube: &Kube,
    namespace: &str,
    name: &str,
    (kind, role): (&str, &str),
    own: &TestNamespace<'_>,
) -> Result<()> {
    let binding = json!({
        "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "RoleBinding",
        "metadata": {"name": name, "namespace": namespace},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": kind, "name": role},
        "subjects": [{"kind": "ServiceAccount", "name": "looker", "namespace": own.namespace}],
    });
    kube.apply(&binding.to_string()).map(drop)
}

/// A kubeconfig of the same cluster with a token of account `looker`.
pub(super) fn kubeconfig(kube: &Kube, own: &TestNamespace<'_>) -> Result<Value> {
    let admin = kube.run(&["config", "view", "--raw", "--minify", "--flatten", "-o", "json"])?;
    let admin: Value = serde_json::from_str(&admin)?;
    let cluster = admin["clusters"].get(0).context("the kubeconfig has no cluster")?["cluster"].clone();
    let token = own.kubectl(&["create", "token", "looker", "--duration=30m"])?;
    // `tulle` gets the name of the context on clusters of a developer.
    let context = match kube {
        Kube::Embedded(_) => "looker",
        Kube::Context(name) => name,
    };
    Ok(json!({
        "apiVersion": "v1", "kind": "Config", "current-context": context,
        "clusters": [{"name": "cluster", "cluster": cluster}],
        "users": [{"name": "looker", "user": {"token": token.trim()}}],
        "contexts": [{"name": context, "context": {"cluster": "cluster", "user": "looker"}}],
    }))
}
