//! Policies: who is denied does not reach the application, and who is allowed is not counted as denied.

use std::time::Duration;

use futures::future::join_all;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::sync::mpsc::unbounded_channel;
use tokio::time::sleep;

use crate::harness::http2::PREFACE;
use crate::harness::{Application, Cluster, Event, Outcome, http1, next, within};

/// A client that says nothing for this long is silent.
const PAUSE: Duration = Duration::from_millis(100);

/// What a client may say first.
const WORDS: [&[u8]; 6] = [
    http1::GET,
    PREFACE,
    b"HZC",
    b"*1\r\n$4\r\nPING\r\n",
    b"GET / HT",
    b"\x16\x03\x01\x00\x04\x01\x00\x00\x00",
];

/// Sends this and no more, and returns everything that comes back, however the connection ends.
async fn told(mut stream: TcpStream, words: &[u8]) -> String {
    let _ = stream.write_all(words).await;
    let _ = stream.shutdown().await;
    let mut answer = Vec::new();
    let _ = within(stream.read_to_end(&mut answer)).await;
    String::from_utf8_lossy(&answer).into_owned()
}

/// Only this service account may call.
fn only(account: &str) -> Value {
    json!({"allow": [{"from": [{"serviceAccount": account}]}]})
}

#[tokio::test]
async fn a_plain_client_that_is_denied_does_not_reach_the_application() {
    for (mtls, access, answer) in
        [("Strict", Value::Null, ""), ("Permissive", only("pod-0"), "403 Forbidden")]
    {
        let cluster = Cluster::start().await;
        cluster.policy(mtls, access);
        let pod = cluster.pod(true).await;
        let application = Application::start(&pod, http1::answer_all);
        let _silent = TcpStream::connect(application.port.address).await.unwrap();
        let denied = WORDS.map(|words| {
            let address = application.port.address;
            async move { told(TcpStream::connect(address).await.unwrap(), words).await }
        });
        let answers = join_all(denied).await;
        assert!(answers[0].contains(answer), "{mtls}: {answers:?}");
        assert!(!answers.concat().contains("200 OK"), "{mtls}: {answers:?}");
        assert_eq!(application.accepted(), 0, "{mtls}");
        // The application is there, for whoever is allowed.
        let service = cluster.service(None, &[&application.port]).await;
        let mut stream = cluster.client.dial(service).await;
        assert_eq!(within(http1::ask(&mut stream, http1::GET, || {})).await, Outcome::Whole(200), "{mtls}");
        assert_eq!(application.accepted(), 1, "{mtls}");
    }
}

#[tokio::test]
async fn a_plain_client_that_waits_for_the_server_and_is_denied_is_reset_at_once() {
    for (mtls, access) in [("Strict", Value::Null), ("Permissive", only("pod-0"))] {
        let cluster = Cluster::start().await;
        cluster.policy(mtls, access);
        let pod = cluster.pod(true).await;
        let application = Application::start(&pod, http1::answer_all);
        let mut silent = TcpStream::connect(application.port.address).await.unwrap();
        let refused = tokio::time::timeout(Duration::from_secs(5), silent.read(&mut [0])).await;
        let refused = refused.unwrap_or_else(|_| panic!("{mtls}: it hangs"));
        assert_eq!(refused.unwrap_err().kind(), std::io::ErrorKind::ConnectionReset, "{mtls}");
        assert_eq!(pod.sidecar.as_ref().unwrap().count("policy_denied"), 1, "{mtls}");
        assert_eq!(application.accepted(), 0, "{mtls}");
    }
}

#[tokio::test]
async fn a_client_that_is_denied_by_its_identity_does_not_reach_the_application() {
    let cluster = Cluster::start().await;
    cluster.policy("Permissive", only("somebody-else"));
    let pod = cluster.pod(true).await;
    let application = Application::start(&pod, http1::answer_all);
    let service = cluster.service(None, &[&application.port]).await;
    for silent in [false, true] {
        let mut stream = cluster.client.dial(service).await;
        if silent {
            sleep(PAUSE).await;
        }
        let outcome = within(http1::ask(&mut stream, http1::GET, || {})).await;
        assert_eq!(outcome, Outcome::Whole(403), "silent at first: {silent}");
    }
    let opaque = cluster.service(Some("tcp"), &[&application.port]).await;
    assert_eq!(told(cluster.client.dial(opaque).await, http1::GET).await, "");
    assert_eq!(application.accepted(), 0);
}

#[tokio::test]
async fn a_rule_by_method_counts_no_denial_before_the_method_is_known() {
    let cluster = Cluster::start().await;
    cluster.policy("Permissive", json!({"allow": [{"to": [{"methods": ["GET"]}]}]}));
    let pod = cluster.pod(true).await;
    let application = Application::start(&pod, http1::answer_all);
    let service = cluster.service(None, &[&application.port]).await;
    let denials = || pod.sidecar.as_ref().unwrap().count("policy_denied");
    for silent in [false, true, true, false] {
        for redirected in [false, true] {
            let mut stream = match redirected {
                true => cluster.client.dial(service).await,
                false => TcpStream::connect(application.port.address).await.unwrap(),
            };
            if silent {
                sleep(PAUSE).await;
            }
            let outcome = within(http1::ask(&mut stream, http1::GET, || {})).await;
            assert_eq!(outcome, Outcome::Whole(200), "silent at first: {silent}, redirected: {redirected}");
        }
    }
    assert_eq!(denials(), 0);
    let mut stream = cluster.client.dial(service).await;
    let posted = within(http1::ask(&mut stream, &http1::request("POST", 1), || {})).await;
    assert_eq!((posted, denials()), (Outcome::Whole(403), 1));
}

#[tokio::test]
async fn a_new_policy_ends_what_it_forbids() {
    let cluster = Cluster::start().await;
    let pod = cluster.pod(true).await;
    let (events, mut seen) = unbounded_channel();
    let application = Application::start(&pod, move |stream| http1::hold(stream, events.clone()));
    for (declared, asked) in [("http", http1::GET), ("tcp", http1::GET)] {
        let service = cluster.service(Some(declared), &[&application.port]).await;
        let mut redirected = cluster.client.dial(service).await;
        let mut plain = TcpStream::connect(application.port.address).await.unwrap();
        for stream in [&mut redirected, &mut plain] {
            stream.write_all(asked).await.unwrap();
            assert_eq!(next(&mut seen).await, Event::Begun, "{declared}");
        }
        cluster.policy("Permissive", json!({"allow": []}));
        for stream in [&mut redirected, &mut plain] {
            assert_eq!(next(&mut seen).await, Event::GivenUp, "{declared}");
            let outcome = within(http1::read_answer(stream, || {})).await;
            assert!(!matches!(outcome, Outcome::Whole(..400)), "{declared}: {outcome:?}");
        }
        assert_eq!(told(cluster.client.dial(service).await, asked).await.matches("200 OK").count(), 0);
        // Both are allowed again.
        cluster.policy("Permissive", Value::Null);
        let config = &pod.sidecar.as_ref().unwrap().config;
        within(config.inbound_becomes(|inbound| inbound.access.is_none())).await;
    }
    assert_eq!(application.accepted(), 4);
}
