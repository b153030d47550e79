//! What of copies, and of requests beside them, is evidence.

use super::*;
use crate::config::{Steering, SteeringMatch, TrialShare};

const INSIDER: &[u8] = b"GET / HTTP/1.1\r\nhost: web\r\nconnection: close\r\nx-group: insider\r\n\r\n";

/// A worker, its port of a Service with one pod of each version, and how many connections that of the new one has
/// accepted. Insiders get the new version, and so many in a thousand of the other requests are copied.
async fn steered(mirror_permille: u32, share: TrialShare) -> (Rc<Worker>, Rc<Port>, Rc<Cell<usize>>) {
    let (old, new) = (server(Server::Answers).await.0, server(Server::Answers).await);
    let shares = match share {
        TrialShare::None => [1000, 0],
        TrialShare::Part => [1, 999],
        TrialShare::All => [0, 1000],
    };
    let insider = SteeringMatch::Header { name: "x-group".into(), value: "insider".into() };
    let (worker, port) = port_of(Endpoints {
        endpoints: vec![endpoint(old, "old", false), endpoint(new.0, "new", false)],
        split: vec![("old".into(), shares[0]), ("new".into(), shares[1])],
        steering: Some(Steering {
            revision: "new".into(),
            matches: vec![insider],
            mirror_permille,
            sticky: None,
            share,
        }),
        ..Endpoints::default()
    })
    .await;
    (worker, port, new.1)
}

/// Sends each of the requests, waits until the new version has seen so many, and returns the attempts that count for the
/// old and the new one.
async fn compared(mirror_permille: u32, share: TrialShare, requests: &[&[u8]], seen: usize) -> (u64, u64) {
    let (worker, port, accepted) = steered(mirror_permille, share).await;
    for request in requests {
        let answer = ask(&worker, &port, request).await;
        assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    }
    let arrive = async {
        while accepted.get() < seen || worker.copies.get() > 0 {
            sleep(Duration::from_millis(2)).await;
        }
    };
    timeout(PATIENCE, arrive).await.expect("the copies never ended");
    let all = worker.telemetry.attempts.take();
    let of = |revision: &str| {
        let its = all.iter().filter(|counts| counts.revision == revision);
        its.map(|counts| counts.attempts).sum::<u64>()
    };
    (of("old"), of("new"))
}

#[tokio::test]
async fn copies_are_compared_with_requests_that_could_have_been_copied() {
    let test = async {
        let requests = [REQUEST, POST, REQUEST, POST, REQUEST, INSIDER];
        let seen = compared(1000, TrialShare::None, &requests, 4).await;
        assert_eq!(seen, (3, 3), "no POST, and not what an insider gets");
    };
    LocalSet::new().run_until(test).await;
}

#[tokio::test]
async fn insiders_are_compared_as_long_as_nobody_else_gets_the_new_version() {
    let test = async {
        let requests = [REQUEST, POST, INSIDER, INSIDER];
        assert_eq!(compared(0, TrialShare::None, &requests, 2).await, (2, 2));
    };
    LocalSet::new().run_until(test).await;
}

#[tokio::test]
async fn beside_a_share_neither_insiders_nor_copies_hide_what_all_others_get() {
    let test = async {
        let requests = [REQUEST, POST, INSIDER, INSIDER, INSIDER];
        let (old, new) = compared(1000, TrialShare::Part, &requests, 4).await;
        assert_eq!(old + new, 2, "a GET and a POST");
    };
    LocalSet::new().run_until(test).await;
}

#[tokio::test]
async fn the_new_version_sees_each_request_once_whether_it_serves_it_or_gets_a_copy() {
    let test = async {
        let (old, (new, seen_by_new)) = (server(Server::Answers).await, server(Server::Answers).await);
        let (worker, port) = port_of(Endpoints {
            endpoints: vec![endpoint(old.0, "old", false), endpoint(new, "new", false)],
            split: vec![("old".into(), 500), ("new".into(), 500)],
            steering: Some(Steering {
                revision: "new".into(),
                mirror_permille: 1000,
                share: TrialShare::Part,
                ..Steering::default()
            }),
            ..Endpoints::default()
        })
        .await;
        for _ in 0..40 {
            assert!(ask(&worker, &port, REQUEST).await.starts_with("HTTP/1.1 200 "));
        }
        let copied = async {
            while worker.copies.get() > 0 {
                sleep(Duration::from_millis(2)).await;
            }
        };
        timeout(PATIENCE, copied).await.expect("the copies never ended");
        let served_by_old = old.1.get();
        assert!((1..40).contains(&served_by_old), "{served_by_old}");
        assert_eq!(seen_by_new.get(), 40, "{served_by_old} of them as copies");
    };
    LocalSet::new().run_until(test).await;
}
