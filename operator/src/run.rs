//! Starts the parts of the operator and stops them. The order guarantees that a ready operator listens, and that one
//! which has released the Lease does not write.

use std::collections::HashSet;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use kube::Client;
use rcgen::KeyPair;
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::{ClientConfig, ServerConfig};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tulle_mesh::identity::WorkloadId;
use tulle_mesh::ports;
use tulle_mesh::svid::SvidVerifier;

use crate::api::{self, Api, Authenticator};
use crate::defaults;
use crate::discovery::AckTracker;
use crate::discovery::peer::Tls;
use crate::discovery::relay::LeaderRelay;
use crate::discovery::server::{Services, serve};
use crate::health::{self, Health, Stage};
use crate::identity::authority::Authority;
use crate::identity::{root, sign::Signer, trust};
use crate::lease::{self, Leadership};
use crate::model::{Key, Model};
use crate::rollout::driver::Driver;
use crate::rollout::input::JudgeInputs;
use crate::settings::Settings;
use crate::status;
use crate::tap::Taps;
use crate::telemetry::{Aggregates, replicate};
use crate::uninjected;
use crate::watch::{self as feed, Hub};

/// Time between two renewals of the operator's own certificate, which is valid four times as long.
const OWN_RENEWAL: Duration = Duration::from_secs(6 * 3600);
/// Timeout of a shutdown. The Lease expires if it could not be released in time.
const STOP_WITHIN: Duration = Duration::from_secs(5);

/// Runs until SIGTERM.
///
/// # Errors
/// The API server, the root's Secret or a port is unavailable, or a part ended.
pub async fn run(settings: Settings) -> Result<()> {
    // First: the kernel drops SIGTERM for a process with PID 1 that has no handler.
    let mut terminate = signal(SignalKind::terminate()).context("cannot wait for SIGTERM")?;
    let settings = Arc::new(settings);
    let (stage, stages) = watch::channel(Stage::Starting);
    let (leading, leadership) = watch::channel(Leadership::default());
    let health = Health {
        stage: stages,
        hub: Arc::new(Hub::new(Model::new(&settings.namespace, &settings.trust_domain))),
        acks: Arc::new(AckTracker::default()),
        aggregates: Arc::new(Aggregates::default()),
        times: Arc::default(),
        leadership,
    };
    let listener = bind(ports::HEALTH).await?;
    let routes = health::routes(health.clone());
    tokio::spawn(async move { axum::serve(listener, routes).await });
    let client = Client::try_default().await.context("no connection to the API server")?;
    let started = tokio::select! {
        started = start(&client, &settings, &health, leading, &stage) => started,
        _ = terminate.recv() => return Ok(()),
    };
    let mut operator = started?;
    stage.send_replace(Stage::Serving);
    let end = tokio::select! {
        end = operator.join_next() => end,
        _ = terminate.recv() => Ok(()),
    };
    stage.send_replace(Stage::Stopping);
    if timeout(STOP_WITHIN, operator.stop(client, &settings)).await.is_err() {
        tracing::warn!("shutdown timed out; another replica leads once the Lease has expired");
    }
    end
}

/// The parts of a running operator. None of them is meant to end: if one does, or panics, the process exits and kubelet
/// restarts it.
struct Operator {
    /// Tasks that write to Kubernetes while this replica leads.
    writers: JoinSet<()>,
    /// Tasks that serve sidecars and other replicas.
    servers: JoinSet<()>,
    /// The task that competes for the Lease.
    election: JoinSet<()>,
    stop_election: oneshot::Sender<()>,
}

impl Operator {
    /// Returns when any part has ended, with an error that names its group.
    async fn join_next(&mut self) -> Result<()> {
        let (group, ended) = tokio::select! {
            ended = self.writers.join_next() => ("writes to Kubernetes", ended),
            ended = self.servers.join_next() => ("serves sidecars", ended),
            ended = self.election.join_next() => ("competes for the Lease", ended),
        };
        bail!("a part of the operator that {group} ended: {ended:?}")
    }

    /// Stops leading, then writing, and then releases the Lease, so that another replica leads within about a second.
    /// An interrupted write may still reach the API server: it carries the resourceVersion it is based on, or writes
    /// what the next leader would write too.
    async fn stop(mut self, client: Client, settings: &Settings) {
        // The receiver is dropped if the election has panicked.
        let _ = self.stop_election.send(());
        while self.election.join_next().await.is_some() {}
        self.writers.shutdown().await;
        if let Err(error) = lease::release(client, settings).await {
            tracing::warn!(%error, "cannot release the Lease; another replica leads once it has expired");
        }
    }
}

/// Lists the cluster's objects, loads the certificate authority, opens the discovery port, and starts every part.
async fn start(
    client: &Client,
    settings: &Arc<Settings>,
    health: &Health,
    leading: watch::Sender<Leadership>,
    stage: &watch::Sender<Stage>,
) -> Result<Operator> {
    let Health { hub, acks, aggregates, times, leadership, .. } = health;
    let served = feed::start(client, hub);
    while !hub.is_synced() {
        sleep(Duration::from_millis(20)).await;
    }
    let (stop_election, stop) = oneshot::channel();
    let mut candidacy = Some(lease::run(client.clone(), Arc::clone(settings), leading, stop));
    let mut election = JoinSet::new();
    // In a new mesh no sidecar has to be served yet. Only there may a replica lead before it listens.
    let compete = || drop(candidacy.take().map(|candidacy| election.spawn(candidacy)));
    let waits = |for_a_person| {
        stage.send_replace(if for_a_person { Stage::NoRoot } else { Stage::Starting });
    };
    let authority = root::obtain(client, &settings.namespace, hub, leadership, compete, waits).await?;
    let authority = Arc::new(authority);
    // Takes precedence over arguments and MeshConfig: this root has issued every certificate of the mesh.
    let configured = hub.model().settings().trust_domain.clone();
    let trust_domain = authority.trust_domain().unwrap_or(configured);
    tracing::info!(trust_domain, "certificate authority loaded");
    hub.change(|model| model.fix_trust_domain(&trust_domain));
    let me = WorkloadId::new(&trust_domain, &settings.namespace, &settings.service_account);
    let tls = Arc::new(own_tls(&authority, &me)?);
    // Before this replica can become the leader, because the other replicas connect to it then.
    let listener = bind(ports::DISCOVERY).await?;
    let queries = api::bind(ports::QUERY).await?;

    let relay =
        LeaderRelay::new(Arc::clone(acks), Arc::clone(aggregates), Arc::clone(hub), leadership.clone());
    let mut signer =
        Signer::new(client.clone(), Arc::clone(hub), Arc::clone(&authority), Arc::clone(aggregates));
    signer.check_addresses = settings.check_addresses;
    let mut services =
        Services::new(Arc::clone(hub), Arc::clone(&relay), Arc::clone(acks), Arc::clone(aggregates), me);
    services.check_addresses = settings.check_addresses;
    let mut servers = JoinSet::new();
    servers.spawn(renew(Arc::clone(&tls), Arc::clone(&authority)));
    servers.spawn(relay.run(Arc::clone(&tls)));
    servers.spawn(replicate::follow(Arc::clone(aggregates), Arc::clone(&tls), leadership.clone()));
    servers.spawn(remove_stale(Arc::clone(hub), Arc::clone(aggregates), Arc::clone(acks)));
    let driver = Driver::new(client.clone(), Arc::clone(hub), Arc::clone(acks), Arc::clone(aggregates));
    let answers = answers(client, settings, health, &authority, &services.taps, driver.inputs());
    servers.spawn(api::serve(queries, answers));
    servers.spawn(serve(listener, tls, services, signer));

    let mut writers = JoinSet::new();
    let (root_states, root_state) = watch::channel(None);
    let namespace = settings.namespace.clone();
    writers.spawn(root::watch(
        client.clone(),
        namespace,
        Arc::clone(hub),
        Arc::clone(&authority),
        leadership.clone(),
        root_states,
    ));
    writers.spawn(trust::run(client.clone(), Arc::clone(hub), authority, leadership.clone()));
    writers.spawn(status::run(
        client.clone(),
        Arc::clone(hub),
        Arc::clone(acks),
        leadership.clone(),
        root_state,
        served,
        Arc::clone(times),
    ));
    writers.spawn(status::claims::run(client.clone(), Arc::clone(hub), leadership.clone()));
    writers.spawn(defaults::run(client.clone(), Arc::clone(hub), leadership.clone()));
    writers.spawn(uninjected::run(client.clone(), Arc::clone(hub), leadership.clone()));
    writers.spawn(driver.run(leadership.clone()));

    if let Some(candidacy) = candidacy {
        election.spawn(candidacy);
    }
    Ok(Operator { writers, servers, election, stop_election })
}

/// Sources of the query API and of the page.
fn answers(
    client: &Client,
    settings: &Arc<Settings>,
    health: &Health,
    authority: &Arc<Authority>,
    taps: &Arc<Taps>,
    judge_inputs: Arc<JudgeInputs>,
) -> Api {
    Api {
        hub: Arc::clone(&health.hub),
        acks: Arc::clone(&health.acks),
        aggregates: Arc::clone(&health.aggregates),
        judge_inputs,
        leadership: health.leadership.clone(),
        authority: Arc::clone(authority),
        settings: Arc::clone(settings),
        authenticator: Arc::new(Authenticator::new(client.clone(), &settings.namespace)),
        turns: api::turn::turns(),
        taps: Arc::clone(taps),
    }
}

/// Removes what is kept about sidecars, pods and revisions that no longer exist, every ten minutes.
async fn remove_stale(hub: Arc<Hub>, aggregates: Arc<Aggregates>, acks: Arc<AckTracker>) {
    loop {
        sleep(Duration::from_secs(600)).await;
        acks.forget_lost(&hub.model());
        let (mut pods, mut revisions) = (HashSet::new(), HashSet::new());
        for pod in hub.model().pods() {
            pods.insert(Arc::clone(&pod.uid));
            revisions.insert((pod.namespace.to_string(), pod.revision().to_owned()));
        }
        aggregates.retain(
            |uid| pods.contains(uid),
            |namespace, revision| revisions.contains(&(namespace.to_owned(), revision.to_owned())),
        );
        let canaries: HashSet<Key> = hub.model().canaries().map(|(key, _)| key.clone()).collect();
        aggregates.retain_canaries(|key| canaries.contains(key));
    }
}

/// Listens on every address of the pod; on IPv4 only, where the node has no IPv6.
async fn bind(port: u16) -> Result<TcpListener> {
    match TcpListener::bind((Ipv6Addr::UNSPECIFIED, port)).await {
        Ok(listener) => Ok(listener),
        Err(dual) => TcpListener::bind((Ipv4Addr::UNSPECIFIED, port))
            .await
            .with_context(|| format!("cannot listen on port {port} (with IPv6: {dual})")),
    }
}

/// TLS configurations of the operator, with a certificate that it signs itself.
///
/// # Errors
/// The certificate could not be signed.
pub fn own_tls(authority: &Authority, me: &WorkloadId) -> Result<Tls> {
    let (server, client) = own_configs(authority, me)?;
    Ok(Tls { server: RwLock::new(server), client: RwLock::new(client), identity: me.clone() })
}

fn own_configs(authority: &Authority, me: &WorkloadId) -> Result<(Arc<ServerConfig>, Arc<ClientConfig>)> {
    let key = KeyPair::generate()?;
    let leaf = authority.sign(&key, me, OWN_RENEWAL * 4)?;
    let private = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
    let verifier = SvidVerifier::new(&me.trust_domain, &[authority.root().clone()]);
    let tls13 = &[&rustls::version::TLS13];
    // A new sidecar has no certificate and connects to get one. Every other call requires one.
    let mut server = ServerConfig::builder_with_protocol_versions(tls13)
        .with_client_cert_verifier(verifier.optional())
        .with_single_cert(leaf.chain.clone(), private.clone_key())?;
    server.alpn_protocols = vec![b"h2".to_vec()];
    server.send_tls13_tickets = 0;
    let mut client = ClientConfig::builder_with_protocol_versions(tls13)
        .dangerous()
        .with_custom_certificate_verifier(verifier)
        .with_client_auth_cert(leaf.chain, private)?;
    client.alpn_protocols = vec![b"h2".to_vec()];
    client.enable_sni = false;
    Ok((Arc::new(server), Arc::new(client)))
}

async fn renew(tls: Arc<Tls>, authority: Arc<Authority>) {
    loop {
        sleep(OWN_RENEWAL).await;
        match own_configs(&authority, &tls.identity) {
            Ok((server, client)) => {
                *tls.server.write().unwrap_or_else(PoisonError::into_inner) = server;
                *tls.client.write().unwrap_or_else(PoisonError::into_inner) = client;
            }
            Err(error) => {
                tracing::error!(error = format!("{error:#}"), "cannot renew the operator's certificate")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_port_that_is_taken_is_named() {
        let first = bind(0).await.unwrap();
        let port = first.local_addr().unwrap().port();
        let error = format!("{:#}", bind(port).await.unwrap_err());
        assert!(error.contains(&format!("cannot listen on port {port}")), "{error}");
    }
}
