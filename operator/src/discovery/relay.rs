//! What sidecars report reaches the leader, whichever replica they are connected to. A replica that
//! does not lead keeps one stream to the leader; a report counts as taken when the leader has it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::UnboundedReceiverStream;
use tulle_mesh::proto::relay_client::RelayClient;
use tulle_mesh::proto::{Ack, Nack, RelayMessage, ResourceName, TelemetryReport, relay_message};

use super::registry::{Registry, Report};
use super::server::{Peer, Tls};
use crate::lease::Leadership;
use crate::telemetry::Aggregates;

/// Passes what this replica's sidecars report on to the leader; on the leader itself, to its own registry.
pub struct LeaderRelay {
    registry: Arc<Registry>,
    aggregates: Arc<Aggregates>,
    leadership: watch::Receiver<Leadership>,
    /// The stream to the leader, while there is one.
    leader: Mutex<Option<mpsc::UnboundedSender<RelayMessage>>>,
    /// Sessions that wait for the leader to take a report.
    waiting: Mutex<HashMap<String, mpsc::UnboundedSender<u64>>>,
}

impl LeaderRelay {
    /// A relay without a stream: [`Self::run`] keeps one.
    pub fn new(
        registry: Arc<Registry>,
        aggregates: Arc<Aggregates>,
        leadership: watch::Receiver<Leadership>,
    ) -> Arc<Self> {
        Arc::new(Self {
            registry,
            aggregates,
            leadership,
            leader: Mutex::default(),
            waiting: Mutex::default(),
        })
    }

    /// Takes a report of a sidecar of this replica.
    pub fn report(&self, pod_uid: &str, report: Report) {
        self.registry.report(pod_uid, report, |report| {
            if let Some(leader) = &*self.leader.lock().unwrap_or_else(PoisonError::into_inner) {
                let _ = leader.send(message(pod_uid, report));
            }
        });
    }

    /// Takes counts of a sidecar of this replica. Returns whether they are taken for good; otherwise the
    /// leader's answer comes by [`Self::telemetry_acks`].
    pub fn telemetry(&self, pod_uid: &str, report: TelemetryReport) -> bool {
        if self.leadership.borrow().mine {
            self.aggregates.add(pod_uid, &report);
            return true;
        }
        if let Some(leader) = &*self.leader.lock().unwrap_or_else(PoisonError::into_inner) {
            let message = relay_message::Message::Telemetry(report);
            let _ = leader.send(RelayMessage {
                pod_uid: pod_uid.to_owned(),
                message: Some(message),
                ..Default::default()
            });
        }
        false
    }

    /// Whether this replica leads.
    pub fn leads(&self) -> bool {
        self.leadership.borrow().mine
    }

    /// Sequence numbers of reports that the leader has taken.
    pub fn telemetry_acks(&self, pod_uid: &str) -> mpsc::UnboundedReceiver<u64> {
        let (sender, receiver) = mpsc::unbounded_channel();
        let mut waiting = self.lock_waiting();
        // Those of streams that have ended; a stream that took over under the same pod stays.
        waiting.retain(|_, session| !session.is_closed());
        waiting.insert(pod_uid.to_owned(), sender);
        receiver
    }

    fn lock_waiting(&self) -> std::sync::MutexGuard<'_, HashMap<String, mpsc::UnboundedSender<u64>>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps a stream to whoever leads.
    pub async fn run(self: Arc<Self>, tls: Arc<Tls>) {
        let mut leadership = self.leadership.clone();
        loop {
            let leader = leadership.borrow_and_update().clone();
            if let (false, Some(address)) = (leader.mine, &leader.address) {
                tokio::select! {
                    end = self.forward(address, &tls) => if let Err(error) = end {
                        tracing::warn!(address, error = format!("{error:#}"), "the stream to the leader ended");
                    },
                    _ = leadership.changed() => {}
                }
                *self.leader.lock().unwrap_or_else(PoisonError::into_inner) = None;
                tokio::time::sleep(Duration::from_millis(500)).await;
            } else if leadership.changed().await.is_err() {
                return;
            }
        }
    }

    async fn forward(&self, address: &str, tls: &Tls) -> anyhow::Result<()> {
        let peer = Peer::connect(address, tls).await?;
        let mut client = RelayClient::with_origin(peer, http::Uri::from_static("http://leader.tulle"));
        let (sender, messages) = mpsc::unbounded_channel();
        self.registry.snapshot(|reports| {
            for (uid, report) in reports {
                let _ = sender.send(message(&uid, report));
            }
            *self.leader.lock().unwrap_or_else(PoisonError::into_inner) = Some(sender);
        });
        let mut replies = client.forward(UnboundedReceiverStream::new(messages)).await?.into_inner();
        while let Some(reply) = replies.message().await? {
            if let Some(session) = self.lock_waiting().get(&reply.pod_uid) {
                let _ = session.send(reply.sequence);
            }
        }
        anyhow::bail!("the leader closed the stream")
    }
}

fn message(pod_uid: &str, report: Report) -> RelayMessage {
    let name =
        |(kind, name): (i32, String)| Some(ResourceName { r#type: kind, cluster: String::new(), name });
    let message = match report {
        Report::Connected => relay_message::Message::Connected(true),
        Report::Gone => relay_message::Message::Connected(false),
        Report::Sent(id) => {
            relay_message::Message::Sent(ResourceName { r#type: id.0, cluster: String::new(), name: id.1 })
        }
        Report::Acked(id, version) => relay_message::Message::Ack(Ack { name: name(id), version }),
        Report::Refused(id, version, reason) => {
            relay_message::Message::Nack(Nack { name: name(id), version, reason })
        }
        // An acknowledgement of nothing: the subscription is over.
        Report::Unsubscribed(id) => {
            relay_message::Message::Ack(Ack { name: name(id), version: String::new() })
        }
    };
    RelayMessage { pod_uid: pod_uid.to_owned(), message: Some(message), ..Default::default() }
}

/// A relayed message, as a report.
pub fn report_of(message: relay_message::Message) -> Option<Report> {
    let id = |name: Option<ResourceName>| name.map(|name| (name.r#type, name.name));
    Some(match message {
        relay_message::Message::Connected(true) => Report::Connected,
        relay_message::Message::Connected(false) => Report::Gone,
        relay_message::Message::Sent(name) => Report::Sent(id(Some(name))?),
        relay_message::Message::Ack(ack) if ack.version.is_empty() => Report::Unsubscribed(id(ack.name)?),
        relay_message::Message::Ack(ack) => Report::Acked(id(ack.name)?, ack.version),
        relay_message::Message::Nack(nack) => Report::Refused(id(nack.name)?, nack.version, nack.reason),
        relay_message::Message::Telemetry(_) => return None,
    })
}
