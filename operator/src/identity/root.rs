//! The root's Secret: created once, by the leader, for a mesh that never had a root; never silently replaced.
//!
//! ```text
//!   Secret         the mesh had a root        what an operator does when it starts
//!   a root         –                          uses it
//!   absent         no                         competes for the Lease; the leader creates a root
//!   absent         yes                        waits until the Secret is restored from its backup
//!   absent         yes, annotation new-root   as in a new mesh
//!   invalid        –                          waits until it is repaired or deleted
//! ```
//! `status.trustDomain` of MeshConfig mesh shows that the mesh had a root: the operator writes it after it has loaded one.
//! A running operator keeps the root in memory. If the Secret no longer contains that root, the leader reports it in
//! condition RootValid of the MeshConfig and in an event.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result};
use k8s_openapi::api::core::v1::{ObjectReference, Secret};
use kube::api::PostParams;
use kube::runtime::events::Recorder;
use kube::{Api, Client, Resource as _};
use tokio::sync::watch;
use tokio::time::{sleep, timeout};
use tulle_crds::MeshConfig;
use tulle_mesh::event_reason::EventReason;

use super::authority::{Authority, SECRET};
use crate::lease::Leadership;
use crate::status::{event, recorder};
use crate::watch::Hub;

/// Annotation of MeshConfig mesh that allows a new root although the mesh had one.
pub const NEW_ROOT: &str = "tulle.dev/new-root";
/// Time between two reads of the Secret by an operator without a root.
const READ_EVERY: Duration = Duration::from_millis(500);
/// Time between two comparisons of the Secret with the root in memory, by the leader.
const COMPARE_EVERY: Duration = Duration::from_secs(10);
/// Timeout of one request.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);

/// Content of the Secret.
pub enum SecretContent {
    /// The Secret does not exist.
    Absent,
    /// It contains no valid root, for this reason.
    Invalid(String),
    /// It contains this root.
    Root(Box<Authority>),
}

/// What an operator without a root does next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Use the root.
    Use,
    /// Create a root if this replica leads.
    Create,
    /// Wait for a person. The message says what is wrong and what to do.
    Wait(String),
}

/// Decides what an operator without a root does next.
pub fn decide(found: &SecretContent, config: Option<&MeshConfig>) -> Step {
    let had_a_root =
        config.and_then(|config| config.status.as_ref()).is_some_and(|status| status.trust_domain.is_some());
    match found {
        SecretContent::Root(_) => Step::Use,
        SecretContent::Invalid(why) => Step::Wait(RootState::Mismatch(why.clone()).message()),
        SecretContent::Absent if !had_a_root || config.is_some_and(|config| new_root(config).is_some()) => {
            Step::Create
        }
        SecretContent::Absent => Step::Wait(RootState::Missing.message()),
    }
}

/// The value of the annotation that allows a new root.
pub fn new_root(config: &MeshConfig) -> Option<&str> {
    let annotations = config.metadata.annotations.as_ref()?;
    annotations.get(NEW_ROOT).map(String::as_str).filter(|id| !id.is_empty())
}

/// How the Secret compares with the root in use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RootState {
    /// It contains the root in use.
    Valid,
    /// It does not exist.
    Missing,
    /// It contains no valid root, for this reason.
    Mismatch(String),
    /// It contains a different root.
    Replaced,
}

impl RootState {
    /// Compares the content of the Secret with the root in use.
    pub fn of(found: &SecretContent, in_use: &Authority) -> Self {
        match found {
            SecretContent::Absent => Self::Missing,
            SecretContent::Invalid(why) => Self::Mismatch(why.clone()),
            SecretContent::Root(root) if root.root() == in_use.root() => Self::Valid,
            SecretContent::Root(_) => Self::Replaced,
        }
    }

    /// Whether it contains the root in use.
    pub fn is_valid(&self) -> bool {
        *self == Self::Valid
    }

    /// Reason of the event; `None`: there is nothing to report.
    pub fn event(&self) -> Option<EventReason> {
        match self {
            Self::Valid => None,
            Self::Missing => Some(EventReason::RootMissing),
            Self::Mismatch(_) => Some(EventReason::RootMismatch),
            Self::Replaced => Some(EventReason::RootReplaced),
        }
    }

    /// Reason of the condition.
    pub fn reason(&self) -> &'static str {
        self.event().map_or("RootInUse", EventReason::name)
    }

    /// Message of the condition and of the event: what is wrong and what to do.
    pub fn message(&self) -> String {
        match self {
            Self::Valid => format!("Secret {SECRET} contains the root in use"),
            Self::Missing => format!(
                "Secret {SECRET} is missing, and this mesh has a root. Running operators keep it in memory; an operator that starts waits for the Secret. Restore it from its backup. If there is no backup, annotate MeshConfig mesh with {NEW_ROOT}=ID: the operators restart and create a new root, and sidecars reject each other until all have a certificate of the new root"
            ),
            Self::Mismatch(why) => format!(
                "Secret {SECRET} contains no valid root: {why}. Running operators keep theirs in memory; an operator that starts waits for the Secret. Restore it from its backup. If there is no backup, delete the Secret and follow the message of reason RootMissing"
            ),
            Self::Replaced => format!(
                "Secret {SECRET} contains a different root than the one in use. An operator that starts would use it, and sidecars would reject each other until all have a certificate of that root. Restore the Secret from its backup, or restart the operators if the new root is intended"
            ),
        }
    }
}

/// Reads the Secret.
///
/// # Errors
/// The API server did not answer, or refused the request.
pub async fn read(client: &Client, namespace: &str) -> Result<SecretContent> {
    let api = Api::<Secret>::namespaced(client.clone(), namespace);
    let secret = timeout(REQUEST_TIMEOUT, api.get_opt(SECRET)).await.context("reading the root's Secret")?;
    let Some(secret) = secret.context("reading the root's Secret")? else { return Ok(SecretContent::Absent) };
    Ok(match Authority::from_secret(&secret) {
        Ok(root) => SecretContent::Root(Box::new(root)),
        Err(error) => SecretContent::Invalid(format!("{error:#}")),
    })
}

/// Returns the root once there is one: waits for it, or creates it as the leader of a mesh that never had one. Calls
/// `compete` when creating it requires the Lease, and `waits` with whether a person has to act.
///
/// # Errors
/// The Secret could not be read or written.
pub async fn obtain(
    client: &Client,
    namespace: &str,
    hub: &Hub,
    leadership: &watch::Receiver<Leadership>,
    mut compete: impl FnMut(),
    waits: impl Fn(bool),
) -> Result<Authority> {
    let mut logged = None;
    loop {
        let found = read(client, namespace).await?;
        let step = decide(&found, hub.model().config());
        waits(matches!(step, Step::Wait(_)));
        match (step, found) {
            (_, SecretContent::Root(root)) => return Ok(*root),
            (Step::Wait(why), _) => {
                if logged.as_ref() != Some(&why) {
                    tracing::error!("not ready: {why}");
                    logged = Some(why);
                }
            }
            _ => {
                compete();
                if leadership.borrow().mine {
                    let trust_domain = hub.model().settings().trust_domain.clone();
                    create(client, namespace, &trust_domain).await?;
                    continue;
                }
            }
        }
        sleep(READ_EVERY).await;
    }
}

/// Creates a root and its Secret, unless the Secret exists by now.
async fn create(client: &Client, namespace: &str, trust_domain: &str) -> Result<()> {
    let (authority, key) = Authority::generate(trust_domain)?;
    let secret = authority.to_secret(&key);
    match Api::<Secret>::namespaced(client.clone(), namespace).create(&PostParams::default(), &secret).await {
        Ok(_) => tracing::info!(trust_domain, "created the root"),
        // It was restored, or a former leader has created it: the caller reads that one next.
        Err(kube::Error::Api(status)) if status.code == 409 => {}
        Err(error) => return Err(error).context("writing the root's Secret"),
    }
    Ok(())
}

/// Compares the Secret with the root in use, while this replica leads. Returns when the Secret is missing and a new
/// root is allowed: the process then exits, and creates the root after its restart.
pub async fn watch(
    client: Client,
    namespace: String,
    hub: Arc<Hub>,
    authority: Arc<Authority>,
    leadership: watch::Receiver<Leadership>,
    state: watch::Sender<Option<RootState>>,
) {
    let recorder = recorder(client.clone());
    loop {
        if leadership.borrow().mine {
            match read(&client, &namespace).await {
                Ok(found) => {
                    let now = RootState::of(&found, &authority);
                    let before = state.send_replace(Some(now.clone()));
                    if now == RootState::Missing && decide(&found, hub.model().config()) == Step::Create {
                        tracing::warn!(
                            "Secret tulle-root is missing and a new root is allowed; restarting to create it"
                        );
                        return;
                    }
                    if !now.is_valid() && before.as_ref() != Some(&now) {
                        warn(&recorder, &now).await;
                    }
                }
                // The condition keeps its last state while the Secret cannot be read.
                Err(error) => tracing::debug!(
                    error = format!("{error:#}"),
                    "cannot compare Secret tulle-root with the root in use"
                ),
            }
        }
        sleep(COMPARE_EVERY).await;
    }
}

async fn warn(recorder: &Recorder, state: &RootState) {
    let Some(reason) = state.event() else { return };
    let message = state.message();
    tracing::error!(reason = reason.name(), "{message}");
    let event = event(reason, "Compare", message.chars().take(1000).collect());
    let about = ObjectReference {
        api_version: Some(MeshConfig::api_version(&()).into_owned()),
        kind: Some(MeshConfig::kind(&()).into_owned()),
        name: Some("mesh".to_owned()),
        ..ObjectReference::default()
    };
    match timeout(REQUEST_TIMEOUT, recorder.publish(&event, &about)).await {
        Ok(Ok(())) => {}
        failed => tracing::debug!(?failed, "cannot write the event"),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn root() -> SecretContent {
        SecretContent::Root(Box::new(Authority::generate("cluster.local").unwrap().0))
    }

    fn config(annotations: Value, status: Value) -> MeshConfig {
        serde_json::from_value(json!({
            "apiVersion": "tulle.dev/v1alpha1", "kind": "MeshConfig",
            "metadata": {"name": "mesh", "annotations": annotations}, "spec": {}, "status": status,
        }))
        .unwrap()
    }

    #[test]
    fn a_root_is_created_only_for_a_mesh_that_never_had_one_or_on_purpose() {
        let (fresh, used) = (json!({}), json!({"trustDomain": "cluster.local"}));
        assert_eq!(decide(&SecretContent::Absent, None), Step::Create);
        assert_eq!(decide(&SecretContent::Absent, Some(&config(json!({}), fresh))), Step::Create);
        let Step::Wait(why) = decide(&SecretContent::Absent, Some(&config(json!({}), used.clone()))) else {
            panic!("a lost root is replaced")
        };
        assert!(why.contains("backup") && why.contains("tulle.dev/new-root=ID"), "{why}");
        let on_purpose = config(json!({NEW_ROOT: "1"}), used.clone());
        assert_eq!(decide(&SecretContent::Absent, Some(&on_purpose)), Step::Create);
        assert!(matches!(
            decide(&SecretContent::Absent, Some(&config(json!({NEW_ROOT: ""}), used))),
            Step::Wait(_)
        ));
    }

    #[test]
    fn a_root_is_used_and_a_broken_one_is_never_replaced() {
        let on_purpose = config(json!({NEW_ROOT: "1"}), json!({}));
        for config in [None, Some(&on_purpose)] {
            assert_eq!(decide(&root(), config), Step::Use);
            let broken = SecretContent::Invalid("ca.key is not the key of ca.crt".to_owned());
            let Step::Wait(why) = decide(&broken, config) else { panic!("a broken root is replaced") };
            assert!(why.contains("ca.key is not the key of ca.crt"), "{why}");
        }
    }

    #[test]
    fn the_state_says_how_the_secret_differs_from_the_root_in_use() {
        let SecretContent::Root(in_use) = root() else { return };
        assert_eq!(RootState::of(&SecretContent::Absent, &in_use).reason(), "RootMissing");
        assert_eq!(RootState::of(&SecretContent::Invalid("x".into()), &in_use).reason(), "RootMismatch");
        assert_eq!(RootState::of(&root(), &in_use).reason(), "RootReplaced");
        let (authority, key) = Authority::generate("cluster.local").unwrap();
        let same = Authority::load(authority.root_pem(), &key).unwrap();
        assert!(RootState::of(&SecretContent::Root(Box::new(same)), &authority).is_valid());
    }
}
