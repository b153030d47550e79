//! The gRPC port: TLS 1.3, and who may call what. `Identity.Sign` needs a token, everything else a
//! certificate of this mesh; a sidecar is answered for its own pod only.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use anyhow::Result;
use futures::StreamExt as _;
use futures::stream::Map;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, mpsc};
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tokio_stream::wrappers::ReceiverStream;
use tonic::service::Routes;
use tonic::{Request, Response, Status, Streaming};
use tulle_mesh::identity::WorkloadId;
use tulle_mesh::proto::discovery_server::{Discovery, DiscoveryServer};
use tulle_mesh::proto::identity_server::{Identity, IdentityServer};
use tulle_mesh::proto::relay_server::{Relay, RelayServer};
use tulle_mesh::proto::{
    Hello, HistoryRequest, OperatorMessage, RelayMessage, RelayReply, SidecarMessage, TelemetryAck,
    relay_message, sidecar_message,
};

use super::acks::AckTracker;
use super::admission::Admission;
use super::bounds;
use super::cache::Cache;
use super::peer::Tls;
use super::relay::LeaderRelay;
use super::report::{SidecarEvent, lacking, name_of, of_sidecar, report_of};
use super::session::{Build, Down, MAX_SUBSCRIPTIONS, Session};
use crate::tap::{self, Taps};
use crate::telemetry::{Aggregates, replicate};
use crate::watch::Hub;

/// A replica that takes no answers for this long is not waited for.
const ANSWER_WITHIN: Duration = Duration::from_secs(10);

/// A connection's verified peer; `None`: it showed no certificate.
#[derive(Clone, Debug)]
pub struct PeerIdentity(pub Option<WorkloadId>);

/// Where a connection comes from, and how it is closed.
#[derive(Clone, Debug)]
pub struct Connection {
    /// The address of the peer.
    pub address: IpAddr,
    hang_up: Arc<Notify>,
}

/// What the services share.
#[derive(Clone)]
pub struct Services {
    /// The model.
    pub hub: Arc<Hub>,
    /// Takes the sidecars' reports to the leader.
    pub relay: Arc<LeaderRelay>,
    /// Who is connected.
    pub acks: Arc<AckTracker>,
    /// What is counted.
    pub aggregates: Arc<Aggregates>,
    /// Whom this operator is.
    pub me: WorkloadId,
    /// A sidecar must come from an address of its pod. Off only where all come over loopback: in tests and
    /// measurements.
    pub check_addresses: bool,
    /// Resources, compiled once for all sidecars.
    pub cache: Arc<Cache>,
    /// Who looks at single requests.
    pub taps: Arc<Taps>,
    admission: Arc<Admission>,
}

impl Services {
    /// The services.
    pub fn new(
        hub: Arc<Hub>,
        relay: Arc<LeaderRelay>,
        acks: Arc<AckTracker>,
        aggregates: Arc<Aggregates>,
        me: WorkloadId,
    ) -> Self {
        let cache = Cache::following(&hub);
        let (taps, admission) = (Arc::default(), Arc::default());
        Self { hub, relay, acks, aggregates, me, check_addresses: true, cache, taps, admission }
    }

    /// The replica at an address: the name of its pod, or the address where the model does not know the pod.
    fn replica_at(&self, address: IpAddr) -> Arc<str> {
        let name = self.hub.model().pod_at(address).map(|pod| Arc::clone(&pod.name));
        name.unwrap_or_else(|| address.to_string().into())
    }

    /// Whether a sidecar speaks for its own pod: namespace and account are those of its certificate, and its
    /// address is the pod's. One on the node's network has no address of its own.
    fn admit(&self, hello: &Hello, identity: &WorkloadId, address: Option<IpAddr>) -> Result<(), Status> {
        let model = self.hub.model();
        let pod = model.pod(&hello.pod_uid);
        let pod = pod.ok_or_else(|| Status::unavailable("this pod is not known yet"))?;
        if *pod.namespace != *identity.namespace || *pod.service_account != *identity.service_account {
            self.aggregates.refused("stream", "OtherPod");
            tracing::warn!(%identity, pod = %pod.name, "a sidecar asked for another's pod");
            return Err(Status::permission_denied("the certificate is of another workload"));
        }
        if self.check_addresses && !pod.host_network && pod.ips.is_empty() {
            return Err(Status::unavailable("this pod's address is not known yet"));
        }
        let own = address.is_some_and(|address| pod.ips.iter().any(|ip| ip.to_canonical() == address));
        if self.check_addresses && !pod.host_network && !own {
            self.aggregates.refused("stream", "OtherAddress");
            tracing::warn!(%identity, pod = %pod.name, ?address, "a sidecar speaks from an address that is not its pod's");
            return Err(Status::permission_denied(
                "the connection comes from an address that is not this pod's",
            ));
        }
        Ok(())
    }
}

/// Serves for ever.
pub async fn serve(listener: TcpListener, tls: Arc<Tls>, services: Services, signer: impl Identity) {
    let routes = Routes::new(DiscoveryServer::new(services.clone()))
        .add_service(RelayServer::new(services))
        .add_service(IdentityServer::new(signer));
    loop {
        let (stream, peer) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                // Out of file descriptors, say: waiting a little lets others close.
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(Duration::from_millis(10)).await;
                continue;
            }
        };
        let (tls, routes) = (Arc::clone(&tls), routes.clone());
        tokio::spawn(async move {
            if let Err(error) = connection(stream, peer.ip().to_canonical(), &tls, routes).await {
                tracing::debug!(%peer, error = format!("{error:#}"), "a connection ended");
            }
        });
    }
}

async fn connection(stream: TcpStream, address: IpAddr, tls: &Tls, routes: Routes) -> Result<()> {
    stream.set_nodelay(true)?;
    let config = Arc::clone(&tls.server.read().unwrap_or_else(PoisonError::into_inner));
    let stream = timeout(Duration::from_secs(10), TlsAcceptor::from(config).accept(stream)).await??;
    let leaf = stream.get_ref().1.peer_certificates().and_then(|chain| chain.first());
    let identity = leaf.map(tulle_mesh::svid::peer_identity).transpose()?;
    let identity = PeerIdentity(identity);
    let hang_up = Arc::new(Notify::new());
    let from = Connection { address, hang_up: Arc::clone(&hang_up) };
    let service = tower::ServiceBuilder::new()
        .map_request(move |mut request: http::Request<hyper::body::Incoming>| {
            request.extensions_mut().insert(identity.clone());
            request.extensions_mut().insert(from.clone());
            request.map(tonic::body::Body::new)
        })
        .service(routes.prepare());
    let serve = hyper::server::conn::http2::Builder::new(TokioExecutor::new())
        .timer(TokioTimer::new())
        .keep_alive_interval(Duration::from_secs(10))
        .max_concurrent_streams(16)
        .max_header_list_size(16 * 1024)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(service));
    tokio::select! {
        end = serve => Ok(end?),
        () = hang_up.notified() => anyhow::bail!("its sidecar reads nothing"),
    }
}

fn caller<T>(request: &Request<T>) -> Result<WorkloadId, Status> {
    let identity = request.extensions().get::<PeerIdentity>().and_then(|peer| peer.0.clone());
    identity.ok_or_else(|| Status::unauthenticated("a certificate of this mesh is needed"))
}

/// Takes a message out of its box.
type Unbox = fn(Down) -> Result<OperatorMessage, Status>;

#[tonic::async_trait]
impl Discovery for Services {
    type StreamStream = Map<ReceiverStream<Down>, Unbox>;

    async fn stream(
        &self,
        request: Request<Streaming<SidecarMessage>>,
    ) -> Result<Response<Self::StreamStream>, Status> {
        let identity = caller(&request)?;
        if !self.hub.is_synced() {
            return Err(Status::unavailable("the operator is still reading the cluster"));
        }
        let from = request.extensions().get::<Connection>().cloned();
        let mut up = request.into_inner();
        let first = timeout(Duration::from_secs(10), up.message()).await;
        let first = first.map_err(|_| Status::deadline_exceeded("no hello"))??;
        let Some(sidecar_message::Message::Hello(hello)) = first.and_then(|message| message.message) else {
            return Err(Status::invalid_argument("a hello comes first"));
        };
        self.admit(&hello, &identity, from.as_ref().map(|from| from.address))?;
        let held = hello.held.into_iter().filter_map(|held| Some((name_of(held.name?), held.version)));
        let held: HashMap<_, _> = held.take(MAX_SUBSCRIPTIONS).collect();
        let build = Build {
            version: bounds::version(&hello.version),
            lacks: lacking(&hello.features),
            taps: hello.features.iter().any(|feature| feature == tap::FEATURE),
        };
        let (down, messages) = mpsc::channel(64);
        let session = Session {
            hub: Arc::clone(&self.hub),
            cache: Arc::clone(&self.cache),
            relay: Arc::clone(&self.relay),
            admission: Arc::clone(&self.admission),
            taps: Arc::clone(&self.taps),
            pod_uid: hello.pod_uid,
            down,
            number: 0,
            hang_up: from.map(|from| from.hang_up).unwrap_or_default(),
        };
        tokio::spawn(session.run(up, held, build));
        let unbox: Unbox = |message| message.map(|message| *message);
        Ok(Response::new(ReceiverStream::new(messages).map(unbox)))
    }
}

#[tonic::async_trait]
impl Relay for Services {
    type ForwardStream = ReceiverStream<Result<RelayReply, Status>>;
    type HistoryStream = replicate::Chunks;

    async fn history(
        &self,
        request: Request<HistoryRequest>,
    ) -> Result<Response<Self::HistoryStream>, Status> {
        if caller(&request)? != self.me {
            return Err(Status::permission_denied("only replicas of the operator copy the history"));
        }
        if !self.relay.leads() {
            return Err(Status::unavailable("this replica does not lead"));
        }
        Ok(Response::new(replicate::stream(Arc::clone(&self.aggregates), self.relay.leadership())))
    }

    async fn forward(
        &self,
        request: Request<Streaming<RelayMessage>>,
    ) -> Result<Response<Self::ForwardStream>, Status> {
        if caller(&request)? != self.me {
            return Err(Status::permission_denied("only replicas of the operator relay"));
        }
        let address = request.extensions().get::<Connection>().map(|from| from.address);
        let (sender, replies) = mpsc::channel(256);
        let services = self.clone();
        let mut messages = request.into_inner();
        tokio::spawn(async move {
            let mut mine: HashMap<String, u32> = HashMap::new();
            let mut replica = None;
            while let Ok(Some(relayed)) = messages.message().await {
                let uid = relayed.pod_uid;
                match relayed.message {
                    // Counts that are taken by one who leads no more would be lost.
                    Some(relay_message::Message::Telemetry(_)) if !services.relay.leads() => break,
                    Some(relay_message::Message::Telemetry(report)) => {
                        for event in of_sidecar(&report) {
                            services.acks.relayed(&uid, event);
                        }
                        // A number is given to what is counted.
                        if report.sequence == 0 {
                            continue;
                        }
                        let TelemetryAck { sequence, forgotten } = services.relay.count(&uid, &report);
                        let reply = RelayReply { pod_uid: uid, sequence, forgotten };
                        if !matches!(timeout(ANSWER_WITHIN, sender.send(Ok(reply))).await, Ok(Ok(()))) {
                            break;
                        }
                    }
                    message => {
                        let connects = matches!(&message, Some(relay_message::Message::Connected(true)));
                        if let Some(relay_message::Message::Connected(connected)) = &message {
                            let streams = mine.entry(uid.clone()).or_default();
                            *streams = if *connected { *streams + 1 } else { streams.saturating_sub(1) };
                        }
                        if let Some(report) = message.and_then(|message| report_of(message, relayed.stamps)) {
                            services.acks.relayed(&uid, report);
                        }
                        if connects {
                            replica = replica.or_else(|| address.map(|address| services.replica_at(address)));
                            services.acks.set_replica(&uid, replica.as_ref());
                        }
                    }
                }
            }
            // The replica is gone, and its streams with it.
            for (uid, streams) in mine {
                for _ in 0..streams {
                    services.acks.relayed(&uid, SidecarEvent::Gone);
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(replies)))
    }
}

#[cfg(test)]
mod tests {
    use tonic::Code;

    use super::*;
    use crate::lease::Leadership;
    use crate::model::Pod;
    use crate::model::tests::{pod, shop};

    fn services(pod: Pod) -> Services {
        let (_, leadership) = tokio::sync::watch::channel(Leadership::default());
        let hub = Arc::new(Hub::complete(shop(&[pod])));
        let relay = LeaderRelay::new(Arc::default(), Arc::default(), Arc::clone(&hub), leadership);
        let me = WorkloadId::new("cluster.local", "mesh", "operator");
        Services::new(hub, relay, Arc::default(), Arc::default(), me)
    }

    fn admit(services: &Services, account: &str, address: &str) -> Result<(), Code> {
        let hello = Hello { pod_uid: "uid-a".into(), ..Hello::default() };
        let identity = WorkloadId::new("cluster.local", "shop", account);
        let address = Some(address.parse().unwrap());
        services.admit(&hello, &identity, address).map_err(|status| status.code())
    }

    #[test]
    fn a_hello_comes_from_the_pod_that_it_names() {
        let mut services = services(pod("a", "10.1.0.1", "r1"));
        assert_eq!(admit(&services, "web", "10.1.0.1"), Ok(()));
        assert_eq!(admit(&services, "other", "10.1.0.1"), Err(Code::PermissionDenied));
        assert_eq!(admit(&services, "web", "10.1.0.2"), Err(Code::PermissionDenied));
        let refused = (("stream", "OtherAddress"), 1);
        assert!(services.aggregates.refusals().contains(&refused));
        services.check_addresses = false;
        assert_eq!(admit(&services, "web", "10.1.0.2"), Ok(()));
    }

    #[test]
    fn a_replica_is_named_by_its_pod_or_by_its_address() {
        let services = services(pod("operator-1", "10.1.0.1", "r1"));
        let name = |address: &str| services.replica_at(address.parse().unwrap());
        assert_eq!([&*name("10.1.0.1"), &*name("10.1.0.2")], ["operator-1", "10.1.0.2"]);
    }

    #[test]
    fn a_pod_without_addresses_of_its_own_is_known_by_its_certificate_or_asked_to_wait() {
        let host = Pod { host_network: true, ..pod("a", "10.1.0.1", "r1") };
        assert_eq!(admit(&services(host), "web", "192.0.2.1"), Ok(()));
        let new = Pod { ips: Box::default(), ..pod("a", "10.1.0.1", "r1") };
        assert_eq!(admit(&services(new), "web", "10.1.0.1"), Err(Code::Unavailable));
    }
}
