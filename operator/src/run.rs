//! Wires the parts together.

use std::collections::HashSet;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use kube::Client;
use rcgen::KeyPair;
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::{ClientConfig, ServerConfig};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tulle_mesh::identity::WorkloadId;
use tulle_mesh::ports;
use tulle_mesh::svid::SvidVerifier;

use crate::defaults;
use crate::discovery::Registry;
use crate::discovery::relay::LeaderRelay;
use crate::discovery::server::{Services, Tls, serve};
use crate::health::{self, Health};
use crate::identity::authority::Authority;
use crate::identity::{sign::Signer, trust};
use crate::lease::{self, Leadership};
use crate::rollout::driver::Driver;
use crate::settings::Settings;
use crate::status;
use crate::telemetry::Aggregates;
use crate::uninjected;
use crate::watch::{self as feed, Hub};

/// The operator's own certificate is made anew this often, and lives four times as long.
const OWN_RENEWAL: Duration = Duration::from_secs(6 * 3600);

/// Runs until told to stop.
///
/// # Errors
/// What keeps the operator from starting: no API server, no Secret, no port.
pub async fn run(settings: Settings) -> Result<()> {
    let settings = Arc::new(settings);
    let client = Client::try_default().await.context("no connection to the API server")?;
    let hub = Arc::new(Hub::default());
    let registry = Arc::new(Registry::default());
    let aggregates = Arc::new(Aggregates::default());
    let (leading, leadership) = watch::channel(Leadership::default());
    feed::start(&client, &hub);
    let health = Health {
        hub: Arc::clone(&hub),
        registry: Arc::clone(&registry),
        aggregates: Arc::clone(&aggregates),
        leadership: leadership.clone(),
    };
    let listener = TcpListener::bind(("::", ports::HEALTH)).await.or(bind_v4(ports::HEALTH).await)?;
    tokio::spawn(async move { axum::serve(listener, health::routes(health)).await });

    while !hub.is_synced() {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let trust_domain = hub.model().settings().trust_domain.clone();
    let authority = Arc::new(Authority::shared(&client, &settings.namespace, &trust_domain).await?);
    // Whatever the MeshConfig says by now: every certificate out there is of the root's.
    let trust_domain = authority.trust_domain().unwrap_or(trust_domain);
    hub.change(|model| model.fix_trust_domain(&trust_domain));
    let me = WorkloadId::new(&trust_domain, &settings.namespace, &settings.service_account);
    let tls = Arc::new(own_tls(&authority, &me)?);
    tokio::spawn(renew(Arc::clone(&tls), Arc::clone(&authority)));

    let relay = LeaderRelay::new(Arc::clone(&registry), Arc::clone(&aggregates), leadership.clone());
    // None of these ends by itself: when one does, or panics, Kubernetes starts the operator anew.
    let mut parts = JoinSet::new();
    parts.spawn(lease::run(client.clone(), Arc::clone(&settings), Arc::new(leading)));
    parts.spawn(Arc::clone(&relay).run(Arc::clone(&tls)));
    parts.spawn(trust::run(client.clone(), Arc::clone(&hub), Arc::clone(&authority), leadership.clone()));
    parts.spawn(status::run(client.clone(), Arc::clone(&hub), Arc::clone(&registry), leadership.clone()));
    parts.spawn(defaults::run(client.clone(), Arc::clone(&hub), leadership.clone()));
    parts.spawn(uninjected::run(client.clone(), Arc::clone(&hub), leadership.clone()));
    parts.spawn(keep_house(Arc::clone(&hub), Arc::clone(&aggregates), Arc::clone(&registry)));
    let driver =
        Driver::new(client.clone(), Arc::clone(&hub), Arc::clone(&registry), Arc::clone(&aggregates));
    parts.spawn(driver.run(leadership));

    let signer = Signer::new(client, Arc::clone(&hub), authority, Arc::clone(&aggregates));
    let services = Services::new(hub, relay, registry, aggregates, me);
    let listener = TcpListener::bind(("::", ports::DISCOVERY)).await.or(bind_v4(ports::DISCOVERY).await)?;
    parts.spawn(serve(listener, tls, services, signer));
    let mut terminate = signal(SignalKind::terminate())?;
    tokio::select! {
        ended = parts.join_next() => bail!("a part of the operator ended: {ended:?}"),
        _ = terminate.recv() => Ok(()),
    }
}

/// Forgets now and then what is known of sidecars, pods and revisions that are no more.
async fn keep_house(hub: Arc<Hub>, aggregates: Arc<Aggregates>, registry: Arc<Registry>) {
    loop {
        tokio::time::sleep(Duration::from_secs(600)).await;
        registry.forget_lost(&hub.model());
        let (mut pods, mut revisions) = (HashSet::new(), HashSet::new());
        for pod in hub.model().pods() {
            pods.insert(Arc::clone(&pod.uid));
            revisions.insert((pod.namespace.to_string(), pod.revision().to_owned()));
        }
        aggregates.retain(
            |uid| pods.contains(uid),
            |namespace, revision| revisions.contains(&(namespace.to_owned(), revision.to_owned())),
        );
    }
}

async fn bind_v4(port: u16) -> std::io::Result<TcpListener> {
    TcpListener::bind(("0.0.0.0", port)).await
}

/// A certificate of our own root for ourselves.
///
/// # Errors
/// When it cannot be signed.
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
    // Sidecars without a certificate yet may come, to ask for one; what else they may is decided per call.
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
        tokio::time::sleep(OWN_RENEWAL).await;
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
