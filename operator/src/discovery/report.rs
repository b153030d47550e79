//! What is said about a sidecar, and how it travels from a replica to the leader.

use std::sync::Arc;

use prost::Message as _;
use tulle_mesh::features;
use tulle_mesh::proto::{
    Ack, Enforces, Features, Nack, RelayMessage, Resource, ResourceName, ResourceType, Stamp,
    TelemetryReport, enforces, relay_message,
};

use super::bounds;

/// A resource by type and name.
pub type Name = (i32, Arc<str>);

/// The objects whose acknowledgement matters, with their versions in one resource.
pub type Stamps = Arc<[Stamp]>;

/// The version of an acknowledgement that is passed on: its stamps say what was acknowledged.
const ACKNOWLEDGED: &str = "acknowledged";

/// Bytes of an earlier version that are passed on to the leader: such a message waits among others, and all of a mesh may be
/// behind at once.
const MAX_EARLIER: usize = 8 * 1024;

/// What a sidecar says about a resource, to be passed on to the leader.
#[derive(Clone, Debug, PartialEq)]
pub enum SidecarEvent {
    /// It came.
    Connected,
    /// Features of this build that it does not have. Follows [`Self::Connected`] where there are any: what they are for,
    /// it may not even subscribe to, and then it never refuses it.
    Lacks(Vec<&'static str>),
    /// The version of its build. Follows [`Self::Connected`].
    Version(Arc<str>),
    /// When its certificate ends, in Unix seconds.
    CertificateEnds(i64),
    /// How many bytes of memory its process has.
    Memory(u64),
    /// It is gone.
    Gone,
    /// It was sent a version with these stamps, and has not acknowledged it yet.
    Sent(Name, Stamps),
    /// It enforces a version with these stamps.
    Acked(Name, Stamps),
    /// It refused a version with these stamps, for a reason.
    Refused(Name, Stamps, String),
    /// What it enforces in place of the version that it was sent last; `None`: that version.
    Enforces(Name, Option<Enforced>),
    /// It wants no more of this.
    Unsubscribed(Name),
}

/// What a sidecar enforces of a resource, although another version was sent.
#[derive(Clone, Debug, PartialEq)]
pub enum Enforced {
    /// An earlier version.
    Earlier(Arc<Resource>),
    /// An earlier version that the operator does not have any more.
    Unknown,
    /// None: it has refused the first.
    Nothing,
}

/// The features of this build that are in a list, or are not.
fn features_where(matches: impl Fn(&str) -> bool) -> Vec<&'static str> {
    features::ALL.iter().copied().filter(|feature| matches(feature)).collect()
}

/// The features of this build that a sidecar with these does not have.
pub fn lacking(has: &[String]) -> Vec<&'static str> {
    features_where(|feature| !has.iter().any(|name| name == feature))
}

/// The name of a resource of this cluster, as it is sent.
pub fn resource_name((kind, name): &Name) -> ResourceName {
    ResourceName { r#type: *kind, cluster: String::new(), name: name.to_string() }
}

/// The name of a resource of this cluster, as it was received.
pub fn name_of(name: ResourceName) -> Name {
    (name.r#type, name.name.into())
}

/// The name of the endpoints that a route leads to.
pub fn endpoints_name(text: &str) -> Name {
    (ResourceType::Endpoints as i32, text.into())
}

/// A report of a pod's sidecar as a message to the leader.
pub fn message(pod_uid: &str, report: SidecarEvent) -> RelayMessage {
    let nothing = Stamps::from([]);
    let (message, stamps) = match report {
        SidecarEvent::Connected => (relay_message::Message::Connected(true), nothing),
        SidecarEvent::Gone => (relay_message::Message::Connected(false), nothing),
        SidecarEvent::Version(version) => (relay_message::Message::Version(version.to_string()), nothing),
        // As its report has said it, without a number: nothing is counted.
        SidecarEvent::CertificateEnds(certificate_not_after_unix) => {
            let report = TelemetryReport { certificate_not_after_unix, ..Default::default() };
            (relay_message::Message::Telemetry(report), nothing)
        }
        SidecarEvent::Memory(memory_bytes) => {
            let report = TelemetryReport { memory_bytes, ..Default::default() };
            (relay_message::Message::Telemetry(report), nothing)
        }
        SidecarEvent::Lacks(names) => {
            let names = names.into_iter().map(str::to_owned).collect();
            (relay_message::Message::Lacks(Features { names }), nothing)
        }
        SidecarEvent::Sent(name, stamps) => (relay_message::Message::Sent(resource_name(&name)), stamps),
        SidecarEvent::Acked(name, stamps) => {
            let ack = Ack { name: Some(resource_name(&name)), version: ACKNOWLEDGED.to_owned() };
            (relay_message::Message::Ack(ack), stamps)
        }
        SidecarEvent::Refused(name, stamps, reason) => {
            let nack = Nack { name: Some(resource_name(&name)), version: String::new(), reason };
            (relay_message::Message::Nack(nack), stamps)
        }
        SidecarEvent::Enforces(name, enforced) => {
            let what = enforced.map(|enforced| match enforced {
                Enforced::Earlier(resource) if resource.encoded_len() <= MAX_EARLIER => {
                    enforces::What::Earlier(Arc::unwrap_or_clone(resource))
                }
                Enforced::Earlier(_) | Enforced::Unknown => enforces::What::Unknown(true),
                Enforced::Nothing => enforces::What::Nothing(true),
            });
            (relay_message::Message::Enforces(Enforces { name: Some(resource_name(&name)), what }), nothing)
        }
        // An acknowledgement of nothing: the subscription is over.
        SidecarEvent::Unsubscribed(name) => {
            let ack = Ack { name: Some(resource_name(&name)), version: String::new() };
            (relay_message::Message::Ack(ack), nothing)
        }
    };
    RelayMessage {
        pod_uid: pod_uid.to_owned(),
        message: Some(message),
        stamps: stamps.to_vec(),
        ..Default::default()
    }
}

/// A relayed message, as a report.
pub fn report_of(message: relay_message::Message, stamps: Vec<Stamp>) -> Option<SidecarEvent> {
    let stamps: Stamps = stamps.into();
    Some(match message {
        relay_message::Message::Connected(true) => SidecarEvent::Connected,
        relay_message::Message::Connected(false) => SidecarEvent::Gone,
        relay_message::Message::Version(version) if version.is_empty() => return None,
        relay_message::Message::Version(version) => SidecarEvent::Version(bounds::version(&version)),
        relay_message::Message::Lacks(Features { names }) => {
            SidecarEvent::Lacks(features_where(|feature| names.iter().any(|name| name == feature)))
        }
        relay_message::Message::Sent(name) => SidecarEvent::Sent(name_of(name), stamps),
        relay_message::Message::Ack(ack) if ack.version.is_empty() => {
            SidecarEvent::Unsubscribed(name_of(ack.name?))
        }
        relay_message::Message::Ack(ack) => SidecarEvent::Acked(name_of(ack.name?), stamps),
        relay_message::Message::Nack(nack) => SidecarEvent::Refused(name_of(nack.name?), stamps, nack.reason),
        relay_message::Message::Enforces(Enforces { name, what }) => {
            let enforced = what.map(|what| match what {
                enforces::What::Earlier(resource) => Enforced::Earlier(Arc::new(resource)),
                enforces::What::Unknown(_) => Enforced::Unknown,
                enforces::What::Nothing(_) => Enforced::Nothing,
            });
            SidecarEvent::Enforces(name_of(name?), enforced)
        }
        relay_message::Message::Telemetry(report) => return of_sidecar(&report).next(),
    })
}

/// What a report says of the sidecar itself: when its certificate ends, and how much memory it has.
pub fn of_sidecar(report: &TelemetryReport) -> impl Iterator<Item = SidecarEvent> + use<> {
    let (not_after, memory) = (report.certificate_not_after_unix, report.memory_bytes);
    let certificate = (not_after != 0).then_some(SidecarEvent::CertificateEnds(not_after));
    let memory = (memory != 0).then_some(SidecarEvent::Memory(memory));
    certificate.into_iter().chain(memory)
}

#[cfg(test)]
mod tests {
    use tulle_mesh::proto::resource::Body;
    use tulle_mesh::proto::{Endpoint, Endpoints, Route};

    use super::*;

    #[test]
    fn a_sidecar_lacks_what_its_hello_does_not_name() {
        let named: Vec<String> = features::ALL.iter().map(|name| (*name).to_owned()).collect();
        assert!(lacking(&named).is_empty());
        let older: Vec<String> = named.into_iter().filter(|name| name != features::LIMITS_V1).collect();
        assert_eq!(lacking(&older), [features::LIMITS_V1]);
    }

    #[test]
    fn a_report_comes_out_of_its_message_as_it_went_in() {
        let name: Name = (2, "10.0.0.1:80".into());
        let stamp =
            Stamp { kind: 2, namespace: "shop".into(), name: "web".into(), uid: "u".into(), version: 7 };
        let stamps = Stamps::from([stamp]);
        let body = Some(Body::Route(Route::default()));
        let resource = Resource { name: Some(resource_name(&name)), body, ..Resource::default() };
        for report in [
            SidecarEvent::Connected,
            SidecarEvent::Gone,
            SidecarEvent::Version("0.13.0".into()),
            SidecarEvent::CertificateEnds(1_700_000_000),
            SidecarEvent::Memory(7 << 20),
            SidecarEvent::Lacks(vec![features::LIMITS_V1]),
            SidecarEvent::Sent(name.clone(), Arc::clone(&stamps)),
            SidecarEvent::Acked(name.clone(), Arc::clone(&stamps)),
            SidecarEvent::Refused(name.clone(), stamps, "too new".into()),
            SidecarEvent::Enforces(name.clone(), Some(Enforced::Earlier(Arc::new(resource)))),
            SidecarEvent::Enforces(name.clone(), Some(Enforced::Unknown)),
            SidecarEvent::Enforces(name.clone(), Some(Enforced::Nothing)),
            SidecarEvent::Enforces(name.clone(), None),
            SidecarEvent::Unsubscribed(name),
        ] {
            let sent = message("u", report.clone());
            assert_eq!(report_of(sent.message.unwrap(), sent.stamps), Some(report));
        }
    }

    #[test]
    fn an_earlier_version_that_is_large_stays_where_it_is() {
        let name: Name = (ResourceType::Endpoints as i32, "shop/web:80".into());
        let endpoint = Endpoint { address: "10.1.0.1:8080".into(), ..Endpoint::default() };
        let body =
            Some(Body::Endpoints(Endpoints { endpoints: vec![endpoint; 5_000], ..Endpoints::default() }));
        let resource = Arc::new(Resource { name: Some(resource_name(&name)), body, ..Resource::default() });
        let sent = message("u", SidecarEvent::Enforces(name.clone(), Some(Enforced::Earlier(resource))));
        assert!(sent.encoded_len() < 100);
        let unknown = SidecarEvent::Enforces(name, Some(Enforced::Unknown));
        assert_eq!(report_of(sent.message.unwrap(), sent.stamps), Some(unknown));
    }

    /// Builds whose messages have the version beside the oneof read and send the same bytes.
    #[test]
    fn a_version_is_on_the_wire_as_it_was_for_earlier_replicas() {
        let sent = message("u", SidecarEvent::Version("0.13.0".into()));
        assert_eq!(sent.encode_to_vec(), b"\x0a\x01u\x5a\x060.13.0");
    }
}
