//! Who is let in, and what is counted of it.

use std::net::SocketAddr;

use bytes::BytesMut;
use tokio::net::{TcpListener, TcpStream};
use tulle_mesh::identity::WorkloadId;
use tulle_mesh::policy::Access;
use tulle_mesh::proto;

use super::*;
use crate::config::ConfigStore;
use crate::http1::conn::split;
use crate::http1::head::parse_request;
use crate::http1::{Reader, Writer};
use crate::settings::Settings;

/// Rules that deny one method, and every path below one.
fn deny(method: &str, path: &str) -> InboundAccess {
    let operation = |methods: &[&str], paths: &[&str]| proto::Operation {
        methods: methods.iter().map(|method| (*method).to_owned()).collect(),
        paths: paths.iter().map(|path| (*path).to_owned()).collect(),
        ..Default::default()
    };
    let to = vec![operation(&[method], &[]), operation(&[], &[path])];
    let access = proto::Access { deny: vec![proto::Rule { from: vec![], to }], ..Default::default() };
    InboundAccess::new(Access::compile(&access).unwrap(), "shop/deny".to_owned())
}

fn nobody() -> InboundAccess {
    let access = proto::Access { has_allow: true, ..Default::default() };
    InboundAccess::new(Access::compile(&access).unwrap(), "shop/nobody".to_owned())
}

fn rules(mtls: Mtls, access: Option<InboundAccess>) -> Inbound {
    Inbound { mtls, access, shadow: None, shadow_strict: false, limits: None, revision: String::new() }
}

fn worker(inbound: Option<Inbound>) -> Rc<Worker> {
    let settings = Settings::of_test_pod("web");
    let (config, _wanted) = ConfigStore::new();
    if let Some(inbound) = inbound {
        config.set_inbound(inbound);
    }
    Worker::new(Arc::new(settings), config, Arc::default(), Arc::default(), Arc::default(), Arc::default())
}

fn plain() -> Client {
    Client::plain(SocketAddr::from(([10, 1, 2, 3], 4444)), SocketAddr::from(([10, 1, 2, 4], 80)))
}

fn meshed() -> Client {
    plain().with_identity(WorkloadId::new("cluster.local", "shop", "client"))
}

/// The halves of a connection, for a request that is not read from it.
async fn connection() -> (Reader, Writer) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    split(TcpStream::connect(listener.local_addr().unwrap()).await.unwrap(), BytesMut::new())
}

async fn ask(worker: &Rc<Worker>, client: &Client, line: &str) -> Result<Permit, Denied> {
    let (mut reader, mut writer) = connection().await;
    let text = format!("{line} HTTP/1.1\r\nhost: web\r\n\r\n");
    let head = parse_request(&mut BytesMut::from(text.as_bytes())).unwrap().unwrap();
    let mut call = Call::http1(head, &mut reader, &mut writer);
    let admitted = admit(&mut call, worker, client).await;
    assert_eq!(
        call.head.request_line().1,
        line.split_once(' ').unwrap().1,
        "the path goes on as it was sent"
    );
    admitted
}

fn counted(worker: &Worker, kind: &str) -> u64 {
    worker.telemetry.events().into_iter().filter(|((of, _), _)| *of == kind).map(|(_, count)| count).sum()
}

#[tokio::test]
async fn a_permit_counts_in_the_load_until_it_is_dropped() {
    let worker = worker(Some(rules(Mtls::Permissive, None)));
    let first = ask(&worker, &plain(), "GET /").await.unwrap();
    let second = ask(&worker, &meshed(), "GET /").await.unwrap();
    let connection = admit_connection(&worker, &plain()).unwrap();
    assert_eq!(worker.load.get(), 2, "connections are not requests");
    drop((first, connection));
    assert_eq!(worker.load.get(), 1);
    drop(second);
    assert_eq!(worker.load.get(), 0);
}

#[tokio::test]
async fn nobody_is_let_in_before_the_rules_are_known() {
    let worker = worker(None);
    assert_eq!(ask(&worker, &meshed(), "GET /").await.err(), Some(Denied(Failure::PolicyDenied)));
    assert_eq!(admit_connection(&worker, &meshed()).err(), Some(Denied(Failure::PolicyDenied)));
    assert!(!would_admit_connection(&worker, &plain()));
}

#[tokio::test]
async fn strict_refuses_plain_clients_and_no_others() {
    let worker = worker(Some(rules(Mtls::Strict, None)));
    let refused = Some(Denied(Failure::PolicyPlaintext));
    assert_eq!(ask(&worker, &plain(), "GET /").await.err(), refused);
    assert_eq!(admit_connection(&worker, &plain()).err(), refused);
    assert_eq!(admit_plaintext(&worker, &plain()).err(), refused);
    assert!(!might_admit_request(&worker, &plain()));
    assert_eq!(counted(&worker, "policy_denied"), 3);
    assert!(ask(&worker, &meshed(), "GET /").await.is_ok());
    assert!(admit_connection(&worker, &meshed()).is_ok());
}

#[tokio::test]
async fn every_reading_of_a_denied_path_is_refused_and_every_path_goes_on_as_it_was_sent() {
    let worker = worker(Some(rules(Mtls::Permissive, Some(deny("DELETE", "/admin/**")))));
    for client in [plain(), meshed()] {
        for line in ["GET /admin/x", "GET //admin/x", "GET /admin%2Fx", "GET /x/../admin/y", "delete /"] {
            let denied = ask(&worker, &client, line).await.err();
            assert_eq!(denied, Some(Denied(Failure::PolicyDenied)), "{line}");
        }
        for line in ["GET /a//b", "GET /group%2Fproject?x=1", "POST /./x"] {
            assert!(ask(&worker, &client, line).await.is_ok(), "{line}");
        }
    }
    assert_eq!(counted(&worker, "policy_denied"), 10);
}

#[tokio::test]
async fn a_refusal_is_remembered_under_its_id_without_the_query() {
    let worker = worker(Some(rules(Mtls::Permissive, Some(deny("DELETE", "/admin/**")))));
    let (mut reader, mut writer) = connection().await;
    let text = "GET /admin/x?token=s3cret HTTP/1.1\r\nhost: web\r\n\r\n";
    let head = parse_request(&mut BytesMut::from(text.as_bytes())).unwrap().unwrap();
    let mut call = Call::http1(head, &mut reader, &mut writer);
    assert!(admit(&mut call, &worker, &meshed()).await.is_err());
    let [denial] = worker.telemetry.denials.all().try_into().unwrap();
    assert_eq!(call.denial.map(|id| id.to_string()), Some(denial.id.clone()));
    assert_eq!(
        (denial.method.as_str(), denial.path.as_str(), denial.host.as_str()),
        ("GET", "/admin/x", "web")
    );
    assert!(denial.policy.starts_with("MeshPolicy/") && denial.rule.starts_with("DenyRule("), "{denial:?}");
    assert_eq!(denial.client, meshed().name());
    // What is only tried refuses nothing, and has no id.
    assert!(ask(&worker, &meshed(), "GET /").await.is_ok());
    assert_eq!(worker.telemetry.denials.all().len(), 1);
}

#[tokio::test]
async fn asking_whether_a_connection_would_be_let_in_counts_nothing() {
    let worker = worker(Some(rules(Mtls::Permissive, Some(deny("DELETE", "/admin/**")))));
    assert!(!would_admit_connection(&worker, &plain()));
    assert!(might_admit_request(&worker, &plain()), "a GET would be allowed");
    assert_eq!(counted(&worker, "policy_denied"), 0);
    assert!(admit_connection(&worker, &plain()).is_err());
    assert_eq!(counted(&worker, "policy_denied"), 1);
    worker.config.set_inbound(rules(Mtls::Permissive, Some(nobody())));
    assert!(!might_admit_request(&worker, &plain()));
}

#[tokio::test]
async fn rules_that_are_tried_count_an_opaque_connection_once_it_has_begun() {
    let inbound = Inbound { shadow: Some(nobody()), shadow_strict: true, ..rules(Mtls::Permissive, None) };
    let worker = worker(Some(inbound));
    let permit = admit_connection(&worker, &plain()).unwrap();
    assert_eq!(counted(&worker, "policy_would_deny"), 0);
    permit.begun(&plain());
    assert_eq!(counted(&worker, "policy_would_deny"), 2);
    assert!(ask(&worker, &plain(), "GET /").await.is_ok());
    assert_eq!(counted(&worker, "policy_would_deny"), 4);
}

#[tokio::test]
async fn two_rules_in_shadow_are_counted_apart_and_let_everything_through() {
    let denying = |method: &str| {
        let operation = proto::Operation { methods: vec![method.to_owned()], ..Default::default() };
        proto::Rule { from: vec![], to: vec![operation] }
    };
    let access = proto::Access { deny: vec![denying("DELETE"), denying("PUT")], ..Default::default() };
    let tried = InboundAccess::new(Access::compile(&access).unwrap(), "shop/tried".to_owned());
    let worker = worker(Some(Inbound {
        shadow: Some(tried),
        ..rules(Mtls::Permissive, Some(deny("PATCH", "/admin/**")))
    }));
    for line in ["DELETE /", "PUT /", "PUT /x", "GET /"] {
        assert!(ask(&worker, &meshed(), line).await.is_ok(), "{line}");
    }
    assert!(ask(&worker, &meshed(), "PATCH /").await.is_err());
    let counted = worker.telemetry.rules.all();
    let counted: Vec<_> = counted
        .iter()
        .map(|(key, totals)| (key.policy.as_str(), key.rule.as_str(), totals.denied, totals.would_deny))
        .collect();
    let expected =
        [("deny", "DenyRule(0)", 1, 0), ("tried", "DenyRule(0)", 0, 1), ("tried", "DenyRule(1)", 0, 2)];
    assert_eq!(counted, expected);
}

#[tokio::test]
async fn a_permit_is_withdrawn_by_rules_that_forbid_it_and_by_no_others() {
    use futures::FutureExt as _;
    let worker = worker(Some(rules(Mtls::Permissive, None)));
    let permit = ask(&worker, &plain(), "GET /admin/x").await.unwrap();
    let client = plain();
    let line = (Bytes::from_static(b"GET"), Bytes::from_static(b"/admin/x"));
    let mut request = Box::pin(permit.withdrawn(&client, Some(line)));
    let mut opaque = Box::pin(permit.withdrawn(&client, None));
    assert!((&mut request).now_or_never().is_none());
    assert!((&mut opaque).now_or_never().is_none());
    worker.config.set_inbound(rules(Mtls::Permissive, Some(deny("DELETE", "/other"))));
    assert!((&mut request).now_or_never().is_none());
    assert!((&mut opaque).now_or_never().is_some(), "an opaque connection may carry a DELETE");
    worker.config.set_inbound(rules(Mtls::Strict, None));
    assert!((&mut request).now_or_never().is_some());
}

#[tokio::test]
async fn the_application_is_told_who_calls_and_nothing_that_the_client_claims() {
    let text = b"GET / HTTP/1.1\r\nhost: web\r\nTulle_Client-ID: spiffe://forged\r\n\r\n";
    for (client, expected) in [(plain(), None), (meshed(), Some("spiffe://cluster.local/ns/shop/sa/client"))]
    {
        let mut head = parse_request(&mut BytesMut::from(&text[..])).unwrap().unwrap();
        client.introduce(&mut head);
        let told = head.header("tulle-client-id").map(|value| std::str::from_utf8(value).unwrap());
        assert_eq!(told, expected);
        assert!(head.header("tulle_client-id").is_none());
    }
}
