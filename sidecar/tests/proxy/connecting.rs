//! Servers that do not take connections: for a while, or not at all.

use std::io::ErrorKind;
use std::time::Duration;

use futures::future::join_all;
use tokio::io::AsyncReadExt as _;
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{sleep, timeout};

use crate::harness::cluster::Port;
use crate::harness::{Application, Cluster, Outcome, Pod, http1, within};

/// Longer than connecting to one of several endpoints may take.
const BUSY: Duration = Duration::from_secs(3);

/// An application that accepts nothing, and whose backlog is full: the kernel drops what asks for more.
pub struct Busy {
    /// Where it may begin to accept.
    pub listener: TcpListener,
    /// How it is reached.
    pub port: Port,
    /// What fills the backlog.
    pub filling: Vec<TcpStream>,
}

impl Busy {
    /// Starts one in a pod.
    pub async fn start(pod: &Pod) -> Self {
        let (listener, port) = pod.listener(0);
        let own = listener.local_addr().unwrap();
        let mut filling = Vec::new();
        while let Ok(stream) = timeout(Duration::from_millis(300), TcpStream::connect(own)).await {
            filling.push(stream.unwrap());
            assert!(filling.len() < 64, "the backlog has no end");
        }
        Self { listener, port, filling }
    }
}

#[tokio::test]
async fn an_application_that_is_busy_for_seconds_serves_when_it_accepts() {
    let cluster = Cluster::start().await;
    let pods = [cluster.pod(false).await, cluster.pod(true).await];
    let cluster = &cluster;
    let running = pods.iter().map(|pod| async move {
        let Busy { listener, port, filling } = Busy::start(pod).await;
        let service = cluster.service(Some("http"), &[&port]).await;
        let asking = async {
            let mut stream = cluster.client.dial(service).await;
            http1::ask(&mut stream, &http1::request("POST", 10), || {}).await
        };
        let accepting = async {
            sleep(BUSY).await;
            drop(filling);
            Application::on(listener, port.clone(), http1::answer_all)
        };
        let (outcome, _application) = within(async { tokio::join!(asking, accepting) }).await;
        assert_eq!(outcome, Outcome::Whole(200), "{}", pod.uid);
    });
    join_all(running).await;
}

#[tokio::test]
async fn an_endpoint_that_takes_no_connection_is_left_for_another() {
    let cluster = Cluster::start().await;
    let (stuck, well) = (cluster.pod(false).await, cluster.pod(true).await);
    let busy = Busy::start(&stuck).await;
    let application = Application::start(&well, http1::answer_all);
    for spoken in ["http", "tcp"] {
        let service = cluster.service(Some(spoken), &[&busy.port, &application.port]).await;
        // Which of them comes first is chance.
        for _ in 0..6 {
            let mut stream = cluster.client.dial(service).await;
            let request = http1::request("POST", 10);
            let asked = http1::ask(&mut stream, &request, || {});
            assert_eq!(within(asked).await, Outcome::Whole(200), "{spoken}");
        }
    }
}

#[tokio::test]
async fn a_server_that_is_gone_is_reported_as_unavailable() {
    let cluster = Cluster::start().await;
    for meshed in [false, true] {
        let pod = cluster.pod(meshed).await;
        let (listener, port) = pod.listener(16);
        drop(listener);
        let http = cluster.service(Some("http"), &[&port]).await;
        let mut stream = cluster.client.dial(http).await;
        let asked = http1::ask(&mut stream, http1::GET, || {});
        assert_eq!(within(asked).await, Outcome::Whole(503), "{}", pod.uid);
        // A client whose content is not looked at gets no answer, and no proper end either.
        let opaque = cluster.service(Some("tcp"), &[&port]).await;
        let mut stream = cluster.client.dial(opaque).await;
        let error = within(stream.read(&mut [0; 1])).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{}", pod.uid);
    }
}
