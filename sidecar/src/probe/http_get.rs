//! HTTP probes, as kubelet carries them out.
//!
//! In: a probe of the pod. Out: the status that decides it. What kubelet does is in pkg/probe/http of
//! Kubernetes and in Go's HTTP client, which differ from a browser: a redirect that leaves the host ends the
//! probe well, and the headers of the probe go along with every redirect. Never resolves a name.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use bytes::Bytes;
use http::header::{
    ACCEPT, CONNECTION, CONTENT_LENGTH, HOST, LOCATION, REFERER, TRAILER, TRANSFER_ENCODING, UPGRADE,
    USER_AGENT,
};
use http::uri::PathAndQuery;
use http::{HeaderMap, HeaderName, HeaderValue, Request, StatusCode, Uri};
use http_body_util::{BodyExt as _, Empty};
use hyper::body::Incoming;
use hyper::client::conn::http1::{self, SendRequest};
use hyper_util::rt::TokioIo;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, SignatureScheme};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio_rustls::TlsConnector;

use super::ProbeError;
use super::url::{Url, UrlError};

/// Requests of one probe: the first, and one for each redirect.
pub(super) const MAX_REQUESTS: usize = 10;
/// How much of an answer's body must arrive properly.
const MAX_BODY_BYTES: usize = 10 * 1024;

/// An HTTP probe.
pub(super) struct HttpGet<'a> {
    /// `http` or `https`.
    pub(super) scheme: &'static str,
    /// The pod and the application's port.
    pub(super) address: SocketAddr,
    /// The path as the pod's author wrote it.
    pub(super) path: &'a str,
    /// Headers as the pod's author wrote them.
    pub(super) headers: &'a [(String, String)],
    /// Kubelet's User-Agent.
    pub(super) user_agent: &'a HeaderValue,
}

/// One request of a probe.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Hop {
    url: Url,
    /// The probe's own Host, where it still applies.
    host: Option<String>,
    /// Where a redirect came from.
    referer: Option<String>,
}

/// Carries out a probe. The status is one that is not a redirect to follow.
///
/// # Errors
/// [`ProbeError`] when there is no answer, or none that can be followed.
pub(super) async fn get(probe: &HttpGet<'_>) -> Result<StatusCode, ProbeError> {
    let url = Url::of_probe(probe.scheme, probe.address, probe.path);
    let url = url.map_err(|source| ProbeError::Url { url: probe.path.to_owned(), source })?;
    let mut hop = Hop { url, host: host_of(probe.headers), referer: None };
    let ip = probe.address.ip();
    for _ in 0..MAX_REQUESTS {
        let mut answer = send(&hop, probe, ip).await?;
        let location = answer.location.take().unwrap_or_default();
        let next = redirect(answer.status, &location, &hop, ip);
        let next = next.map_err(|source| ProbeError::Url { url: location, source })?;
        let Some(next) = next else {
            let read = answer.read_body().await;
            read.map_err(|source| ProbeError::Http { url: hop.url.to_string(), source })?;
            return Ok(answer.status);
        };
        hop = next;
    }
    Err(ProbeError::TooManyRedirects)
}

/// The probe's own Host header; an empty one does not count.
fn host_of(headers: &[(String, String)]) -> Option<String> {
    let host = headers.iter().find(|(name, _)| name.eq_ignore_ascii_case("host"));
    host.map(|(_, value)| value.clone()).filter(|value| !value.is_empty())
}

/// The request that follows an answer; `None` when the answer decides the probe. kubelet follows redirects
/// within the pod only: another host is `http.ErrUseLastResponse`, and the 3xx passes.
fn redirect(status: StatusCode, location: &str, hop: &Hop, pod: IpAddr) -> Result<Option<Hop>, UrlError> {
    if !matches!(status.as_u16(), 301 | 302 | 303 | 307 | 308) || location.is_empty() {
        return Ok(None);
    }
    let url = hop.url.join(location)?;
    if url.hostname() != pod.to_string() {
        return Ok(None);
    }
    // Without a scheme a location is relative, also where it names a host.
    let is_relative = !location.split(['/', '?', '#']).next().is_some_and(|start| start.contains(':'));
    let referer = (!hop.url.is_https() || url.is_https()).then(|| hop.url.to_string());
    let host = hop.host.clone().filter(|host| is_relative && host != hop.url.authority());
    Ok(Some(Hop { url, host, referer }))
}

/// The headers of a request, as kubelet and Go's client write them.
fn headers(hop: &Hop, probe: &HttpGet<'_>) -> Result<HeaderMap, ProbeError> {
    let value = |name: &str, text: &str| {
        let value = HeaderValue::from_bytes(text.trim_matches([' ', '\t']).as_bytes());
        value.map_err(|source| ProbeError::HeaderValue { name: name.to_owned(), source })
    };
    let mut headers = HeaderMap::new();
    // Go sends an empty Host in place of an invalid one.
    let host = hop.host.as_deref().unwrap_or(hop.url.authority());
    headers.insert(HOST, value("host", if is_host(host) { host } else { "" })?);
    for (name, text) in probe.headers {
        let value = value(name, text)?;
        let name = HeaderName::try_from(name)
            .map_err(|source| ProbeError::HeaderName { name: name.clone(), source })?;
        // Host is above; the others belong to the message, which has no body.
        if ![HOST, CONTENT_LENGTH, TRANSFER_ENCODING, TRAILER].contains(&name) {
            headers.append(name, value);
        }
    }
    match headers.get(USER_AGENT).cloned() {
        None => drop(headers.insert(USER_AGENT, probe.user_agent.clone())),
        Some(first) if first.is_empty() => drop(headers.remove(USER_AGENT)),
        Some(first) => drop(headers.insert(USER_AGENT, first)),
    }
    match headers.get(ACCEPT).map(HeaderValue::is_empty) {
        None => drop(headers.insert(ACCEPT, HeaderValue::from_static("*/*"))),
        Some(true) => drop(headers.remove(ACCEPT)),
        Some(false) => {}
    }
    if let Some(referer) = &hop.referer
        && headers.get(REFERER).is_none_or(HeaderValue::is_empty)
    {
        headers.insert(REFERER, value("referer", referer)?);
    }
    let asks_upgrade = headers.get(UPGRADE).is_some_and(|value| !value.is_empty());
    let says_so = has_option(&headers, "close") || asks_upgrade && has_option(&headers, "upgrade");
    if !says_so {
        headers.append(CONNECTION, HeaderValue::from_static("close"));
    }
    Ok(headers)
}

/// What Go takes for a valid Host (`httpguts.ValidHostHeader`).
fn is_host(host: &str) -> bool {
    host.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"!$%&()*+,-.:;=['_]~".contains(&byte))
}

fn has_option(headers: &HeaderMap, option: &str) -> bool {
    let lines = headers.get_all(CONNECTION).into_iter().filter_map(|value| value.to_str().ok());
    lines.flat_map(|line| line.split(',')).any(|token| token.trim().eq_ignore_ascii_case(option))
}

/// An answer whose body has not been read. Its connection lives as long as this.
struct Answer {
    status: StatusCode,
    location: Option<String>,
    body: Incoming,
    _send: SendRequest<Empty<Bytes>>,
    _connection: JoinSet<hyper::Result<()>>,
}

impl Answer {
    /// Waits for the end of the body, or for as much as kubelet reads.
    async fn read_body(&mut self) -> hyper::Result<()> {
        let mut read = 0;
        while read < MAX_BODY_BYTES
            && let Some(frame) = self.body.frame().await
        {
            read += frame?.data_ref().map_or(0, Bytes::len);
        }
        Ok(())
    }
}

async fn send(hop: &Hop, probe: &HttpGet<'_>, pod: IpAddr) -> Result<Answer, ProbeError> {
    let of_url = |source| ProbeError::Url { url: hop.url.to_string(), source };
    let address = SocketAddr::new(pod, hop.url.port().map_err(of_url)?);
    let target = PathAndQuery::try_from(hop.url.target())
        .map_err(|source| ProbeError::Target { target: hop.url.target(), source })?;
    let mut request = Request::new(Empty::new());
    *request.uri_mut() = Uri::from(target);
    *request.headers_mut() = headers(hop, probe)?;
    let stream =
        TcpStream::connect(address).await.map_err(|source| ProbeError::Connect { address, source })?;
    let answer = if hop.url.is_https() {
        let connector = TlsConnector::from(Arc::new(unverified_tls()?));
        let stream = connector.connect(ServerName::from(pod), stream).await;
        exchange(stream.map_err(|source| ProbeError::Tls { address, source })?, request).await
    } else {
        exchange(stream, request).await
    };
    answer.map_err(|source| ProbeError::Http { url: hop.url.to_string(), source })
}

async fn exchange(
    io: impl tokio::io::AsyncRead + tokio::io::AsyncWrite + Send + Unpin + 'static,
    request: Request<Empty<Bytes>>,
) -> hyper::Result<Answer> {
    let mut client = http1::Builder::new();
    // What Go's client takes too, and how it writes names.
    client
        .title_case_headers(true)
        .allow_spaces_after_header_name_in_responses(true)
        .allow_obsolete_multiline_headers_in_responses(true);
    let (mut send, connection) = client.handshake(TokioIo::new(io)).await?;
    let mut tasks = JoinSet::new();
    tasks.spawn(connection);
    let response = send.send_request(request).await?;
    let location = response.headers().get(LOCATION);
    let location = location.map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned());
    let status = response.status();
    Ok(Answer { status, location, body: response.into_body(), _send: send, _connection: tasks })
}

/// TLS as kubelet's probes use it: whatever certificate the pod has.
fn unverified_tls() -> Result<ClientConfig, ProbeError> {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let mut config = ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .map_err(ProbeError::TlsConfig)?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(AnyCertificate(provider)))
        .with_no_client_auth();
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(config)
}

/// Accepts every certificate: the connection leads to an address of this very pod.
#[derive(Debug)]
struct AnyCertificate(Arc<CryptoProvider>);

impl ServerCertVerifier for AnyCertificate {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
