//! What a sidecar enforces that has not taken what it was sent last.

use super::*;
use crate::discovery::Enforced;

/// A sidecar that has acknowledged the first version of the endpoints of `shop/web`.
struct Followed {
    hub: Arc<Hub>,
    sidecar: Sidecar,
    first: Resource,
}

impl Followed {
    async fn new() -> Self {
        let hub = hub();
        let mut sidecar = Sidecar::new(&hub);
        sidecar.subscribes(ResourceType::Endpoints, WEB).await.unwrap();
        let first = sidecar.resources().pop().unwrap();
        sidecar.acknowledges(&first).await;
        Self { hub, sidecar, first }
    }

    async fn sends(&mut self, revision: &str) -> Resource {
        self.hub.change(|model| model.apply_pod(pod("a", "10.1.0.1", revision)));
        self.sidecar.session.send_changed(&mut self.sidecar.state).await.unwrap();
        self.sidecar.resources().pop().unwrap()
    }

    fn behind(&self) -> Option<(Enforced, Option<String>)> {
        let name = named(ResourceType::Endpoints, WEB);
        let behind = self.sidecar.acks.behind(&self.hub.model(), "uid-a", &name);
        behind.map(|behind| (behind.enforced, behind.refused))
    }

    fn late_at(&mut self, now: Instant) {
        self.sidecar.session.tell_late(&mut self.sidecar.state, now);
    }

    /// The connection of the sidecar breaks, and it comes back with this version. The old stream goes on for now.
    fn returns_with(&mut self, version: &str) -> Sidecar {
        let held = [(named(ResourceType::Endpoints, WEB), version.to_owned())];
        let mut sidecar = Sidecar::holding(&self.hub, &held);
        let (_, leadership) = tokio::sync::watch::channel(Leadership::default());
        let acks = Arc::clone(&self.sidecar.acks);
        sidecar.session.relay =
            LeaderRelay::new(Arc::clone(&acks), Arc::default(), Arc::clone(&self.hub), leadership);
        sidecar.session.number = self.sidecar.session.number + 1;
        sidecar.session.relay.begins("uid-a", sidecar.session.number);
        sidecar.acks = acks;
        std::mem::replace(&mut self.sidecar, sidecar)
    }
}

fn earlier(resource: &Resource) -> Enforced {
    Enforced::Earlier(Arc::new(resource.clone()))
}

#[tokio::test]
async fn what_is_enforced_is_known_until_a_later_version_is_taken() {
    let mut followed = Followed::new().await;
    let second = followed.sends("r2").await;
    assert_eq!(followed.behind(), None, "most answers come at once");
    followed.sidecar.refuses(&second).await;
    let first = followed.first.clone();
    assert_eq!(followed.behind(), Some((earlier(&first), Some("too new".to_owned()))));
    let third = followed.sends("r3").await;
    assert_eq!(followed.behind().unwrap().0, earlier(&first), "what was refused is never in force");
    followed.sidecar.acknowledges(&third).await;
    assert_eq!(followed.behind(), None);
    assert!(followed.sidecar.state.lag.is_empty());
}

#[tokio::test]
async fn an_answer_is_late_after_a_second_whenever_its_version_was_sent() {
    let mut followed = Followed::new().await;
    let second = followed.sends("r2").await;
    let first_late_at = followed.sidecar.state.lag.late_at.unwrap();
    followed.sidecar.acknowledges(&second).await;
    followed.sends("r3").await;
    let sent = Instant::now();
    followed.late_at(first_late_at);
    assert_eq!(followed.behind(), None, "the second was answered, and the third was sent later");
    let late_at = followed.sidecar.state.lag.late_at.unwrap();
    assert!(late_at > first_late_at && late_at <= sent + Duration::from_secs(1));
    followed.sends("r4").await;
    let third = followed.sends("r5").await;
    followed.late_at(late_at);
    assert_eq!(followed.behind(), Some((earlier(&second), None)));
    assert_eq!(followed.sidecar.state.lag.late_at, None);
    followed.sidecar.acknowledges(&third).await;
    assert_eq!(followed.behind(), None);
}

#[tokio::test]
async fn a_version_that_is_acknowledged_after_a_later_one_was_sent_is_what_is_enforced() {
    let mut followed = Followed::new().await;
    let second = followed.sends("r2").await;
    let third = followed.sends("r3").await;
    followed.sidecar.acknowledges(&second).await;
    followed.sidecar.refuses(&third).await;
    assert_eq!(followed.behind().unwrap().0, earlier(&second));
}

#[tokio::test]
async fn who_refuses_the_first_version_has_none() {
    let hub = hub();
    let mut sidecar = Sidecar::new(&hub);
    sidecar.subscribes(ResourceType::Access, "uid-a").await.unwrap();
    let first = sidecar.resources().pop().unwrap();
    sidecar.refuses(&first).await;
    let name = named(ResourceType::Access, "uid-a");
    let behind = sidecar.acks.behind(&hub.model(), "uid-a", &name).unwrap();
    assert_eq!(behind.enforced, Enforced::Nothing);
}

#[tokio::test]
async fn a_stream_that_is_over_says_nothing_of_what_the_next_one_has_been_told() {
    let mut followed = Followed::new().await;
    let first = followed.first.clone();
    let second = followed.sends("r2").await;
    let mut old = followed.returns_with(&first.version);
    followed.sidecar.subscribes(ResourceType::Endpoints, WEB).await.unwrap();
    assert_eq!(followed.sidecar.resources(), std::slice::from_ref(&second));
    followed.sidecar.acknowledges(&second).await;
    old.session.tell_late(&mut old.state, Instant::now() + Duration::from_secs(1));
    assert_eq!(followed.behind(), None);
}

#[tokio::test]
async fn who_comes_back_with_an_earlier_version_has_that_as_far_as_it_is_known() {
    let mut followed = Followed::new().await;
    let first = followed.first.clone();
    let second = followed.sends("r2").await;
    followed.sidecar.refuses(&second).await;
    // The same as before, and this replica still has it.
    followed.returns_with(&first.version);
    followed.sidecar.subscribes(ResourceType::Endpoints, WEB).await.unwrap();
    assert_eq!(followed.behind().unwrap().0, earlier(&first));
    // Another one, which nobody has.
    followed.returns_with("older");
    followed.sidecar.subscribes(ResourceType::Endpoints, WEB).await.unwrap();
    assert_eq!(followed.behind().unwrap().0, Enforced::Unknown);
    let third = followed.sends("r3").await;
    followed.sidecar.acknowledges(&third).await;
    assert_eq!(followed.behind(), None);
}

#[tokio::test]
async fn what_was_not_answered_when_the_stream_ended_is_not_taken_for_enforced() {
    let mut followed = Followed::new().await;
    followed.sends("r2").await;
    followed.late_at(Instant::now() + Duration::from_secs(1));
    followed.sidecar.session.relay.report("uid-a", SidecarEvent::Gone);
    assert_eq!(followed.behind(), Some((earlier(&followed.first.clone()), None)));
}
