//! Pods, Services and policies.

use std::cell::Cell;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use std::{fs, io, process};

use serde_json::{Value, json};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::time::sleep;
use tulle_operator::model::gateway::{RouteKind, RouteObject, RouteSpec};
use tulle_operator::model::object::ServicePort;
use tulle_operator::model::{Endpoint, Pod as KnownPod, Service, Slice};

use super::operator::Operator;
use super::sidecar::Sidecar;
use super::{NAMESPACE, address, within};

/// A cluster with one client, whose sidecar runs.
pub struct Cluster {
    /// The control plane.
    pub operator: Operator,
    /// The sidecar of the pod from which Services are dialled.
    pub client: Sidecar,
    folder: PathBuf,
    numbers: Cell<u8>,
    services: Cell<u16>,
    generation: Cell<i64>,
}

/// A pod that serves.
pub struct Pod {
    /// Its uid, which is also its name and its service account.
    pub uid: String,
    /// Its sidecar, if it has one.
    pub sidecar: Option<Sidecar>,
    /// Its address as the cluster knows it.
    known: Ipv4Addr,
    /// Where its applications listen.
    own: Ipv4Addr,
}

/// Where an application is reached.
#[derive(Clone, Debug)]
pub struct Port {
    /// The address as the cluster knows it.
    pub address: SocketAddr,
    pod: String,
}

impl Cluster {
    /// Starts a cluster. The client's pod is `pod-0`.
    pub async fn start() -> Self {
        let operator = Operator::start();
        let known = address();
        let folder =
            PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("proxy-{}-{known}", process::id()));
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join("roots.pem"), operator.root_pem()).unwrap();
        fs::write(folder.join("token"), "token").unwrap();
        operator.change(|model| model.apply_pod(pod("pod-0", known, true)));
        let client = Sidecar::start(&operator, &folder, "pod-0", &[known]).await;
        Self {
            operator,
            client,
            folder,
            numbers: Cell::new(1),
            services: Cell::new(0),
            generation: Cell::new(1),
        }
    }

    /// A policy for all pods. Those that are started later enforce it from the start.
    pub fn policy(&self, mtls: &str, access: Value) {
        let policy = json!({
            "apiVersion": "tulle.dev/v1alpha1", "kind": "MeshPolicy",
            "metadata": {"name": "all", "namespace": NAMESPACE, "creationTimestamp": "2026-01-01T00:00:00Z"},
            "spec": {"target": {"kind": "Namespace"}, "mtls": mtls, "access": access},
        });
        let policy = serde_json::from_value(policy).unwrap();
        self.operator.change(|model| model.apply_policy((NAMESPACE.into(), "all".into()), policy));
    }

    /// Starts a pod, with a sidecar or without.
    pub async fn pod(&self, meshed: bool) -> Pod {
        let uid = format!("pod-{}", self.numbers.get());
        self.numbers.set(self.numbers.get() + 1);
        let own = address();
        let known = if meshed { address() } else { own };
        self.operator.change(|model| model.apply_pod(pod(&uid, known, meshed)));
        let sidecar = match meshed {
            true => Some(Sidecar::start(&self.operator, &self.folder, &uid, &[known, own]).await),
            false => None,
        };
        Pod { uid, sidecar, known, own }
    }

    /// A Service of these ports, which declares a protocol or nothing. Returns its address once the client's sidecar
    /// knows it.
    pub async fn service(&self, protocol: Option<&str>, ports: &[&Port]) -> SocketAddr {
        self.service_in(NAMESPACE, protocol, ports).await
    }

    /// The same in another namespace, which knows the pods of its endpoints by their addresses only.
    pub async fn service_in(&self, namespace: &str, protocol: Option<&str>, ports: &[&Port]) -> SocketAddr {
        let number = self.services.replace(self.services.get() + 1);
        let [high, low] = number.to_be_bytes();
        let cluster_ip = IpAddr::from([10, 96, high, low]);
        let name = service_name(SocketAddr::new(cluster_ip, 80));
        let of_pod = |port: &Port| (namespace == NAMESPACE).then(|| port.pod.as_str().into());
        self.operator.change(|model| {
            let port =
                ServicePort { name: "main".to_owned(), port: 80, app_protocol: protocol.map(str::to_owned) };
            let service = Service { cluster_ips: vec![cluster_ip], ports: vec![port], ..Service::default() };
            model.apply_service((namespace.into(), name.as_str().into()), service);
            for port in ports {
                // One each: all endpoints of a slice have the same number.
                let slice = Slice {
                    service: name.as_str().into(),
                    ports: vec![("main".to_owned(), port.address.port())],
                    endpoints: vec![Endpoint {
                        address: Some(port.address.ip()),
                        ready: true,
                        serving: true,
                        pod_uid: of_pod(port),
                        ..Endpoint::default()
                    }],
                };
                let key = (namespace.into(), format!("{name}-{}", port.pod).into());
                model.apply_slice(key, slice);
            }
        });
        let dialled = SocketAddr::new(cluster_ip, 80);
        self.client.resolve(dialled).await;
        dialled
    }

    /// Applies a route with this `spec`, and waits until the client's sidecar has rules of it for this address. The
    /// route is called `name` and is of the pods' namespace.
    pub async fn route(&self, kind: RouteKind, name: &str, spec: Value, dialled: SocketAddr) {
        let generation = self.generation.replace(self.generation.get() + 1);
        let RouteSpec { parents, hostnames, rules } = serde_json::from_value(spec).unwrap();
        let route = RouteObject {
            kind,
            namespace: NAMESPACE.into(),
            name: name.into(),
            uid: name.into(),
            generation,
            created: 0,
            parents,
            hostnames,
            rules,
        };
        // What came before has other rules in memory.
        let before = self.client.rules(dialled);
        self.operator.change(|model| model.apply_route(route));
        let changed = async {
            loop {
                match (self.client.rules(dialled), &before) {
                    (Some(now), Some(before)) if Arc::ptr_eq(&now, before) => {}
                    (Some(_), _) => return,
                    (None, _) => {}
                }
                sleep(Duration::from_millis(2)).await;
            }
        };
        within(changed).await;
    }
}

/// The name of the Service with this address.
pub fn service_name(dialled: SocketAddr) -> String {
    match dialled.ip() {
        IpAddr::V4(ip) => format!("service-{}", u16::from_be_bytes([ip.octets()[2], ip.octets()[3]])),
        IpAddr::V6(ip) => panic!("{ip} is not of a Service"),
    }
}

/// A reference of a route to a Service, as its parent or as a backend.
pub fn service_ref(dialled: SocketAddr) -> Value {
    json!({"group": "", "kind": "Service", "name": service_name(dialled), "port": 80})
}

impl Drop for Cluster {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.folder);
    }
}

impl Pod {
    /// A place for an application to listen, and how it is reached. `backlog`: connections that may wait there.
    pub fn listener(&self, backlog: i32) -> (tokio::net::TcpListener, Port) {
        loop {
            let listener = listen((self.own, 0).into(), backlog).unwrap();
            let own = listener.local_addr().unwrap();
            let known = SocketAddr::from((self.known, own.port()));
            if let Some(sidecar) = &self.sidecar {
                // One that an earlier application has had is still redirected to that.
                let Ok(redirected) = listen(known, 1024) else { continue };
                sidecar.redirect(redirected, own);
            }
            let listener = tokio::net::TcpListener::from_std(listener).unwrap();
            return (listener, Port { address: known, pod: self.uid.clone() });
        }
    }
}

fn listen(address: SocketAddr, backlog: i32) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP))?;
    socket.bind(&address.into())?;
    socket.listen(backlog)?;
    socket.set_nonblocking(true)?;
    Ok(socket.into())
}

fn pod(uid: &str, ip: Ipv4Addr, injected: bool) -> KnownPod {
    KnownPod {
        uid: uid.into(),
        name: uid.into(),
        namespace: NAMESPACE.into(),
        service_account: uid.into(),
        ips: Box::new([ip.into()]),
        injected,
        containers_ready: true,
        ready: true,
        ..KnownPod::default()
    }
}
