//! Connections that pass through, and end when it is known that a sidecar listens where they lead.

use super::super::passthrough;
use super::*;

#[tokio::test]
async fn a_connection_that_must_not_pass_through_reaches_nobody() {
    let test = async {
        let (address, accepted) = server(Server::Answers).await;
        let (worker, _port) = port_to_one(address).await;
        let (mut client, near) = connection().await;
        client.write_all(b"x").await.unwrap();
        assert!(passthrough::serve(&worker, near, address, std::future::ready(())).await.is_err());
        assert!(client.read(&mut [0]).await.is_err(), "it was reset");
        sleep(Duration::from_millis(20)).await;
        assert_eq!(accepted.get(), 0);
    };
    LocalSet::new().run_until(test).await;
}

/// A server that answers each of a connection's requests after so long.
async fn slow_server(pause: Duration) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    spawn_local(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            spawn_local(async move {
                let mut room = [0; 1024];
                while matches!(stream.read(&mut room).await, Ok(1..)) {
                    sleep(pause).await;
                    if stream.write_all(KEPT).await.is_err() {
                        return;
                    }
                }
            });
        }
    });
    address
}

/// A request that is under way may have been carried out.
#[tokio::test]
async fn a_connection_that_may_pass_through_no_more_ends_between_two_exchanges() {
    let test = async {
        let address = slow_server(Duration::from_millis(600)).await;
        let (worker, _port) = port_to_one(address).await;
        let (mut client, near) = connection().await;
        // It comes in the middle of the request.
        let meshed = sleep(Duration::from_millis(200));
        let used = async move {
            client.write_all(REQUEST).await.unwrap();
            let (since, mut answer) = (Instant::now(), [0; KEPT.len()]);
            client.read_exact(&mut answer).await.expect("the answer arrives");
            assert_eq!(answer, KEPT);
            assert!(since.elapsed() >= Duration::from_millis(600));
            assert!(client.read(&mut answer).await.is_err(), "then it is reset");
        };
        let both = async { tokio::join!(passthrough::serve(&worker, near, address, meshed), used) };
        timeout(PATIENCE, both).await.expect("it ends").0.unwrap();
    };
    LocalSet::new().run_until(test).await;
}
