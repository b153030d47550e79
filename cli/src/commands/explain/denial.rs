//! `tulle explain --denial ID`: what a sidecar has refused, by which rule, and what would become of it now.
//!
//! The id says to whom it belongs, so only that pod is asked, through a port-forward: it takes the right to look into
//! the pod, which the client who was refused does not have.

use std::net::{IpAddr, SocketAddr};

use k8s_openapi::api::core::v1::{Pod, Service, ServicePort};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use k8s_openapi::jiff::Timestamp;
use kube::api::ListParams;
use kube::{Api, Client, ResourceExt as _};
use serde::Serialize;
use tulle_mesh::denial::DenialId;
use tulle_mesh::identity::WorkloadId;
use tulle_mesh::ports;
use tulle_mesh::query::{Denial, Explanation, Paths};

use super::{destination, ended, table, text, visible};
use crate::cluster::{Context, failure, within};
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
    let client = context.client().await?;
    let pod = within("looking for the pod that refused it", pod_of(context, &client, id)).await?;
    let (namespace, name) = (pod.namespace().unwrap_or_default(), pod.name_any());
    let body = forward::get(&context.streams().await?, &namespace, &name, ports::ADMIN, "/denials").await?;
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
    let found = pods.list_metadata(&injected).await.map_err(|error| failure::doing("list pods", &error))?;
    let mut found = found.items.into_iter().map(|pod| pod.metadata);
    let of = found.find(|pod| pod.uid.as_deref().is_some_and(|uid| id.may_be_of(uid)));
    let pod = of.ok_or_else(|| {
        let place = context.namespace().map_or("any namespace".to_owned(), |one| format!("namespace {one}"));
        CliError::failed(format!("no pod of {place} has refused anything as {id}: it is gone, or elsewhere"))
            .hint("look everywhere with -A; the log of a pod that has gone names the rule beside denial=ID")
    })?;
    let (namespace, name) = (pod.namespace.unwrap_or_default(), pod.name.unwrap_or_default());
    let pods: Api<Pod> = Api::namespaced(client.clone(), &namespace);
    pods.get(&name).await.map_err(|error| failure::doing(&format!("read pod {namespace}/{name}"), &error))
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
    if denial.cut {
        return Err("its path, host or method is longer than what the sidecar keeps of it".to_owned());
    }
    let address: SocketAddr =
        denial.address.parse().map_err(|_| format!("{} is no address", denial.address))?;
    let address = address.ip().to_canonical();
    let identity: Option<WorkloadId> = denial.client.parse().ok();
    let reading = read(context, client, pod, identity.as_ref(), address);
    let Read { pods, services } =
        within("reading pods and Services", reading).await.map_err(|error| error.to_string())?;
    let source = source_of(&pods, identity.as_ref(), address)?;
    let namespace = source.split('/').next().unwrap_or_default();
    let destination = destination_of(denial, namespace, pod, &services)
        .ok_or_else(|| format!("no Service leads to port {} of the pod that refused it", denial.port))?;
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

/// What has to be read to ask about a request again.
struct Read {
    /// Pods among which the client's is.
    pods: Vec<Pod>,
    /// Services in the namespace of the pod that refused it.
    services: Vec<Service>,
}

async fn read(
    context: &Context,
    client: &Client,
    pod: &Pod,
    identity: Option<&WorkloadId>,
    address: IpAddr,
) -> Result<Read, CliError> {
    // The API server finds pods by their first address only; where the client is known by name, by that.
    let (pods, of) = match (identity, context.namespace()) {
        (Some(identity), _) => (
            Api::<Pod>::namespaced(client.clone(), &identity.namespace),
            format!("spec.serviceAccountName={}", identity.service_account),
        ),
        (None, Some(namespace)) => {
            (Api::namespaced(client.clone(), namespace), format!("status.podIP={address}"))
        }
        (None, None) => (Api::all(client.clone()), format!("status.podIP={address}")),
    };
    let pods = pods.list(&ListParams::default().fields(&of)).await;
    let services: Api<Service> = Api::namespaced(client.clone(), &pod.namespace().unwrap_or_default());
    let services = services.list(&ListParams::default()).await;
    Ok(Read {
        pods: pods.map_err(|error| failure::doing("list pods", &error))?.items,
        services: services.map_err(|error| failure::doing("list Services", &error))?.items,
    })
}

/// The client's pod, as `namespace/name`: the only one that has the client's address, and its service account where that
/// is known.
fn source_of(pods: &[Pod], identity: Option<&WorkloadId>, address: IpAddr) -> Result<String, String> {
    let is_client = |pod: &&Pod| {
        let account = pod.spec.as_ref().and_then(|spec| spec.service_account_name.as_deref());
        let is_named = identity.is_none_or(|identity| {
            account == Some(identity.service_account.as_str())
                && pod.metadata.namespace.as_deref() == Some(identity.namespace.as_str())
        });
        // Those of the node are the address of all of them.
        let is_of_node = pod.spec.as_ref().is_some_and(|spec| spec.host_network == Some(true));
        let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
        let has_ended = matches!(phase, Some("Succeeded" | "Failed"));
        is_named && !is_of_node && !has_ended && has_address(pod, address)
    };
    let mut found = pods.iter().filter(is_client);
    match (found.next(), found.next()) {
        (Some(pod), None) => Ok(format!("{}/{}", pod.namespace().unwrap_or_default(), pod.name_any())),
        (Some(_), Some(_)) => {
            Err(format!("it is not known which pod it was: several have the address {address}"))
        }
        (None, _) => Err(format!(
            "it is not known which pod it was: none that could be the client has the address {address} now"
        )),
    }
}

/// Whether a pod has an address, of either family.
fn has_address(pod: &Pod, address: IpAddr) -> bool {
    let Some(status) = &pod.status else { return false };
    let others = status.pod_ips.iter().flatten().map(|at| at.ip.as_str());
    let mut all = status.pod_ip.as_deref().into_iter().chain(others);
    all.any(|text| text.parse::<IpAddr>().is_ok_and(|found| found.to_canonical() == address))
}

/// The Service that the client named, or else one that leads to the pod, with the port that leads to the one of the pod.
fn destination_of(denial: &Denial, namespace: &str, pod: &Pod, services: &[Service]) -> Option<String> {
    let with_port = |service: &Service| {
        let port = service_port(service, pod, denial.port)?;
        Some(format!("{}:{port}", full_name(service)))
    };
    let host = denial.host.as_str();
    let bare = host.rsplit_once(':').map_or(host, |(name, _)| name);
    if !host.is_empty()
        && bare.trim_matches(['[', ']']).parse::<IpAddr>().is_err()
        && let Ok(named) = destination(bare, Some(namespace))
        && let Some(found) =
            services.iter().find(|service| full_name(service) == named.text).and_then(with_port)
    {
        return Some(found);
    }
    let leads = |service: &&Service| {
        let selector = service.spec.as_ref().and_then(|spec| spec.selector.as_ref());
        selector.is_some_and(|selector| {
            !selector.is_empty() && selector.iter().all(|(name, value)| pod.labels().get(name) == Some(value))
        })
    };
    let mut leading: Vec<&Service> = services.iter().filter(leads).collect();
    leading.sort_by_key(|service| service.name_any());
    leading.into_iter().find_map(with_port)
}

fn full_name(service: &Service) -> String {
    format!("{}/{}", service.namespace().unwrap_or_default(), service.name_any())
}

/// The port of a Service that leads to this port of a pod: the least, where several do.
fn service_port(service: &Service, pod: &Pod, port: u16) -> Option<i32> {
    let port = i32::from(port);
    let ports = service.spec.as_ref().and_then(|spec| spec.ports.as_ref()).into_iter().flatten();
    let leads = |of_service: &&ServicePort| {
        let is_tcp = of_service.protocol.as_deref().is_none_or(|protocol| protocol == "TCP");
        is_tcp
            && match &of_service.target_port {
                None => of_service.port == port,
                Some(IntOrString::Int(target)) => *target == port,
                Some(IntOrString::String(target)) => has_port(pod, target, port),
            }
    };
    ports.filter(leads).map(|of_service| of_service.port).min()
}

/// Whether a container of a pod has a port with this name and number.
fn has_port(pod: &Pod, name: &str, port: i32) -> bool {
    let Some(spec) = &pod.spec else { return false };
    let mut containers = spec.containers.iter().chain(spec.init_containers.iter().flatten());
    containers.any(|container| {
        let mut ports = container.ports.iter().flatten();
        ports.any(|of_pod| of_pod.name.as_deref() == Some(name) && of_pod.container_port == port)
    })
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
        let cut = if denial.cut { " (cut: it was longer)" } else { "" };
        format!("{} {} of host {}{cut}", denial.method, denial.path, denial.host)
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
        out.push_str(
            "\nThe same request now, without its query and headers, which the sidecar does not keep:\n",
        );
        out.push_str(&text(output, now));
    }
    out
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn pod() -> Pod {
        serde_json::from_value(json!({
            "metadata": {"namespace": "shop", "name": "web-1", "labels": {"app": "web", "tier": "a"}},
            "spec": {"containers": [
                {"name": "web", "ports": [{"name": "http", "containerPort": 8080}, {"containerPort": 9090}]},
            ]},
        }))
        .unwrap()
    }

    /// A Service with ports and what they lead to.
    fn service_with(name: &str, selector: serde_json::Value, ports: serde_json::Value) -> Service {
        serde_json::from_value(json!({
            "metadata": {"namespace": "shop", "name": name},
            "spec": {"selector": selector, "ports": ports},
        }))
        .unwrap()
    }

    fn service(name: &str, selector: serde_json::Value) -> Service {
        service_with(name, selector, json!([{"port": 80, "targetPort": 8080}]))
    }

    fn to(host: &str, port: u16) -> Denial {
        Denial { host: host.to_owned(), port, ..Denial::default() }
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
            ("web-canary", "shop/web-canary:80"),
            ("web-canary.shop.svc.cluster.local:80", "shop/web-canary:80"),
            ("shop.example.com", "shop/web:80"),
            ("10.0.0.1:80", "shop/web:80"),
            ("[fd00::1]:80", "shop/web:80"),
            ("", "shop/web:80"),
        ] {
            let found = destination_of(&to(host, 8080), "shop", &pod(), &services);
            assert_eq!(found.as_deref(), Some(expected), "{host}");
        }
        assert_eq!(destination_of(&to("web", 8080), "shop", &pod(), &services[..2]), None);
    }

    #[test]
    fn the_port_is_the_one_of_the_service_that_leads_to_the_port_of_the_pod() {
        let ports = json!([
            {"port": 81, "targetPort": 8080, "protocol": "UDP"},
            {"port": 443, "targetPort": 8443},
            {"port": 80, "targetPort": "http"},
            {"port": 90, "targetPort": "metrics"},
            {"port": 9090},
        ]);
        let services = [service_with("web", json!({"app": "web"}), ports)];
        for (port, expected) in [
            (8080, Some("shop/web:80")),
            (8443, Some("shop/web:443")),
            (9090, Some("shop/web:9090")),
            (80, None),
            (7070, None),
        ] {
            let found = destination_of(&to("web", port), "shop", &pod(), &services);
            assert_eq!(found.as_deref(), expected, "{port}");
        }
        let other = service_with("a", json!({"app": "web"}), json!([{"port": 7000, "targetPort": 7070}]));
        let services = [services[0].clone(), other];
        let found = destination_of(&to("web", 7070), "shop", &pod(), &services);
        assert_eq!(found.as_deref(), Some("shop/a:7000"), "the one that was named does not lead there");
    }

    /// A pod of the service account `cli`.
    fn client(name: &str, change: impl FnOnce(&mut serde_json::Value)) -> Pod {
        let mut pod = json!({
            "metadata": {"namespace": "shop", "name": name},
            "spec": {"containers": [], "serviceAccountName": "cli"},
            "status": {"phase": "Running", "podIP": "10.1.0.7", "podIPs": [{"ip": "10.1.0.7"}, {"ip": "fd00::7"}]},
        });
        change(&mut pod);
        serde_json::from_value(pod).unwrap()
    }

    #[test]
    fn the_client_is_the_only_pod_that_has_its_address_and_its_account_now() {
        let identity: WorkloadId = "spiffe://cluster.local/ns/shop/sa/cli".parse().unwrap();
        let other: WorkloadId = "spiffe://cluster.local/ns/shop/sa/other".parse().unwrap();
        let (v4, v6): (IpAddr, IpAddr) = ("10.1.0.7".parse().unwrap(), "fd00::7".parse().unwrap());
        let pods = [
            client("done", |pod| pod["status"]["phase"] = "Succeeded".into()),
            client("failed", |pod| pod["status"]["phase"] = "Failed".into()),
            client("of-node", |pod| pod["spec"]["hostNetwork"] = true.into()),
            client("elsewhere", |pod| pod["status"] = json!({"podIP": "10.1.0.8"})),
            client("pending", |pod| pod["status"] = json!({})),
            client("cli-1", |_| {}),
        ];
        for address in [v4, v6] {
            assert_eq!(source_of(&pods, Some(&identity), address).as_deref(), Ok("shop/cli-1"), "{address}");
            assert_eq!(source_of(&pods, None, address).as_deref(), Ok("shop/cli-1"), "{address}");
        }
        let unknown = |pods: &[Pod], identity| {
            let why = source_of(pods, identity, v4).unwrap_err();
            assert!(why.contains("not known which pod it was"), "{why}");
        };
        unknown(&pods, Some(&other));
        unknown(&pods[..5], Some(&identity));
        let two = [client("cli-1", |_| {}), client("cli-2", |_| {})];
        unknown(&two, Some(&identity));
        unknown(&two, None);
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
            cut: false,
        };
        let body = serde_json::to_vec(&[Denial::default(), denial.clone()]).unwrap();
        assert_eq!(remembered(&body, id, "shop/web-1"), Ok(denial.clone()));
        let gone = remembered(&body, DenialId::new("uid", 4), "shop/web-1").unwrap_err().to_string();
        assert!(gone.contains("no longer remembers"), "{gone}");
        let mut replayed = Replayed { pod: "shop/web-1".to_owned(), denial, now: None };
        let expected =
            "shop/web-1 refused GET /admin\u{fffd}[2J of host web at port 8080 at 2023-11-14T22:13:20Z
  from spiffe://cluster.local/ns/shop/sa/cli at 10.1.0.7:40000
  MeshPolicy/shop/p: rule 1 of deny matches
";
        assert_eq!(words(&Output::default(), &replayed), expected);
        replayed.denial.cut = true;
        replayed.now = Some(Explanation::default());
        let text = words(&Output::default(), &replayed);
        assert!(text.contains("of host web (cut: it was longer) at port 8080"), "{text}");
        assert!(text.contains("\nThe same request now, without its query and headers"), "{text}");
    }
}
