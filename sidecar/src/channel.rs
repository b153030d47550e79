//! An HTTP/2 connection as tonic wants it: to the operator, and to a collector of traces. How it is opened, and with whom,
//! is theirs to say.

use std::pin::Pin;
use std::task::{Context, Poll};

use hyper::client::conn::http2::SendRequest;

/// Sends calls over one connection.
#[derive(Clone)]
pub struct Channel(pub SendRequest<tonic::body::Body>);

impl tower::Service<http::Request<tonic::body::Body>> for Channel {
    type Response = http::Response<hyper::body::Incoming>;
    type Error = hyper::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.0.poll_ready(cx)
    }

    fn call(&mut self, request: http::Request<tonic::body::Body>) -> Self::Future {
        Box::pin(self.0.send_request(request))
    }
}
