//! Whom suggested policies admit, and what is said about the others.

use super::*;

#[test]
fn clients_without_an_identity_are_counted_beside_the_suggested_policy() {
    let mut model = world();
    let mut sum = last_hour();
    let (id, counts) = counted(Some("cart"), 5);
    let outbound = |workload: &str, mtls: bool| {
        let reporter =
            Reporter { namespace: "shop".into(), kind: "Deployment".into(), workload: workload.into() };
        let peer = "web".into();
        (SeriesId { reporter, direction: Direction::Outbound, peer, mtls, ..id.clone() }, counts.clone())
    };
    sum.series.extend([outbound("batch", false), outbound("cart", true)]);
    let ask =
        |model: &Model| access(model, &sum, "shop", "web", AccessDirection::WhoCan).unwrap().unidentified;
    let found = ask(&model);
    let [one] = found.as_slice() else { panic!("{found:?}") };
    assert_eq!((one.destination.name.as_str(), one.plain, one.merged), ("web", 7, 0));
    let senders: Vec<&str> = one.senders.iter().map(|party| party.name.as_str()).collect();
    assert_eq!(senders, ["batch"], "cart has used mTLS");
    apply(&mut model, web("p", json!({"access": {"allow": []}})));
    assert!(ask(&model).is_empty(), "nothing is suggested any more");
}

#[test]
fn a_workload_whose_requests_reached_no_endpoint_is_not_named_as_a_sender_of_plain_text() {
    let mut sum = last_hour();
    let (id, _) = counted(None, 0);
    let outbound = |workload: &str, answered: u64, unsent: &[(&str, u64)]| {
        let reporter =
            Reporter { namespace: "shop".into(), kind: "Deployment".into(), workload: workload.into() };
        let mut counts = Counts::default();
        counts.classes[1] = answered;
        for (name, count) in unsent {
            counts.classes[6] += count;
            counts.add_reason(&(*name).into(), *count);
        }
        let series = SeriesId { reporter, direction: Direction::Outbound, peer: "web".into(), ..id.clone() };
        (SeriesId { namespace: "shop".into(), mtls: false, ..series }, counts)
    };
    let unsent = [("UpstreamNone", 58), ("UpstreamConnect", 2), ("PolicyDenied", 1)];
    sum.series.extend([outbound("batch", 1, &unsent), outbound("user", 0, &unsent)]);
    let found = access(&world(), &sum, "shop", "web", AccessDirection::WhoCan).unwrap().unidentified;
    let senders: Vec<&str> = found[0].senders.iter().map(|party| party.name.as_str()).collect();
    assert_eq!(senders, ["batch"], "user has sent nothing");
}

#[test]
fn who_was_only_ever_refused_is_not_admitted_by_the_suggested_policy() {
    let model = world();
    let refused = |account: Option<&str>, requests: u64, refused: u64| {
        let (id, mut counts) = counted(account, requests - refused);
        counts.classes[6] = refused;
        counts.add_reason(&"PolicyDenied".into(), refused);
        (id, counts)
    };
    let series = vec![refused(Some("cart"), 9, 4), refused(Some("evil"), 9, 9), refused(None, 9, 9)];
    let sum = Sum { window: 3_600, lost: 0, series };
    let found = access(&model, &sum, "shop", "web", AccessDirection::WhoCan).unwrap();
    let callers = &found.suggested[0]["spec"]["access"]["allow"][0]["from"];
    assert_eq!(*callers, json!([{"serviceAccount": "cart", "namespace": "shop"}]));
    assert!(found.unidentified.is_empty(), "{:?}", found.unidentified);
}

#[test]
fn who_can_says_that_a_rule_with_paths_denies_opaque_connections() {
    let mut model = world();
    let access =
        json!({"allow": [{"to": [{"ports": [8080]}]}], "deny": [{"to": [{"paths": ["/admin/**"]}]}]});
    apply(&mut model, web("p", json!({"access": access})));
    let rows = who_can(&model).rows;
    let clients: Vec<&str> = rows.iter().map(|row| row.client.as_str()).collect();
    let denied = "everybody, denied by MeshPolicy/shop/p, with all opaque connections";
    assert_eq!(clients, ["everybody (port 8080)", denied]);
}
