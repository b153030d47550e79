//! `tulle explain --denial ID`: what a sidecar has refused, by which rule, and what would become of it now.
//!
//! The id says to whom it belongs, so only that pod is asked, through a port-forward: it takes the right to look into
//! the pod, which the client who was refused does not have.

use std::net::{IpAddr, SocketAddr};

use k8s_openapi::api::core::v1::{Pod, Service};
use k8s_openapi::jiff::Timestamp;
use kube::api::ListParams;
use kube::{Api, Client, ResourceExt as _};
use serde::Serialize;
use tulle_mesh::denial::DenialId;
use tulle_mesh::identity::WorkloadId;
use tulle_mesh::ports;
use tulle_mesh::query::{Denial, Explanation, Paths};

use super::{destination, ended, table, text, visible};
use crate::cluster::{Context, failure};
use crate::commands::config::forward;
use crate::exit::{self, CliError};
use crate::output::{Format, Output, plain, write};

/// What was refused, and what would become of it now.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Replayed {
    /// `namespace/name` of the pod that refused it.
    pod: String,
    denial: Denial,
    /// The same request now.
    #[serde(skip_serializing_if = "Option::is_none")]
    now: Option<Explanation>,
}

/// Runs `tulle explain --denial`.
///
/// # Errors
/// No pod is found that may have given the id, its sidecar does not remember it, or something cannot be read.
/// [`CliError::Findings`] if the request would be refused again.
pub(super) async fn run(context: &Context, id: DenialId) -> Result<(), CliError> {
    let client = context.streams().await?;
    let pod = pod_of(context, &client, id).await?;
    let (namespace, name) = (pod.namespace().unwrap_or_default(), pod.name_any());
    let body = forward::get(&client, &namespace, &name, ports::ADMIN, "/denials").await?;
    let denial = remembered(&body, id, &format!("{namespace}/{name}"))?;
    let now = match again(context, &client, &pod, &denial).await {
        Ok(explained) => Some(explained),
        Err(why) => {
            exit::note(&format!("what would become of it now is not known: {why}"));
            None
        }
    };
    let replayed = Replayed { pod: format!("{namespace}/{name}"), denial, now };
    match context.output.format {
        Format::Table | Format::Wide => write(&words(&context.output, &replayed))?,
        Format::Json | Format::Yaml | Format::Name => {
            context.output.print(&replayed, |_| {
                table(&context.output, replayed.now.as_ref().unwrap_or(&Explanation::default()))
            })?;
        }
    }
    replayed.now.as_ref().map_or(Ok(()), ended)
}

/// The pod that may have given an id.
async fn pod_of(context: &Context, client: &Client, id: DenialId) -> Result<Pod, CliError> {
    let pods: Api<Pod> = match context.namespace() {
        Some(namespace) => Api::namespaced(client.clone(), namespace),
        None => Api::all(client.clone()),
    };
    let injected = ListParams::default().labels(tulle_crds::keys::INJECTED);
    let found = pods.list(&injected).await.map_err(|error| failure::doing("list pods", &error))?;
    let of = |pod: &Pod| pod.metadata.uid.as_deref().is_some_and(|uid| id.may_be_of(uid));
    found.items.into_iter().find(of).ok_or_else(|| {
        let place = context.namespace().map_or("any namespace".to_owned(), |one| format!("namespace {one}"));
        CliError::failed(format!("no pod of {place} has refused anything as {id}: it is gone, or elsewhere"))
            .hint("look everywhere with -A; the log of a pod that has gone names the rule beside denial=ID")
    })
}

/// The refusal in what a sidecar remembers.
fn remembered(body: &[u8], id: DenialId, pod: &str) -> Result<Denial, CliError> {
    let all: Vec<Denial> = serde_json::from_slice(body).map_err(|error| {
        CliError::failed(format!("the sidecar of {pod} answers with invalid JSON: {error}"))
    })?;
    let id = id.to_string();
    all.into_iter().find(|denial| denial.id == id).ok_or_else(|| {
        let (namespace, name) = pod.split_once('/').unwrap_or_default();
        CliError::failed(format!(
            "the sidecar of {pod} no longer remembers {id}: it keeps its last refusals only"
        ))
        .hint(format!("kubectl -n {namespace} logs {name} -c tulle-proxy | grep {id}"))
    })
}

/// Asks what would become of the request now; if that cannot be asked, why.
async fn again(
    context: &Context,
    client: &Client,
    pod: &Pod,
    denial: &Denial,
) -> Result<Explanation, String> {
    if denial.method.is_empty() {
        return Err("it was a connection whose content is opaque".to_owned());
    }
    let source = source_of(context, client, denial).await?;
    let namespace = source.split('/').next().unwrap_or_default();
    let services: Api<Service> = Api::namespaced(client.clone(), &pod.namespace().unwrap_or_default());
    let listed = services.list(&ListParams::default()).await.map_err(|error| error.to_string())?;
    let destination = destination_of(&denial.host, namespace, pod, &listed.items)
        .ok_or("no Service leads to the pod that refused it")?;
    for namespace in [namespace, destination.split('/').next().unwrap_or_default()] {
        visible(context, namespace).map_err(|error| error.to_string())?;
    }
    let parameters = [
        ("source", source.as_str()),
        ("destination", destination.as_str()),
        ("method", denial.method.as_str()),
        ("path", denial.path.as_str()),
    ];
    let operator = context.operator().await.map_err(|error| error.to_string())?;
    operator.get(Paths::EXPLAIN, &parameters).await.map_err(|error| error.to_string())
}

/// The client's pod, as `namespace/name`.
async fn source_of(context: &Context, client: &Client, denial: &Denial) -> Result<String, String> {
    let address: SocketAddr =
        denial.address.parse().map_err(|_| format!("{} is no address", denial.address))?;
    let address = address.ip().to_canonical();
    let identity: Option<WorkloadId> = denial.client.parse().ok();
    let pods: Api<Pod> =
        match identity.as_ref().map(|identity| identity.namespace.as_str()).or(context.namespace()) {
            Some(namespace) => Api::namespaced(client.clone(), namespace),
            None => Api::all(client.clone()),
        };
    let at = ListParams::default().fields(&format!("status.podIP={address}"));
    let found = pods.list(&at).await.map_err(|error| error.to_string())?;
    let pod = found.items.first().ok_or_else(|| format!("the client at {address} has gone"))?;
    Ok(format!("{}/{}", pod.namespace().unwrap_or_default(), pod.name_any()))
}

/// The Service that the client named, or else one that leads to the pod.
fn destination_of(host: &str, namespace: &str, pod: &Pod, services: &[Service]) -> Option<String> {
    let bare = host.rsplit_once(':').map_or(host, |(name, _)| name);
    if !host.is_empty()
        && bare.trim_matches(['[', ']']).parse::<IpAddr>().is_err()
        && let Ok(named) = destination(bare, Some(namespace))
    {
        let is_known = |service: &Service| {
            format!("{}/{}", service.namespace().unwrap_or_default(), service.name_any()) == named
        };
        if services.iter().any(is_known) {
            return Some(named);
        }
    }
    let leads = |service: &&Service| {
        let selector = service.spec.as_ref().and_then(|spec| spec.selector.as_ref());
        selector.is_some_and(|selector| {
            !selector.is_empty() && selector.iter().all(|(name, value)| pod.labels().get(name) == Some(value))
        })
    };
    let service = services.iter().filter(leads).min_by_key(|service| service.name_any())?;
    Some(format!("{}/{}", service.namespace().unwrap_or_default(), service.name_any()))
}

/// What decided it, as a sentence.
fn rule(denial: &Denial) -> String {
    let number = |of: &str| {
        let inner = denial.rule.strip_prefix(of)?.strip_prefix('(')?.strip_suffix(')')?;
        inner.parse::<usize>().ok()
    };
    if let Some(number) = number("DenyRule") {
        return format!("{}: rule {} of deny matches", denial.policy, number + 1);
    }
    match denial.rule.as_str() {
        "NoAllowMatched" => format!("{}: no rule of allow matches", denial.policy),
        "AmbiguousPath" => format!("{}: the path has more readings than are told apart", denial.policy),
        "Plaintext" => "plain text is refused: mTLS is Strict".to_owned(),
        other => format!("{}: {other}", denial.policy),
    }
}

/// For people.
fn words(output: &Output, replayed: &Replayed) -> String {
    let denial = &replayed.denial;
    let time =
        Timestamp::from_millisecond(denial.at_unix_ms).map_or_else(|_| "-".to_owned(), |at| at.to_string());
    let client = if denial.client.is_empty() { "a client without a sidecar" } else { &denial.client };
    let what = if denial.method.is_empty() {
        "an opaque connection".to_owned()
    } else {
        format!("{} {} of host {}", denial.method, denial.path, denial.host)
    };
    let mut out = format!(
        "{} refused {} at port {} at {time}\n  from {} at {}\n  {}\n",
        plain(&replayed.pod),
        plain(&what),
        denial.port,
        plain(client),
        plain(&denial.address),
        plain(&rule(denial))
    );
    if let Some(now) = &replayed.now {
        out.push_str("\nThe same request now:\n");
        out.push_str(&text(output, now));
    }
    out
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn pod() -> Pod {
        serde_json::from_value(json!({"metadata": {"namespace": "shop", "name": "web-1", "labels": {"app": "web", "tier": "a"}}}))
            .unwrap()
    }

    fn service(name: &str, selector: serde_json::Value) -> Service {
        serde_json::from_value(
            json!({"metadata": {"namespace": "shop", "name": name}, "spec": {"selector": selector}}),
        )
        .unwrap()
    }

    #[test]
    fn the_service_is_the_one_that_the_client_named_or_one_that_leads_to_the_pod() {
        let services = [
            service("all", json!({})),
            service("other", json!({"app": "other"})),
            service("web", json!({"app": "web"})),
            service("web-canary", json!({"app": "web"})),
        ];
        for (host, expected) in [
            ("web-canary", "shop/web-canary"),
            ("web-canary.shop.svc.cluster.local:80", "shop/web-canary"),
            ("shop.example.com", "shop/web"),
            ("10.0.0.1:80", "shop/web"),
            ("[fd00::1]:80", "shop/web"),
            ("", "shop/web"),
        ] {
            assert_eq!(destination_of(host, "shop", &pod(), &services).as_deref(), Some(expected), "{host}");
        }
        assert_eq!(destination_of("web", "shop", &pod(), &services[..2]), None);
    }

    #[test]
    fn what_a_sidecar_remembers_is_found_by_its_id_and_printed_without_control_characters() {
        let id = DenialId::new("uid", 3);
        let denial = Denial {
            id: id.to_string(),
            at_unix_ms: 1_700_000_000_000,
            policy: "MeshPolicy/shop/p".to_owned(),
            rule: "DenyRule(0)".to_owned(),
            client: "spiffe://cluster.local/ns/shop/sa/cli".to_owned(),
            address: "10.1.0.7:40000".to_owned(),
            port: 8080,
            method: "GET".to_owned(),
            host: "web".to_owned(),
            path: "/admin\u{1b}[2J".to_owned(),
        };
        let body = serde_json::to_vec(&[Denial::default(), denial.clone()]).unwrap();
        assert_eq!(remembered(&body, id, "shop/web-1"), Ok(denial.clone()));
        let gone = remembered(&body, DenialId::new("uid", 4), "shop/web-1").unwrap_err().to_string();
        assert!(gone.contains("no longer remembers"), "{gone}");
        let replayed = Replayed { pod: "shop/web-1".to_owned(), denial, now: None };
        let expected =
            "shop/web-1 refused GET /admin\u{fffd}[2J of host web at port 8080 at 2023-11-14T22:13:20Z
  from spiffe://cluster.local/ns/shop/sa/cli at 10.1.0.7:40000
  MeshPolicy/shop/p: rule 1 of deny matches
";
        assert_eq!(words(&Output::default(), &replayed), expected);
    }
}
