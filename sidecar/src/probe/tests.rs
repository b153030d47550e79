//! Probes against applications on real sockets: what kubelet's own tests assert (pkg/probe/http), and more.

use std::sync::Mutex;

use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::service::TowerToHyperService;
use rustls::pki_types::PrivateKeyDer;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio_rustls::TlsAcceptor;
use tulle_mesh::health::health_server::{Health, HealthServer};
use tulle_mesh::health::{HealthCheckRequest, HealthCheckResponse};

use super::*;

const POD: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
const KUBELET: &str = "kube-probe/1.34";

/// An application that answers each request target with bytes, and remembers the requests.
struct App {
    port: u16,
    requests: Arc<Mutex<Vec<String>>>,
}

impl App {
    async fn start(answer: impl Fn(&str) -> String + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind((POD, 0)).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let requests = Arc::new(Mutex::new(Vec::new()));
        let seen = Arc::clone(&requests);
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                serve_one(stream, &seen, &answer).await;
            }
        });
        Self { port, requests }
    }

    fn requests(&self) -> Vec<String> {
        self.requests.lock().unwrap().clone()
    }
}

async fn serve_one(
    mut stream: impl AsyncRead + AsyncWrite + Unpin,
    seen: &Mutex<Vec<String>>,
    answer: impl Fn(&str) -> String,
) {
    let mut request = Vec::new();
    while !request.ends_with(b"\r\n\r\n") {
        request.push(stream.read_u8().await.unwrap());
    }
    let request = String::from_utf8(request).unwrap();
    let target = request
        .strip_prefix("GET ")
        .and_then(|rest| rest.split(" HTTP/1.1\r\n").next())
        .unwrap_or("")
        .to_owned();
    seen.lock().unwrap().push(request);
    let _ = stream.write_all(answer(&target).as_bytes()).await;
    let _ = stream.shutdown().await;
}

fn status(code: u16) -> String {
    format!("HTTP/1.1 {code} Whatever\r\nContent-Length: 0\r\n\r\n")
}

fn to(location: &str) -> String {
    format!("HTTP/1.1 302 Found\r\nLocation: {location}\r\nContent-Length: 0\r\n\r\n")
}

fn get(port: u16, path: &str, headers: &[(&str, &str)]) -> Check {
    let headers = headers.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
    Check::Http { port, path: path.to_owned(), headers, tls: false }
}

/// The status that decides the probe, or the error.
async fn probe(check: &Check) -> Result<u16, String> {
    let done =
        timeout(Duration::from_secs(10), carry_out(check, POD, &HeaderValue::from_static(KUBELET))).await;
    done.expect("the probe hangs").map(|status| status.as_u16()).map_err(|error| error.to_string())
}

#[tokio::test]
async fn a_redirect_is_followed_and_its_end_decides() {
    for (end, code) in [("/ok", 200), ("/broken", 500)] {
        let app = App::start(move |target| match target {
            "/" => to(end),
            "/ok" => status(200),
            _ => status(500),
        });
        let app = app.await;
        assert_eq!(probe(&get(app.port, "/", &[])).await, Ok(code));
        let requests = app.requests();
        assert_eq!(requests.len(), 2);
        assert!(
            requests[1].contains(&format!("Referer: http://127.0.0.1:{}/\r\n", app.port)),
            "{requests:?}"
        );
    }
}

#[tokio::test]
async fn a_redirect_to_another_host_passes_without_being_followed() {
    let app = App::start(|_| to("http://login.example/")).await;
    assert_eq!(probe(&get(app.port, "/", &[])).await, Ok(302));
    assert_eq!(app.requests().len(), 1);
}

#[tokio::test]
async fn a_redirect_to_another_port_of_the_pod_is_followed() {
    let other = App::start(|_| status(503)).await;
    let port = other.port;
    let app = App::start(move |_| to(&format!("http://127.0.0.1:{port}/x"))).await;
    assert_eq!(probe(&get(app.port, "/", &[])).await, Ok(503));
    assert_eq!(other.requests().len(), 1);
}

#[tokio::test]
async fn a_redirect_to_tls_is_followed_whatever_the_certificate() {
    let rcgen::CertifiedKey { cert, signing_key } =
        rcgen::generate_simple_self_signed(vec!["elsewhere.example".to_owned()]).unwrap();
    let key = PrivateKeyDer::try_from(signing_key.serialize_der()).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![cert.der().clone()], key)
        .unwrap();
    let listener = TcpListener::bind((POD, 0)).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        let (stream, _) = listener.accept().await.unwrap();
        let stream = TlsAcceptor::from(Arc::new(config)).accept(stream).await.unwrap();
        serve_one(stream, &Mutex::default(), |_| status(204)).await;
    });
    let app = App::start(move |_| to(&format!("https://127.0.0.1:{port}/"))).await;
    assert_eq!(probe(&get(app.port, "/", &[])).await, Ok(204));
}

#[tokio::test]
async fn a_redirect_loop_fails_after_ten_requests() {
    let app = App::start(|_| to("/again")).await;
    assert_eq!(probe(&get(app.port, "/", &[])).await, Err("stopped after 10 redirects".to_owned()));
    assert_eq!(app.requests().len(), 10);
}

#[tokio::test]
async fn a_redirect_that_leads_nowhere_passes_and_a_malformed_one_fails() {
    let app = App::start(|_| status(301)).await;
    assert_eq!(probe(&get(app.port, "/", &[])).await, Ok(301));
    let app = App::start(|_| to("/%zz")).await;
    assert!(probe(&get(app.port, "/", &[])).await.unwrap_err().contains("percent-encoding"));
    let app = App::start(|_| to("ftp://127.0.0.1/")).await;
    assert!(probe(&get(app.port, "/", &[])).await.unwrap_err().contains("unsupported scheme \"ftp\""));
}

#[tokio::test]
async fn the_request_is_the_one_that_kubelet_sends() {
    let app = App::start(|_| status(200)).await;
    probe(&get(app.port, "/", &[])).await.unwrap();
    let wanted = format!(
        "GET / HTTP/1.1\r\nHost: 127.0.0.1:{}\r\nUser-Agent: kube-probe/1.34\r\nAccept: */*\r\nConnection: close\r\n\r\n",
        app.port
    );
    assert_eq!(app.requests(), [wanted]);
}

#[tokio::test]
async fn a_repeated_header_arrives_as_often_also_after_a_redirect() {
    let app = App::start(|target| if target == "/" { to("/ok") } else { status(200) }).await;
    let headers = [("x-token", "a"), ("X-Token", "b"), ("Authorization", "Bearer c")];
    probe(&get(app.port, "/", &headers)).await.unwrap();
    for request in app.requests() {
        assert!(request.contains("X-Token: a\r\nX-Token: b\r\n"), "{request}");
        assert!(request.contains("Authorization: Bearer c\r\n"), "{request}");
    }
}

#[tokio::test]
async fn user_agent_and_accept_can_be_replaced_or_left_out() {
    let app = App::start(|_| status(200)).await;
    probe(&get(app.port, "/", &[("User-Agent", "mine"), ("Accept", "text/plain")])).await.unwrap();
    probe(&get(app.port, "/", &[("User-Agent", ""), ("Accept", "")])).await.unwrap();
    let requests = app.requests();
    assert!(requests[0].contains("User-Agent: mine\r\n") && requests[0].contains("Accept: text/plain\r\n"));
    assert!(!requests[1].contains("User-Agent") && !requests[1].contains("Accept"), "{requests:?}");
}

#[tokio::test]
async fn a_host_header_stays_with_relative_redirects_only() {
    let app = App::start(|target| match target {
        "/" => to("/ok"),
        _ => status(200),
    });
    let app = app.await;
    probe(&get(app.port, "/", &[("Host", "shop.example")])).await.unwrap();
    assert!(app.requests().iter().all(|request| request.contains("Host: shop.example\r\n")));

    let end = App::start(|_| status(200)).await;
    let port = end.port;
    let app = App::start(move |_| to(&format!("http://127.0.0.1:{port}/"))).await;
    probe(&get(app.port, "/", &[("Host", "shop.example")])).await.unwrap();
    assert!(app.requests()[0].contains("Host: shop.example\r\n"));
    assert!(end.requests()[0].contains(&format!("Host: 127.0.0.1:{port}\r\n")));
}

#[tokio::test]
async fn every_path_that_kubelet_accepts_is_requested_as_kubelet_requests_it() {
    let app = App::start(|_| status(200)).await;
    for (path, target) in [
        ("/a b?c=d e", "/a%20b?c=d%20e"),
        ("/{id}/ü?q={x}", "/%7Bid%7D/%C3%BC?q={x}"),
        ("/100%", "/100%25"),
        ("/%2Fkeep", "/%2Fkeep"),
        ("health#part", "/health"),
        ("http://other.example/x", "/x"),
        ("//other.example/x", "/x"),
        ("/x?", "/x?"),
        ("?x", "/?x"),
        ("", "/"),
    ] {
        probe(&get(app.port, path, &[])).await.unwrap();
        let request = app.requests().pop().unwrap();
        assert!(request.starts_with(&format!("GET {target} HTTP/1.1\r\n")), "{path}: {request}");
    }
}

#[tokio::test]
async fn http_1_0_passes_and_what_is_not_http_or_breaks_off_fails() {
    for (answer, passes) in [
        ("HTTP/1.0 200 OK\r\n\r\nok", true),
        ("HTTP/1.1 200 OK\r\nExpires : -1\r\nContent-Length: 2\r\n\r\nok", true),
        ("HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", true),
        ("SSH-2.0-OpenSSH\r\n", false),
        ("", false),
        ("HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf", false),
    ] {
        let app = App::start(move |_| answer.to_owned()).await;
        assert_eq!(probe(&get(app.port, "/", &[])).await.is_ok(), passes, "{answer:?}");
    }
}

#[tokio::test]
async fn no_more_of_a_body_is_awaited_than_kubelet_reads() {
    let body = "x".repeat(10 * 1024);
    let app = App::start(move |_| format!("HTTP/1.1 200 OK\r\nContent-Length: 99999\r\n\r\n{body}")).await;
    assert_eq!(probe(&get(app.port, "/", &[])).await, Ok(200));
}

#[tokio::test]
async fn a_tcp_probe_needs_a_listener() {
    let listener = TcpListener::bind((POD, 0)).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    assert_eq!(probe(&Check::Tcp { port }).await, Ok(200));
    drop(listener);
    assert!(probe(&Check::Tcp { port }).await.unwrap_err().starts_with("connect to 127.0.0.1:"));
}

/// The address from which this machine reaches others; `None`: it has no network.
fn own_address() -> Option<IpAddr> {
    let socket = std::net::UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).ok()?;
    // Sends nothing.
    socket.connect((Ipv4Addr::new(192, 0, 2, 1), 9)).ok()?;
    Some(socket.local_addr().ok()?.ip())
}

#[tokio::test]
async fn a_tcp_probe_of_the_pods_address_comes_from_loopback() {
    let Some(pod) = own_address() else { return };
    let listener = TcpListener::bind((pod, 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    let (connected, accepted) = tokio::join!(connect_from_loopback(address), listener.accept());
    assert_eq!(connected.unwrap().peer_addr().unwrap(), address);
    let client = accepted.unwrap().1.ip();
    assert!(client.is_loopback(), "a server would block {client} and with it every client");
    let on_loopback = TcpListener::bind((POD, 0)).await.unwrap();
    let unreached = SocketAddr::new(pod, on_loopback.local_addr().unwrap().port());
    let error = connect_from_loopback(unreached).await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused, "kubelet would not reach it either");
}

/// Serves one service, and knows of another that is down.
struct Checked(String);

#[tonic::async_trait]
impl Health for Checked {
    async fn check(
        &self,
        request: tonic::Request<HealthCheckRequest>,
    ) -> Result<tonic::Response<HealthCheckResponse>, tonic::Status> {
        let agent = request.metadata().get("user-agent").and_then(|agent| agent.to_str().ok());
        assert_eq!(agent, Some(KUBELET));
        let status = match request.into_inner().service {
            service if service == self.0 => ServingStatus::Serving,
            service if service == "down" => ServingStatus::NotServing,
            _ => return Err(tonic::Status::not_found("unknown service")),
        };
        Ok(tonic::Response::new(HealthCheckResponse { status: status.into() }))
    }
}

#[tokio::test]
async fn a_grpc_service_of_any_length_must_be_serving() {
    let long = "s".repeat(300);
    let listener = TcpListener::bind((POD, 0)).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let server = HealthServer::new(Checked(long.clone()));
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let server = TowerToHyperService::new(server.clone());
            let connection = hyper::server::conn::http2::Builder::new(TokioExecutor::new())
                .serve_connection(TokioIo::new(stream), server);
            tokio::spawn(connection);
        }
    });
    let grpc = |service: &str| Check::Grpc { port, service: service.to_owned() };
    assert_eq!(probe(&grpc(&long)).await, Ok(200));
    let down = probe(&grpc("down")).await.unwrap_err();
    assert_eq!(down, "service \"down\" is NOT_SERVING, expected SERVING");
    assert!(probe(&grpc("")).await.unwrap_err().contains("unknown service"));
}

#[tokio::test]
async fn a_grpc_probe_of_something_else_fails() {
    let app = App::start(|_| status(200)).await;
    let listener = TcpListener::bind((POD, 0)).await.unwrap();
    let silent = listener.local_addr().unwrap().port();
    drop(listener);
    for port in [app.port, silent] {
        assert!(probe(&Check::Grpc { port, service: String::new() }).await.is_err());
    }
}

#[test]
fn kubelet_sees_the_status_of_the_application_without_a_location() {
    for (status, seen) in [(200, 200), (204, 200), (302, 302), (404, 404), (500, 500), (101, 502)] {
        let verdict = judge(Ok(Ok(StatusCode::from_u16(status).unwrap())));
        let response = text(verdict.status, &verdict.reason);
        assert_eq!(response.status().as_u16(), seen);
        assert!(!response.headers().contains_key(http::header::LOCATION));
    }
    let failed = judge(Ok(Err(ProbeError::TooManyRedirects)));
    assert_eq!(failed.status, StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(failed.reason, "stopped after 10 redirects");
}

#[tokio::test]
async fn a_probe_is_known_to_wait_while_the_application_has_not_answered() {
    let app_waiting = Arc::<AppWaiting>::default();
    let (seen, waiting) = (Arc::new(Mutex::new(Vec::new())), Arc::clone(&app_waiting));
    let seen_by_app = Arc::clone(&seen);
    let app = App::start(move |_| {
        seen_by_app.lock().unwrap().extend(waiting.ports_waited_for(Duration::ZERO));
        status(200)
    });
    let app = app.await;
    let (path, check) = ("/a/livenessProbe".to_owned(), get(app.port, "/", &[]));
    let listener = TcpListener::bind((POD, 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    let probes = vec![Probe { path, check, timeout_seconds: 1 }];
    tokio::spawn(serve(probes, POD, Arc::clone(&app_waiting), listener));
    for (path, code) in [("/a/livenessProbe", "200"), ("/a/other", "404")] {
        let mut kubelet = TcpStream::connect(address).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nHost: a\r\n\r\n");
        kubelet.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        kubelet.read_to_string(&mut answer).await.unwrap();
        assert!(answer.starts_with(&format!("HTTP/1.1 {code} ")), "{answer}");
    }
    assert_eq!(*seen.lock().unwrap(), [app.port]);
    assert_eq!(app_waiting.longest(), None);
}
