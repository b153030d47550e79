//! Where a request goes: addresses as destinations, ports, and Services without endpoints.

use super::*;

/// The stage `endpoint` of a request from `shop/cart` to `shop/web`.
fn endpoint(model: &Model) -> Stage {
    stage(&ask(model, &question("/")), "endpoint").clone()
}

#[test]
fn a_port_that_the_pod_does_not_declare_is_named_and_left_open() {
    let with = |ports: &[u16]| {
        let mut model = world();
        model.apply_pod(Pod { declared_ports: ports.into(), ..pod("web-1", "10.1.0.1", "r1") });
        endpoint(&model)
    };
    for ports in [vec![], vec![8080], vec![9090, 8080]] {
        let found = with(&ports);
        assert_eq!(found.verdict, Verdict::Pass, "{ports:?}");
        assert_eq!(found.because, "1 endpoint is ready: 10.1.0.1:8080", "{ports:?}");
    }
    let found = with(&[9090]);
    assert_eq!(found.verdict, Verdict::Depends);
    for part in
        ["10.1.0.1:8080; ", "shop/web-1 declare port 9090 and not 8080", "targetPort of Service shop/web"]
    {
        assert!(found.because.contains(part), "{part}: {}", found.because);
    }
}

#[test]
fn each_cause_of_having_no_endpoint_has_its_own_sentence() {
    let because = |change: fn(&mut Model)| {
        let mut model = world();
        model.delete_slice(&key("shop", "web-1"));
        change(&mut model);
        let found = endpoint(&model);
        assert_eq!(found.verdict, Verdict::Stop);
        found.because
    };
    let no_pod = because(|model| {
        change_service(model, |service| service.selector = [("app".to_owned(), "wbe".to_owned())].into());
    });
    assert!(no_pod.contains("no pod has the labels app=wbe"), "{no_pod}");
    let unready = because(|model| model.apply_pod(Pod { ready: false, ..pod("web-1", "10.1.0.1", "r1") }));
    assert!(unready.contains("none of the 1 pods that it selects is ready"), "{unready}");
    assert!(unready.contains("describe pod web-1"), "{unready}");
    let named_port = because(|_| {});
    assert!(named_port.contains("a container has to declare a port of that name"), "{named_port}");
    let by_hand = because(|model| change_service(model, |service| service.selector.clear()));
    assert!(by_hand.contains("it has no selector"), "{by_hand}");
}

#[test]
fn an_address_of_no_pod_is_not_said_to_be_a_pod_that_is_reached() {
    let outcome = |endpoints: Vec<Endpoint>| {
        let mut model = world();
        let ports = vec![("http".into(), 8080)];
        model.apply_slice(key("shop", "web-1"), Slice { service: "web".into(), ports, endpoints });
        ask(&model, &question("/")).outcome
    };
    let outside = || Endpoint {
        address: Some("192.0.2.7".parse().unwrap()),
        ready: true,
        serving: true,
        ..Endpoint::default()
    };
    let alone = outcome(vec![outside()]);
    let unchecked = "1 address of no pod (whether anything answers there is not checked)";
    assert!(alone.contains(&format!("reaches shop/web:80 at {unchecked}")), "{alone}");
    let both = outcome(vec![ready(&pod("web-1", "10.1.0.1", "r1")), outside()]);
    assert!(both.contains(&format!("at 1 of its pods and {unchecked}")), "{both}");
}

/// What is answered about a destination, by a token for these namespaces.
fn dialled(destination: &str, shown: &[&str]) -> Result<Explanation, String> {
    let asked = Question { destination: destination.to_owned(), ..question("/") };
    explain(&world(), &AckTracker::default(), &asked, &|namespace: &str| shown.contains(&namespace))
}

#[test]
fn the_address_of_a_service_is_the_service() {
    for text in ["10.96.0.1", "10.96.0.1:80", "203.0.113.1:80"] {
        let found = dialled(text, &["shop"]).unwrap();
        assert!(found.outcome.contains("reaches shop/web:80"), "{text}: {}", found.outcome);
    }
    assert!(dialled("10.96.0.1:81", &["shop"]).unwrap_err().contains("has the ports 80"));
}

#[test]
fn another_address_is_said_to_be_a_pods_or_outside_the_mesh() {
    let pod = dialled("10.1.0.1:8080", &["shop"]).unwrap_err();
    assert!(pod.starts_with("10.1.0.1 is the address of pod shop/web-1 of Deployment web:"), "{pod}");
    let (shop, nothing): (&[&str], &[&str]) = (&["shop"], &[]);
    for (text, shown) in [
        ("8.8.8.8", shop),
        ("8.8.8.8:53", shop),
        ("[2001:db8::1]:53", shop),
        ("2001:db8::1", shop),
        ("10.1.0.1", nothing),
        ("10.96.0.1", nothing),
    ] {
        let outside = dialled(text, shown).unwrap_err();
        assert!(outside.contains("outside the mesh"), "{text}: {outside}");
        assert!(!outside.contains("shop"), "{text}: {outside}");
    }
}

#[test]
fn a_name_is_not_taken_for_an_address() {
    for text in ["shop/web", "shop/web:80", "", ":80", "10.1.0:80", "[::1"] {
        assert_eq!(Address::parse(text), None, "{text}");
    }
}
