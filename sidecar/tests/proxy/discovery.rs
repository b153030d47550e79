//! How a sidecar reaches the operator: by name, and by address where the pod cannot resolve the name.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncWriteExt as _, copy_bidirectional};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::sleep;
use tulle_sidecar::config::client;
use tulle_sidecar::settings::Settings;

use crate::harness::operator::Operator;
use crate::harness::sidecar::settings;
use crate::harness::within;

/// Reaches the operator by this name and these addresses, or says why not.
async fn reach(operator: &Operator, name: &str, addresses: &[SocketAddr]) -> Result<(), String> {
    let settings = Settings { operator_addresses: addresses.to_vec(), ..settings("web", name) };
    let tls = Arc::clone(&operator.credentials("web").current().unwrap().operator_client);
    within(client::connect(&settings, tls)).await.map(drop).map_err(|error| format!("{error:#}"))
}

/// The address of a server that answers everything with this.
async fn answering(bytes: &'static [u8]) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        let mut open = Vec::new();
        while let Ok((mut stream, _)) = listener.accept().await {
            let _ = stream.write_all(bytes).await;
            open.push(stream);
        }
    });
    address
}

/// The address of an operator that takes this long for whatever it is sent.
async fn busy(operator: SocketAddr, takes: Duration) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut near, _)) = listener.accept().await {
            tokio::spawn(async move {
                sleep(takes).await;
                let mut far = TcpStream::connect(operator).await.unwrap();
                let _ = copy_bidirectional(&mut near, &mut far).await;
            });
        }
    });
    address
}

#[tokio::test]
async fn an_operator_whose_name_leads_nowhere_or_elsewhere_is_reached_by_its_address() {
    let operator = Operator::start();
    let foreign = answering(b"HTTP/1.1 400 Bad Request\r\n\r\n").await.to_string();
    let silent = answering(b"").await.to_string();
    for name in ["operator.invalid:26160", foreign.as_str(), silent.as_str()] {
        assert_eq!(reach(&operator, name, &[operator.address]).await, Ok(()), "{name}");
    }
    let other = answering(b"220 ready\r\n").await;
    let why = reach(&operator, &foreign, &[other]).await.unwrap_err();
    assert!(why.contains(&foreign) && why.contains(&other.to_string()), "{why}");
}

#[tokio::test]
async fn an_operator_whose_address_has_changed_is_reached_by_its_name() {
    let operator = Operator::start();
    let former = answering(b"").await;
    assert_eq!(reach(&operator, &operator.address.to_string(), &[former]).await, Ok(()));
}

#[tokio::test]
async fn a_busy_operator_is_waited_for_while_its_former_address_is_tried() {
    let operator = Operator::start();
    let name = busy(operator.address, Duration::from_secs(3)).await.to_string();
    let silent = answering(b"").await;
    let foreign = answering(b"HTTP/1.1 400 Bad Request\r\n\r\n").await;
    for former in [silent, foreign] {
        assert_eq!(reach(&operator, &name, &[former]).await, Ok(()), "{former}");
    }
}
