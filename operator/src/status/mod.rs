//! Writes the statuses of MeshPolicies, the MeshConfig and routes, the XMesh of this mesh, and events about routes that
//! are not accepted and Services with colliding addresses.
//!
//! ```text
//!   changes of the model ──▶ which objects ──▶ policy, config, routes ──▶ writer ──▶ API server
//!   acknowledgements awaited ──┘               (pure)                     (queue, rate, fence)
//! ```
//! The status of a policy or route is computed when a change may concern it, every [`LOOK_EVERY`] while sidecars have
//! not acknowledged it, and every [`LOOK_AT_ALL`] in any case.

pub mod claims;
pub mod config;
pub mod policy;
pub mod routes;
pub mod writer;
pub mod xmesh;

use std::collections::{HashMap, HashSet};
use std::fmt::Debug;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;
use kube::api::{Patch, PatchParams};
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use kube::{Api, Client};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::json;
use tokio::sync::{Notify, mpsc, watch};
use tokio::time::{MissedTickBehavior, interval, sleep};
use tulle_crds::MeshPolicy;
use tulle_mesh::event_reason::{self, EventReason};

use crate::discovery::AckTracker;
use crate::identity::root::RootState;
use crate::lease::Leadership;
use crate::model::gateway::RouteKey;
use crate::model::{Key, Model, Verdict};
use crate::watch::Hub;
use crate::watch::gateway::Served;
use policy::Progress;
use routes::events::{self, Rejection};
use routes::look::{RouteDecider, Sources};
use routes::times::AcknowledgeTimes;
use writer::{Target, Write, Writer};

/// Time between two looks at a policy that sidecars have not acknowledged.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// Time between two looks at all policies.
const LOOK_AT_ALL: Duration = Duration::from_secs(30);
/// Changes of the model within this time cause one look.
const GATHER: Duration = Duration::from_millis(20);

/// Writes events in the name of the operator.
pub(crate) fn recorder(client: Client) -> Recorder {
    Recorder::new(client, Reporter { controller: "tulle-operator".to_owned(), instance: None })
}

/// An event for [`recorder`]. `action`: what the operator was doing.
pub(crate) fn event(reason: EventReason, action: &str, note: String) -> Event {
    Event {
        type_: match reason.event_type() {
            event_reason::EventType::Normal => EventType::Normal,
            event_reason::EventType::Warning => EventType::Warning,
        },
        reason: reason.name().to_owned(),
        note: Some(note),
        action: action.to_owned(),
        secondary: None,
    }
}

/// Keeps the statuses current while this replica leads. Never returns.
pub async fn run(
    client: Client,
    hub: Arc<Hub>,
    acks: Arc<AckTracker>,
    leadership: watch::Receiver<Leadership>,
    root: watch::Receiver<Option<RootState>>,
    served: watch::Receiver<Option<Served>>,
    times: Arc<AcknowledgeTimes>,
) {
    let (changed, writer) = (Changed::default(), Writer::default());
    let (rejected, rejections) = events::queue();
    let inputs = Inputs { hub: &hub, acks: &acks, leadership: &leadership, root: &root, changed: &changed };
    tokio::join!(
        changed.follow(&hub),
        decide(inputs, Outputs { writer: &writer, rejected: &rejected, times: &times }),
        events::run(client.clone(), rejections),
        xmesh::run(client.clone(), leadership.clone(), served, &writer),
        writer.run(client, leadership.clone()),
    );
}

/// What statuses are decided from.
#[derive(Clone, Copy)]
struct Inputs<'a> {
    hub: &'a Hub,
    acks: &'a AckTracker,
    leadership: &'a watch::Receiver<Leadership>,
    root: &'a watch::Receiver<Option<RootState>>,
    changed: &'a Changed,
}

/// Where decisions go.
#[derive(Clone, Copy)]
struct Outputs<'a> {
    writer: &'a Writer,
    rejected: &'a mpsc::Sender<Rejection>,
    times: &'a AcknowledgeTimes,
}

/// Objects that changes may concern since they were last looked at.
#[derive(Debug, Default)]
struct Changed {
    due: Mutex<Due>,
    some: Notify,
}

#[derive(Debug, Default)]
struct Due {
    all: bool,
    policies: HashSet<Key>,
    routes: HashSet<RouteKey>,
}

impl Changed {
    /// Collects the changes of the model. Never returns.
    async fn follow(&self, hub: &Hub) {
        let mut follower = hub.follow();
        loop {
            let touched = follower.next().await;
            if !touched.everything && touched.policies.is_empty() && touched.routes.is_empty() {
                continue;
            }
            {
                let mut due = self.due.lock().unwrap_or_else(PoisonError::into_inner);
                due.all |= touched.everything;
                due.policies.extend(touched.policies);
                due.routes.extend(touched.routes);
            }
            self.some.notify_one();
        }
    }

    fn take(&self) -> Due {
        std::mem::take(&mut *self.due.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Decides which statuses are written. Never returns.
async fn decide(inputs: Inputs<'_>, outputs: Outputs<'_>) {
    let Inputs { hub, acks, leadership, root, changed } = inputs;
    let Outputs { writer, rejected, times } = outputs;
    let (mut policies, mut routes) = (StatusDecider::default(), RouteDecider::default());
    let mut all_at: Option<Instant> = None;
    let mut ticks = interval(LOOK_EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            () = changed.some.notified() => sleep(GATHER).await,
        }
        if !leadership.borrow().mine || !hub.is_synced() {
            (policies, routes) = (StatusDecider::default(), RouteDecider::default());
            all_at = None;
            // A leader begins with all of them.
            drop((changed.take(), hub.routes().take_changed(), acks.take_changed_routes()));
            continue;
        }
        let due = changed.take();
        let all = due.all || all_at.is_none_or(|at| at.elapsed() >= LOOK_AT_ALL);
        if all {
            all_at = Some(Instant::now());
        }
        let root = root.borrow().clone();
        {
            let model = hub.model();
            policies.look(&model, acks, root.as_ref(), (all, due.policies), writer);
            let sources = Sources { model: &model, records: hub.routes(), acks, writer, rejected, times };
            routes.look(&sources, all, due.routes);
        }
        writer.wake();
    }
}

/// State that is kept between two looks.
#[derive(Debug, Default)]
struct StatusDecider {
    /// Policies that sidecars have not acknowledged.
    pending: HashSet<Key>,
    /// Generation and error in the last status that was written for each policy that cannot be decoded.
    reported: HashMap<Key, (i64, String)>,
}

impl StatusDecider {
    /// Queues the statuses of the MeshConfig, of unreadable policies, and of those policies that are due.
    fn look(
        &mut self,
        model: &Model,
        acks: &AckTracker,
        root: Option<&RootState>,
        (all, mut keys): (bool, HashSet<Key>),
        writer: &Writer,
    ) {
        self.config(model, root, writer);
        self.unreadable(model, writer);
        keys.extend(self.pending.iter().cloned());
        keys.extend(writer.queue().policies().cloned());
        if all {
            keys.extend(model.policies().map(|(key, _)| key.clone()));
        }
        for key in keys {
            self.policy(model, acks, (&key, model.policy(&key)), writer);
        }
    }

    fn config(&self, model: &Model, root: Option<&RootState>, writer: &Writer) {
        let Some(config) = model.config() else { return writer.queue().withdraw(&Target::Config) };
        let trust_domain = &model.settings().trust_domain;
        let next = config::config_status(config, trust_domain, root, &Time(Timestamp::now()));
        let differs = config.status.as_ref() != Some(&next);
        offer(writer, Target::Config, config.metadata.resource_version.clone(), differs.then_some(&next));
    }

    fn policy(
        &mut self,
        model: &Model,
        acks: &AckTracker,
        (key, policy): (&Key, Option<&MeshPolicy>),
        writer: &Writer,
    ) {
        if self.reported.contains_key(key) {
            self.pending.remove(key);
            return;
        }
        let Some(policy) = policy else {
            self.pending.remove(key);
            return writer.queue().withdraw(&Target::Policy(key.clone()));
        };
        let verdict = model.report(key, policy).verdict;
        let progress = Progress::of(model, acks, key, policy);
        if progress.is_complete() || verdict != Verdict::Accepted {
            self.pending.remove(key);
        } else {
            self.pending.insert(key.clone());
        }
        let next = policy::status(key, policy, &verdict, &progress, &Time(Timestamp::now()));
        let differs = policy.status.as_ref() != Some(&next);
        let version = policy.metadata.resource_version.clone();
        offer(writer, Target::Policy(key.clone()), version, differs.then_some(&next));
    }

    /// Queues the status of each unreadable policy once per generation and error, and again until it is written.
    fn unreadable(&mut self, model: &Model, writer: &Writer) {
        let mut known = HashSet::new();
        for (key, found) in model.unreadable_policies() {
            known.insert(key.clone());
            let target = Target::Policy(key.clone());
            let now = (found.generation, found.error.clone());
            let is_told = self.reported.get(key) == Some(&now);
            if is_told && !writer.queue().holds(&target) {
                continue;
            }
            let status = policy::unreadable(found.generation, &found.error, &Time(Timestamp::now()));
            offer(writer, target, found.resource_version.clone(), Some(&status));
            self.reported.insert(key.clone(), now);
        }
        // A policy that was deleted leaves the queue. One that is readable again is treated like every other.
        let (reported, pending) = (&mut self.reported, &mut self.pending);
        reported.retain(|key, _| {
            let stays = known.contains(key);
            if !stays {
                writer.queue().withdraw(&Target::Policy(key.clone()));
                pending.insert(key.clone());
            }
            stays
        });
    }
}

/// Queues a status, or removes a queued one if the object already has the right status.
fn offer<S: Serialize>(writer: &Writer, target: Target, version: Option<String>, status: Option<&S>) {
    match status.map(serde_json::to_value) {
        Some(Ok(status)) => writer.queue().offer(target, Write::new(version, status), Instant::now()),
        Some(Err(error)) => tracing::error!(?target, %error, "a status cannot be encoded"),
        None => writer.queue().withdraw(&target),
    }
}

/// Replaces the status of an object, provided that its resourceVersion is unchanged. A merge would keep fields that the
/// new status no longer has.
///
/// # Errors
/// The object has changed, or the API server did not answer.
pub async fn write<K, S>(api: &Api<K>, name: &str, version: Option<&str>, status: &S) -> anyhow::Result<()>
where
    K: Clone + Debug + DeserializeOwned,
    S: Serialize,
{
    let operations = json!([
        {"op": "test", "path": "/metadata/resourceVersion", "value": version},
        {"op": "add", "path": "/status", "value": status},
    ]);
    let patch: json_patch::Patch = serde_json::from_value(operations)?;
    api.patch_status(name, &PatchParams::default(), &Patch::Json::<()>(patch)).await?;
    Ok(())
}
