//! Taps and sidecars without a network.

use std::time::Duration;

use super::*;

/// A sidecar with what it was sent.
struct Fake {
    registered: Registered,
    sent: Arc<Mutex<Vec<Message>>>,
    has_room: Arc<Mutex<bool>>,
}

impl Fake {
    fn connect(taps: &Arc<Taps>, namespace: &str, workload: &str, is_able: bool, has_room: bool) -> Self {
        let (sent, has_room) = (Arc::new(Mutex::new(Vec::new())), Arc::new(Mutex::new(has_room)));
        let (to, room) = (Arc::clone(&sent), Arc::clone(&has_room));
        let deliver = move |message: Message| {
            let takes = *room.lock().unwrap();
            if takes {
                to.lock().unwrap().push(message);
            }
            takes
        };
        let reporter =
            Reporter { namespace: namespace.into(), kind: "Deployment".into(), workload: workload.into() };
        let sidecar =
            Sidecar { namespace: namespace.into(), pod: format!("{workload}-1").into(), reporter, is_able };
        let registered = taps.register(sidecar, Box::new(deliver), Instant::now());
        Self { registered, sent, has_room }
    }

    fn of(taps: &Arc<Taps>, namespace: &str, workload: &str) -> Self {
        Self::connect(taps, namespace, workload, true, true)
    }

    /// What it was sent since this was asked last.
    fn sent(&self) -> Vec<Message> {
        std::mem::take(&mut *self.sent.lock().unwrap())
    }

    fn says(&self, id: u64, events: usize, passed: u64, lost: u64) {
        let event = TapEvent { path: "/cart".into(), ..TapEvent::default() };
        let tapped =
            Tapped { id, events: vec![event.encode_to_vec(); events], passed, lost, ..Tapped::default() };
        self.registered.tapped(tapped, Instant::now());
    }
}

fn of(namespace: &str, workload: Option<&str>) -> Wanted {
    Wanted { namespace: Some(namespace.to_owned()), workload: workload.map(str::to_owned) }
}

fn message() -> Tap {
    Tap { rate: 20, ..Tap::default() }
}

fn start(taps: &Arc<Taps>, caller: &str, wanted: Wanted) -> Result<Tapping, Denied> {
    taps.start(caller, wanted, message(), Instant::now())
}

fn denied(result: Result<Tapping, Denied>) -> Denied {
    result.err().unwrap()
}

fn tap(id: u64) -> Message {
    Message::Tap(Tap { id, ..message() })
}

fn counts(passed: u64, lost: u64) -> Passed {
    Passed { passed, lost, ..Passed::default() }
}

fn untap(id: u64) -> Message {
    Message::Untap(Untap { id })
}

#[test]
fn a_tap_is_sent_to_the_pods_that_it_wants_and_to_no_others() {
    let taps = Arc::new(Taps::default());
    let (web, cart, other) =
        (Fake::of(&taps, "shop", "web"), Fake::of(&taps, "shop", "cart"), Fake::of(&taps, "payments", "web"));
    let of_web = start(&taps, "anna", of("shop", Some("web"))).unwrap();
    assert_eq!((web.sent(), cart.sent(), other.sent()), (vec![tap(of_web.id)], vec![], vec![]));
    let of_shop = start(&taps, "anna", of("shop", None)).unwrap();
    assert_eq!((of_web.sidecars, of_shop.sidecars), (1, 2));
    assert_eq!(
        (web.sent(), cart.sent(), other.sent()),
        (vec![tap(of_shop.id)], vec![tap(of_shop.id)], vec![])
    );
}

#[test]
fn a_pod_that_connects_later_is_tapped_and_the_end_of_a_tap_reaches_all_of_them() {
    let taps = Arc::new(Taps::default());
    let web = Fake::of(&taps, "shop", "web");
    let tapping = start(&taps, "anna", of("shop", Some("web"))).unwrap();
    let late = Fake::of(&taps, "shop", "web");
    let cart = Fake::of(&taps, "shop", "cart");
    assert_eq!((web.sent(), late.sent()), (vec![tap(tapping.id)], vec![tap(tapping.id)]));
    let id = tapping.id;
    drop(tapping);
    assert_eq!((web.sent(), late.sent(), cart.sent()), (vec![untap(id)], vec![untap(id)], vec![]));
    let after = Fake::of(&taps, "shop", "web");
    assert!(after.sent().is_empty(), "the tap has ended");
}

#[test]
fn a_sidecar_whose_queue_is_full_is_sent_the_tap_later() {
    let taps = Arc::new(Taps::default());
    let web = Fake::connect(&taps, "shop", "web", true, false);
    let tapping = start(&taps, "anna", of("shop", None)).unwrap();
    assert!(web.sent().is_empty());
    *web.has_room.lock().unwrap() = true;
    tapping.attach(Instant::now());
    tapping.attach(Instant::now());
    assert_eq!(web.sent(), vec![tap(tapping.id)], "and only once");
}

#[test]
fn a_sidecar_that_cannot_show_requests_is_named_and_not_asked() {
    let taps = Arc::new(Taps::default());
    let old = Fake::connect(&taps, "shop", "old", false, true);
    let tapping = start(&taps, "anna", of("shop", None)).unwrap();
    assert_eq!((tapping.sidecars, tapping.unable.as_slice()), (0, &["shop/old-1".to_owned()][..]));
    assert!(old.sent().is_empty());
}

#[test]
fn what_a_sidecar_has_seen_reaches_the_reader_of_its_tap() {
    let taps = Arc::new(Taps::default());
    let web = Fake::of(&taps, "shop", "web");
    let mut first = start(&taps, "anna", of("shop", None)).unwrap();
    let mut second = start(&taps, "anna", of("shop", None)).unwrap();
    web.says(first.id, 2, 7, 5);
    let seen = first.events.try_recv().unwrap();
    assert_eq!((&*seen.sidecar.pod, seen.event.path.as_str()), ("web-1", "/cart"));
    assert!(first.events.try_recv().is_ok() && first.events.try_recv().is_err());
    assert!(second.events.try_recv().is_err(), "it is another's");
    assert_eq!(first.passed(), counts(7, 5));
    assert_eq!(first.passed(), Passed::default(), "each is counted once");
}

#[test]
fn a_reader_that_is_slow_loses_requests_and_they_are_counted() {
    let taps = Arc::new(Taps::default());
    let webs: Vec<Fake> = (0..20).map(|_| Fake::of(&taps, "shop", "web")).collect();
    let mut tapping = start(&taps, "anna", of("shop", None)).unwrap();
    webs.iter().for_each(|web| web.says(tapping.id, 60, 60, 0));
    assert_eq!(tapping.passed(), counts(1_200, 1_200 - ROOM as u64));
    let mut shown = 0;
    while tapping.events.try_recv().is_ok() {
        shown += 1;
    }
    assert_eq!(shown, ROOM);
}

#[test]
fn a_sidecar_that_does_not_keep_to_the_rate_takes_no_room_of_others() {
    let taps = Arc::new(Taps::default());
    let (loud, modest) = (Fake::of(&taps, "shop", "loud"), Fake::of(&taps, "shop", "modest"));
    let mut tapping = start(&taps, "anna", of("shop", None)).unwrap();
    let start = Instant::now();
    let flood = Tapped {
        id: tapping.id,
        events: vec![Vec::new(); 10 * ROOM],
        passed: 1,
        lost: 0,
        ..Tapped::default()
    };
    loud.registered.tapped(flood.clone(), start);
    modest.says(tapping.id, 1, 1, 0);
    // Its bucket has been filled as far as a second goes.
    loud.registered.tapped(flood, start + Duration::from_secs(1));
    let mut pods = HashMap::new();
    while let Ok(seen) = tapping.events.try_recv() {
        *pods.entry(seen.sidecar.pod.to_string()).or_insert(0) += 1;
    }
    assert_eq!(pods, HashMap::from([("loud-1".to_owned(), 80), ("modest-1".to_owned(), 1)]));
}

#[test]
fn of_a_message_with_a_hundred_thousand_requests_64_are_looked_at_and_the_others_are_lost() {
    let taps = Arc::new(Taps::default());
    let web = Fake::of(&taps, "shop", "web");
    // A rate that would let through more.
    let message = Tap { rate: 100, ..message() };
    let mut tapping = taps.start("anna", of("shop", None), message, Instant::now()).unwrap();
    let flood =
        Tapped { id: tapping.id, events: vec![Vec::new(); 100_000], passed: 1, lost: 0, ..Tapped::default() };
    web.registered.tapped(flood, Instant::now());
    let shown = std::iter::from_fn(|| tapping.events.try_recv().ok()).count();
    assert_eq!((shown, tapping.passed().lost), (64, 100_000 - 64));
}

#[test]
fn what_is_no_request_is_lost() {
    let taps = Arc::new(Taps::default());
    let web = Fake::of(&taps, "shop", "web");
    let mut tapping = start(&taps, "anna", of("shop", None)).unwrap();
    let tapped = Tapped {
        id: tapping.id,
        events: vec![vec![0xff], Vec::new()],
        passed: 2,
        lost: 0,
        ..Tapped::default()
    };
    web.registered.tapped(tapped, Instant::now());
    assert!(tapping.events.try_recv().is_ok() && tapping.events.try_recv().is_err());
    assert_eq!(tapping.passed(), counts(2, 1));
}

#[test]
fn a_sidecar_that_sends_messages_all_the_time_has_them_dropped_and_their_requests_counted_as_lost() {
    let taps = Arc::new(Taps::default());
    let web = Fake::of(&taps, "shop", "web");
    let tapping = start(&taps, "anna", of("shop", None)).unwrap();
    let at = Instant::now();
    let tell = |id: u64, at: Instant| {
        let tapped = Tapped { id, events: vec![Vec::new()], passed: 1, lost: 0, ..Tapped::default() };
        web.registered.tapped(tapped, at);
    };
    // Three more than are taken at once.
    (0..43).for_each(|_| tell(tapping.id, at));
    assert_eq!(tapping.passed(), counts(43, 3));
    web.sent();
    tell(tapping.id + 100, at);
    assert!(web.sent().is_empty(), "nothing is answered either");
    tell(tapping.id + 100, at + Duration::from_secs(1));
    assert_eq!(web.sent(), [untap(tapping.id + 100)]);
}

#[test]
fn nobody_shows_requests_for_a_tap_that_he_was_not_sent_and_an_end_that_was_missed_is_repeated() {
    let taps = Arc::new(Taps::default());
    let (web, cart) = (Fake::of(&taps, "shop", "web"), Fake::of(&taps, "shop", "cart"));
    let mut tapping = start(&taps, "anna", of("shop", Some("web"))).unwrap();
    cart.says(tapping.id, 1, 1, 0);
    assert!(tapping.events.try_recv().is_err());
    assert_eq!((tapping.passed(), cart.sent()), (Passed::default(), vec![untap(tapping.id)]));
    let id = tapping.id;
    *web.has_room.lock().unwrap() = false;
    drop(tapping);
    *web.has_room.lock().unwrap() = true;
    assert_eq!(web.sent(), vec![tap(id)]);
    web.says(id, 1, 1, 0);
    assert_eq!(web.sent(), vec![untap(id)]);
}

#[test]
fn the_end_of_a_tap_that_found_no_room_is_sent_as_soon_as_anything_is_done_with_the_sidecar() {
    let taps = Arc::new(Taps::default());
    let web = Fake::of(&taps, "shop", "web");
    let tapping = start(&taps, "anna", of("shop", None)).unwrap();
    let id = tapping.id;
    *web.has_room.lock().unwrap() = false;
    drop(tapping);
    let next = start(&taps, "anna", of("shop", None)).unwrap();
    assert_eq!(web.sent(), [tap(id)], "nor is there room for the next");
    *web.has_room.lock().unwrap() = true;
    next.attach(Instant::now());
    assert_eq!(web.sent(), [untap(id), tap(next.id)], "the end first");
    *web.has_room.lock().unwrap() = false;
    let id = next.id;
    drop(next);
    web.registered.send_ends();
    *web.has_room.lock().unwrap() = true;
    web.registered.send_ends();
    web.registered.send_ends();
    assert_eq!(web.sent(), [untap(id)], "and only once");
}

#[test]
fn a_sidecar_that_refuses_a_tap_is_named_with_the_reason_and_not_asked_again() {
    let taps = Arc::new(Taps::default());
    let web = Fake::of(&taps, "shop", "web");
    let tapping = start(&taps, "anna", of("shop", None)).unwrap();
    web.sent();
    let refused = "4 taps are open already".repeat(1_000);
    web.registered.tapped(Tapped { id: tapping.id, refused, ..Tapped::default() }, Instant::now());
    tapping.attach(Instant::now());
    let named = tapping.passed().refused;
    assert!(matches!(&named[..], [one] if one.starts_with("shop/web-1: 4 taps are open") && one.len() < 300));
    assert!(tapping.passed().refused.is_empty(), "it is named once");
    assert!(web.sent().is_empty());
    drop(tapping);
    assert!(web.sent().is_empty(), "it has nothing to end");
}

#[test]
fn of_a_workload_with_more_pods_than_a_tap_looks_at_the_first_are_shown_and_the_others_counted() {
    let taps = Arc::new(Taps::default());
    let mut webs: Vec<Fake> = (0..MAX_SIDECARS + 3).map(|_| Fake::of(&taps, "shop", "web")).collect();
    let tapping = start(&taps, "anna", of("shop", Some("web"))).unwrap();
    assert_eq!((tapping.sidecars, tapping.passed().not_shown), (MAX_SIDECARS, 3));
    let sent = |web: &Fake| !web.sent().is_empty();
    assert!(webs[..MAX_SIDECARS].iter().all(sent) && !webs[MAX_SIDECARS..].iter().any(sent));
    webs.drain(..2);
    tapping.attach(Instant::now());
    assert_eq!(tapping.passed().not_shown, 1, "two have taken the places of those that left");
}

#[test]
fn a_sidecar_that_leaves_makes_room_and_is_sent_nothing_more() {
    let taps = Arc::new(Taps::default());
    let Fake { registered, sent, .. } = Fake::of(&taps, "shop", "web");
    let tapping = start(&taps, "anna", of("shop", None)).unwrap();
    drop(registered);
    drop(tapping);
    assert_eq!(sent.lock().unwrap().len(), 1, "the tap and no end of it");
    assert_eq!(Arc::strong_count(&sent), 1, "its queue is not held");
    let again = start(&taps, "anna", of("shop", None)).unwrap();
    assert_eq!(again.sidecars, 0);
}

#[test]
fn taps_are_bounded_by_replica_by_caller_and_by_the_sidecars_that_they_look_at() {
    let taps = Arc::new(Taps::default());
    let of_anna: Vec<Tapping> =
        (0..MAX_OF_CALLER).map(|_| start(&taps, "anna", of("shop", None)).unwrap()).collect();
    assert_eq!(denied(start(&taps, "anna", of("shop", None))), Denied::Caller("anna".to_owned()));
    let others = MAX_OF_CALLER..MAX_TAPS;
    let of_others: Vec<Tapping> =
        others.map(|caller| start(&taps, &caller.to_string(), of("shop", None)).unwrap()).collect();
    assert_eq!(denied(start(&taps, "bert", of("shop", None))), Denied::Replica);
    drop(of_anna);
    drop(of_others);
    let _many: Vec<Fake> = (0..=MAX_SIDECARS).map(|_| Fake::of(&taps, "shop", "web")).collect();
    let one = Fake::of(&taps, "shop", "cart");
    let refused = denied(start(&taps, "anna", of("shop", None)));
    assert_eq!(refused, Denied::Sidecars(MAX_SIDECARS + 2));
    assert!(refused.to_string().contains("202 sidecars"), "{refused}");
    let tapping = start(&taps, "anna", of("shop", Some("cart"))).unwrap();
    assert_eq!((tapping.sidecars, one.sent()), (1, vec![tap(tapping.id)]));
    assert_eq!(tapping.passed().not_shown, 0);
}
