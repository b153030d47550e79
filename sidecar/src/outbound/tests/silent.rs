//! Clients that say nothing while a connection to an endpoint is opened for them.

use super::*;

/// A server that ends its first connection before it has heard anything, and answers requests on later ones.
async fn server_that_ends_once(resets: bool) -> (SocketAddr, Rc<Cell<usize>>) {
    let accepted = Rc::new(Cell::new(0));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let counter = Rc::clone(&accepted);
    spawn_local(async move {
        while let Ok((stream, _)) = listener.accept().await {
            counter.set(counter.get() + 1);
            if counter.get() > 1 {
                spawn_local(behave(Server::Answers, stream));
            } else if resets {
                SockRef::from(&stream).set_linger(Some(Duration::ZERO)).unwrap();
            }
        }
    });
    (address, accepted)
}

/// A process that is short of processor time connects, and asks only when the pod that was opened for it has ended.
#[tokio::test]
async fn a_late_request_is_served_although_what_was_opened_for_its_client_has_ended() {
    let test = async {
        for resets in [false, true] {
            for request in [REQUEST, POST] {
                let (address, accepted) = server_that_ends_once(resets).await;
                let (worker, port) = port_to_one(address).await;
                let (seen, _) = converse(&worker, &port, &[(80, request)], b"ok").await;
                assert!(seen.starts_with("HTTP/1.1 200 "), "reset: {resets}: {seen:?}");
                assert_eq!(accepted.get(), 2, "connections to the server");
            }
        }
    };
    LocalSet::new().run_until(test).await;
}

#[tokio::test]
async fn a_client_that_stays_silent_sees_that_its_server_has_ended() {
    let test = async {
        for (learned, resets) in
            [(Learned::Nothing, false), (Learned::ClientFirst, false), (Learned::ServerFirst, true)]
        {
            let (worker, port) = port_to_one(server_that_ends_once(resets).await.0).await;
            port.learned.set(learned);
            let (mut client, accepted) = connection().await;
            let seen = async move { client.read(&mut [0]).await };
            let end = async { tokio::join!(race::serve(&worker, &port, accepted), seen).1 };
            let end = timeout(PATIENCE, end).await.expect("it is told");
            assert_eq!(end.is_err(), resets, "{learned:?}: {end:?}");
        }
    };
    LocalSet::new().run_until(test).await;
}
