//! The webhook's serving certificate.
//!
//! The replicas share a certificate authority (CA) in a Secret. Each replica signs its own leaf certificate in memory,
//! renews it daily, and writes the CA into `caBundle` of the webhook configurations.

use std::fmt::Debug;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, Result};
use axum_server::tls_rustls::RustlsConfig;
use k8s_openapi::ByteString;
use k8s_openapi::api::admissionregistration::v1::{
    MutatingWebhookConfiguration, ValidatingWebhookConfiguration,
};
use k8s_openapi::api::core::v1::Secret;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::{Patch, PatchParams, PostParams};
use kube::{Api, Client, Resource};
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose,
};
use rustls::ServerConfig;
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use serde::de::DeserializeOwned;
use serde_json::json;

use crate::inject::SealKey;
use crate::settings::Settings;

const SECRET: &str = "tulle-webhook-authority";
/// Name of both webhook configurations.
const CONFIGURATION: &str = "tulle";
const LEAF_LIFETIME: Duration = Duration::from_secs(7 * 86_400);
const RENEW_EVERY: Duration = Duration::from_secs(86_400);
/// How often `caBundle` is checked, because applying the manifests again can remove it.
const LOOK_EVERY: Duration = Duration::from_secs(10);
const SKEW: Duration = Duration::from_secs(120);

/// The certificate authority that the replicas share.
pub struct Authority {
    pem: String,
    key_pem: String,
    names: Vec<String>,
}

impl Authority {
    /// Reads the CA from its Secret, or creates both. If two replicas create it at once, the first one's is used.
    ///
    /// # Errors
    /// When the Secret can be neither read nor written.
    pub async fn shared(client: &Client, settings: &Settings) -> Result<Self> {
        let (service, namespace) = (&settings.service, &settings.namespace);
        let names =
            vec![format!("{service}.{namespace}.svc"), format!("{service}.{namespace}.svc.cluster.local")];
        let api = Api::<Secret>::namespaced(client.clone(), namespace);
        if let Some(secret) =
            api.get_opt(SECRET).await.with_context(|| format!("cannot read Secret {SECRET}"))?
        {
            return Self::from_secret(&secret, names);
        }
        let mut params = CertificateParams::new(Vec::new())?;
        params.distinguished_name.push(DnType::CommonName, "Tulle webhook authority");
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        params.not_before = (SystemTime::now() - SKEW).into();
        params.not_after = (SystemTime::now() + Duration::from_secs(10 * 365 * 86_400)).into();
        let made = CertifiedIssuer::self_signed(params, KeyPair::generate()?)?;
        let data = [("ca.crt", made.pem()), ("ca.key", made.key().serialize_pem())];
        let data = data.map(|(name, pem)| (name.to_owned(), ByteString(pem.into_bytes())));
        let secret = Secret {
            metadata: ObjectMeta { name: Some(SECRET.to_owned()), ..ObjectMeta::default() },
            data: Some(data.into()),
            ..Secret::default()
        };
        match api.create(&PostParams::default(), &secret).await {
            Ok(secret) => Self::from_secret(&secret, names),
            Err(kube::Error::Api(status)) if status.code == 409 => {
                Self::from_secret(&api.get(SECRET).await?, names)
            }
            Err(error) => Err(error).with_context(|| format!("cannot create Secret {SECRET}")),
        }
    }

    fn from_secret(secret: &Secret, names: Vec<String>) -> Result<Self> {
        let read = |name: &str| {
            let bytes = secret.data.as_ref().and_then(|data| data.get(name));
            let bytes = bytes.with_context(|| {
                format!("Secret {SECRET} has no key {name}; delete it, and a new one is created")
            })?;
            String::from_utf8(bytes.0.clone()).with_context(|| {
                format!(
                    "key {name} of Secret {SECRET} is not PEM; delete the Secret, and a new one is created"
                )
            })
        };
        Ok(Self { pem: read("ca.crt")?, key_pem: read("ca.key")?, names })
    }

    fn leaf(&self) -> Result<Arc<ServerConfig>> {
        let issuer = Issuer::from_ca_cert_pem(&self.pem, KeyPair::from_pem(&self.key_pem)?)?;
        let mut params = CertificateParams::new(self.names.clone())?;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        params.not_before = (SystemTime::now() - SKEW).into();
        params.not_after = (SystemTime::now() + LEAF_LIFETIME).into();
        let key = KeyPair::generate()?;
        let leaf = params.signed_by(&key, &issuer)?;
        let private = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
        let mut config = ServerConfig::builder()
            .with_no_client_auth()
            .with_single_cert(vec![leaf.der().clone()], private)?;
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(Arc::new(config))
    }

    /// The key that signs injected sidecars, derived from the CA's key, which only the replicas have.
    pub fn seal_key(&self) -> SealKey {
        SealKey::derive(self.key_pem.as_bytes())
    }

    /// Signs a leaf certificate now, and a new one every day.
    ///
    /// # Errors
    /// When the first one cannot be signed.
    pub fn serve(self: &Arc<Self>) -> Result<RustlsConfig> {
        let serving = RustlsConfig::from_config(self.leaf()?);
        let (authority, renewed) = (Arc::clone(self), serving.clone());
        tokio::spawn(async move {
            let mut issued = SystemTime::now();
            loop {
                tokio::time::sleep(LOOK_EVERY).await;
                // By the wall clock, which goes on while a machine sleeps; a clock that was set back counts as expired.
                if SystemTime::now().duration_since(issued).is_ok_and(|age| age < RENEW_EVERY) {
                    continue;
                }
                match authority.leaf() {
                    Ok(leaf) => {
                        renewed.reload_from_config(leaf);
                        issued = SystemTime::now();
                    }
                    Err(error) => tracing::error!(
                        error = format!("{error:#}"),
                        "cannot renew the serving certificate; trying again"
                    ),
                }
            }
        });
        Ok(serving)
    }

    /// Keeps the CA in `caBundle` of the webhook configurations. Other fields are not changed.
    ///
    /// Returns when the Secret has been deleted or holds another CA: this process has to restart then.
    pub async fn maintain_ca_bundles(&self, client: &Client, namespace: &str) {
        loop {
            if self.is_replaced(client, namespace).await {
                // Two replicas with different CAs would overwrite each other's caBundle again and again.
                tracing::error!(secret = SECRET, "the Secret no longer holds this replica's CA; restarting");
                return;
            }
            if let Err(error) = self.write_ca_bundles(client).await {
                tracing::warn!(
                    error = format!("{error:#}"),
                    "cannot write caBundle of the webhook configurations; trying again"
                );
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    async fn is_replaced(&self, client: &Client, namespace: &str) -> bool {
        let api = Api::<Secret>::namespaced(client.clone(), namespace);
        match api.get_opt(SECRET).await {
            Ok(Some(secret)) => {
                let pem = secret.data.as_ref().and_then(|data| data.get("ca.crt"));
                pem.is_some_and(|pem| pem.0 != self.pem.as_bytes())
            }
            Ok(None) => true,
            Err(_) => false,
        }
    }

    async fn write_ca_bundles(&self, client: &Client) -> Result<()> {
        let mutating = Api::<MutatingWebhookConfiguration>::all(client.clone());
        if let Some(configuration) = mutating.get_opt(CONFIGURATION).await? {
            let hooks = configuration.webhooks.into_iter().flatten();
            self.write_ca_bundle(
                &mutating,
                hooks.map(|hook| (hook.name, hook.client_config.ca_bundle)).collect(),
            )
            .await?;
        }
        let validating = Api::<ValidatingWebhookConfiguration>::all(client.clone());
        if let Some(configuration) = validating.get_opt(CONFIGURATION).await? {
            let hooks = configuration.webhooks.into_iter().flatten();
            self.write_ca_bundle(
                &validating,
                hooks.map(|hook| (hook.name, hook.client_config.ca_bundle)).collect(),
            )
            .await?;
        }
        Ok(())
    }

    /// Writes the CA into a configuration unless all of its webhooks have it. A strategic merge patch by name, because
    /// with server-side apply this process would own the list entries, and a release that drops a webhook could not
    /// remove it.
    async fn write_ca_bundle<K>(&self, api: &Api<K>, hooks: Vec<(String, Option<ByteString>)>) -> Result<()>
    where
        K: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned,
    {
        let bundle = ByteString(self.pem.clone().into_bytes());
        if hooks.iter().all(|(_, present)| present.as_ref() == Some(&bundle)) {
            return Ok(());
        }
        let hooks: Vec<_> = hooks
            .iter()
            .map(|(name, _)| json!({"name": name, "clientConfig": {"caBundle": bundle}}))
            .collect();
        let patch = Patch::Strategic(json!({"webhooks": hooks}));
        api.patch(CONFIGURATION, &PatchParams::default(), &patch).await?;
        tracing::info!(kind = %K::kind(&()), "wrote caBundle of a webhook configuration");
        Ok(())
    }
}
