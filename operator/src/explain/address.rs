//! A destination that is an address: whose it is, in words.

use std::net::{IpAddr, SocketAddr};

use crate::model::{Model, Owner, Pod};

/// An address, with or without a port, as a user writes it: `10.0.0.1`, `10.0.0.1:80`, `fd00::1`, `[fd00::1]:80`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Address {
    ip: IpAddr,
    port: Option<u16>,
}

impl Address {
    /// Parses it. `None`: the text is the name of a Service, or invalid.
    pub fn parse(text: &str) -> Option<Self> {
        if let Ok(address) = text.parse::<SocketAddr>() {
            return Some(Self { ip: address.ip(), port: Some(address.port()) });
        }
        let bare = text.strip_prefix('[').and_then(|text| text.strip_suffix(']')).unwrap_or(text);
        Some(Self { ip: bare.parse().ok()?, port: None })
    }

    /// The Service whose address it is, as `namespace/name` with its port. `shown`: the namespaces that whoever asks may
    /// see.
    ///
    /// # Errors
    /// It is a pod's, or nobody's in the cluster, as a sentence.
    pub(super) fn service(self, model: &Model, shown: &dyn Fn(&str) -> bool) -> Result<String, String> {
        let Self { ip, port } = self;
        match model.owner(SocketAddr::new(ip, port.unwrap_or(0))) {
            Owner::Service((namespace, name), _) if shown(namespace) => Ok(match port {
                Some(port) => format!("{namespace}/{name}:{port}"),
                None => format!("{namespace}/{name}"),
            }),
            Owner::Pod(pod) if shown(&pod.namespace) => Err(of_pod(ip, pod)),
            _ => Err(format!(
                "no Service and no pod that this token shows has the address {ip}: unless it belongs to another namespace \
                 (tulle -A), it is outside the mesh, and the client's sidecar passes its connections through as they are, \
                 without policies"
            )),
        }
    }
}

fn of_pod(ip: IpAddr, pod: &Pod) -> String {
    let party = pod.party();
    let (namespace, name) = (&pod.namespace, &pod.name);
    let of = if party.kind == "Pod" { String::new() } else { format!(" of {} {}", party.kind, party.name) };
    format!(
        "{ip} is the address of pod {namespace}/{name}{of}: connections to it reach that pod, without routes, shares of a \
         Canary or sections about calls; to see its access rules, name a Service that selects it (kubectl -n {namespace} \
         get services)"
    )
}
