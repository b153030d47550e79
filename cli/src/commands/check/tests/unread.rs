//! What could not be read: which right or request the command is about.

use serde_json::Value;
use tulle_mesh::check::Outcome;

use super::super::facts::{Facts, Part, Permission};
use super::super::judge::{Options, judge};
use super::{OPTIONS, faults, faults_with, healthy};
use crate::objects::{Read, Unread};

const WHY: &str = "why";

/// Facts of which nothing could be read.
fn nothing(why: &Unread) -> Facts {
    fn unread<T>(why: &Unread) -> Read<T> {
        Err(why.clone())
    }
    let mut facts = healthy();
    facts.server = unread(why);
    facts.nodes = unread(why);
    facts.namespaces = unread(why);
    facts.uninjected = unread(why);
    for found in facts.definitions.values_mut().chain(facts.deployments.values_mut()) {
        *found = unread::<Option<Value>>(why);
    }
    facts.parts = vec![Part { object: "Service/mesh/tulle-operator".to_owned(), exists: unread(why) }];
    facts.permissions = vec![Permission { right: "create roles -n mesh".to_owned(), allowed: unread(why) }];
    facts.lease = unread(why);
    facts.slices = unread(why);
    facts.health = Err(WHY.to_owned());
    facts.sidecars = Err(WHY.to_owned());
    facts.injected = unread(why);
    facts.mutating = unread(why);
    facts.validating = unread(why);
    facts.config = unread(why);
    facts.policies = unread(why);
    facts.canaries = unread(why);
    facts.routes = unread(why);
    facts.cilium = unread(why);
    facts.system = "mesh".to_owned();
    facts
}

/// Numbers and commands of the findings.
fn commands(facts: &Facts, options: Options) -> Vec<String> {
    let found = faults_with(facts, options);
    found.iter().map(|fault| format!("{} {}", &fault[..5], fault.split_once(" => ").unwrap().1)).collect()
}

#[test]
fn where_a_right_is_missing_the_command_names_it() {
    assert_eq!(
        commands(&nothing(&Unread::Forbidden(WHY.to_owned())), OPTIONS),
        [
            "T0101 kubectl auth can-i get /version",
            "T0102 kubectl auth can-i list nodes",
            "T0104 kubectl auth can-i list namespaces",
            "T0201 kubectl auth can-i get customresourcedefinitions.apiextensions.k8s.io/canaries.tulle.dev",
            "T0201 kubectl auth can-i get customresourcedefinitions.apiextensions.k8s.io/meshconfigs.tulle.dev",
            "T0201 kubectl auth can-i get customresourcedefinitions.apiextensions.k8s.io/meshpolicies.tulle.dev",
            "T0204 kubectl auth can-i get service/tulle-operator -n mesh",
            "T0301 kubectl auth can-i get deployments.apps/tulle-operator -n mesh",
            "T0301 kubectl auth can-i get deployments.apps/tulle-webhook -n mesh",
            "T0303 kubectl auth can-i get leases.coordination.k8s.io/tulle-operator -n mesh",
            "T0304 kubectl -n mesh get pods -l app=tulle-operator",
            "T0401 kubectl auth can-i get meshconfigs.tulle.dev/mesh",
            "T0401 kubectl -n mesh get pods -l app=tulle-operator",
            "T0501 kubectl auth can-i get mutatingwebhookconfigurations.admissionregistration.k8s.io/tulle",
            "T0501 kubectl auth can-i get validatingwebhookconfigurations.admissionregistration.k8s.io/tulle",
            "T0502 kubectl get mutatingwebhookconfiguration/tulle validatingwebhookconfiguration/tulle",
            "T0504 kubectl auth can-i list endpointslices.discovery.k8s.io -n mesh",
            "T0601 kubectl auth can-i list namespaces",
            "T0602 kubectl auth can-i list namespaces",
            "T0703 kubectl -n mesh get pods -l app=tulle-operator",
            "T0801 kubectl auth can-i list meshpolicies.tulle.dev -A",
            "T0901 kubectl auth can-i list canaries.tulle.dev -A",
            "T0920 kubectl auth can-i list httproutes.gateway.networking.k8s.io -A",
            "T0930 kubectl auth can-i get configmaps/cilium-config -n kube-system",
        ]
    );
}

#[test]
fn where_a_request_failed_the_command_sends_it_again() {
    let pre = Options { pre: true, ..OPTIONS };
    assert_eq!(
        commands(&nothing(&Unread::Failed(WHY.to_owned())), pre),
        [
            "T0101 kubectl get --raw /version",
            "T0102 kubectl get nodes",
            "T0103 kubectl auth can-i create roles -n mesh",
            "T0104 kubectl get namespaces",
            "T0930 kubectl get configmaps/cilium-config -n kube-system",
        ]
    );
}

#[test]
fn the_command_is_about_the_namespace_that_is_looked_at() {
    let mut facts = nothing(&Unread::Forbidden(WHY.to_owned()));
    facts.namespace = Some("shop".to_owned());
    let found = commands(&facts, OPTIONS);
    for expected in [
        "T0601 kubectl auth can-i get namespaces/shop",
        "T0801 kubectl auth can-i list meshpolicies.tulle.dev -n shop",
    ] {
        assert!(found.iter().any(|command| command == expected), "{expected}: {found:#?}");
    }
    facts.namespaces = Ok(Vec::new());
    let found = commands(&facts, OPTIONS);
    let pods = "T0602 kubectl auth can-i list pods -n shop";
    assert!(found.iter().any(|command| command == pods), "{found:#?}");
}

#[test]
fn what_the_api_server_or_the_operator_does_not_say_is_a_warning() {
    assert_eq!(
        faults(|facts| facts.server = Ok("unknown".to_owned())),
        ["T0101 warning: the API server has version \"unknown\", which is not a version => kubectl version"]
    );
    assert_eq!(
        faults(|facts| facts.health.as_mut().unwrap().root_not_after = None),
        [
            "T0401 warning: the root certificate could not be checked: the operator does not know when it ends => kubectl -n tulle-system logs deployment/tulle-operator"
        ]
    );
}

/// The checks that are said to be well.
fn well(facts: &Facts) -> Vec<&'static str> {
    let found = judge(facts, OPTIONS).into_iter().filter(|finding| finding.result == Outcome::Ok);
    found.map(|finding| finding.id).collect()
}

#[test]
fn nothing_is_well_that_was_not_read() {
    let none: [&str; 0] = [];
    assert_eq!(well(&nothing(&Unread::Forbidden(WHY.to_owned()))), none);
    let mut facts = healthy();
    facts.deployments.insert("tulle-webhook", Err(Unread::Forbidden(WHY.to_owned())));
    facts.validating = Err(Unread::Forbidden(WHY.to_owned()));
    let found = well(&facts);
    for id in ["T0301", "T0302", "T0501", "T0502", "T0503"] {
        assert!(!found.contains(&id), "{id} is said to be well: {found:?}");
    }
}

#[test]
fn the_replica_that_leads_says_so_where_the_lease_may_not_be_read() {
    let mut facts = healthy();
    facts.lease = Err(Unread::Forbidden(WHY.to_owned()));
    assert!(well(&facts).contains(&"T0303"));
    facts.health.as_mut().unwrap().leader = false;
    assert!(!well(&facts).contains(&"T0303"));
}
