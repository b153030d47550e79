//! Serves the page of a mesh that does not exist, on a port of the loopback address, until standard input ends.
//!
//! `cargo run -p tulle-operator --example page [WORKLOADS]` prints the address to open, as `tulle dashboard` does.
//! Routes, model, history and acknowledgements are the operator's own; only the API server that reviews tokens is not
//! there. Suite `browser` looks at this mesh, because a cluster with two thousand workloads is not at hand.

mod objects;
mod world;

use std::io::Read as _;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result};
use axum::http::{Request, Response};
use clap::Parser as _;
use k8s_openapi::jiff::Timestamp;
use kube::Client;
use kube::client::Body;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tower::{BoxError, service_fn};
use tulle_mesh::query::AUDIENCE;
use tulle_operator::api::{self, Api, Authenticator};
use tulle_operator::discovery::AckTracker;
use tulle_operator::identity::authority::Authority;
use tulle_operator::lease::Leadership;
use tulle_operator::settings::Settings;
use tulle_operator::telemetry::Aggregates;
use tulle_operator::watch::Hub;

/// The token that the API server knows.
const TOKEN: &str = "viewer.of.everything";
/// Seconds that the history reaches back at the start.
const HISTORY: i64 = 900;

fn main() -> Result<()> {
    let workloads = match std::env::args().nth(1) {
        Some(text) => text.parse().with_context(|| format!("{text:?} is not a number of workloads"))?,
        None => 2_000,
    };
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let address = runtime.block_on(start(workloads))?;
    println!("{address}/ {TOKEN}");
    std::io::stdin().read_to_end(&mut Vec::new())?;
    Ok(())
}

/// Serves the page; returns its address.
async fn start(workloads: u32) -> Result<String> {
    let arguments =
        ["tulle-operator", "--namespace=tulle-system", "--pod-name=operator-0", "--pod-ip=10.0.0.1"];
    let client = Client::new(service_fn(api_server), "default");
    let aggregates = Arc::new(Aggregates::default());
    let now = Timestamp::now().as_second();
    let acks = AckTracker::default();
    world::connect(&acks, workloads, now);
    let api = Api {
        hub: Arc::new(Hub::complete(world::model(workloads)?)),
        acks: Arc::new(acks),
        aggregates: Arc::clone(&aggregates),
        judge_inputs: Arc::default(),
        leadership: watch::channel(Leadership { mine: true, ..Leadership::default() }).1,
        authority: Arc::new(Authority::generate("cluster.local").context("cannot make a root")?.0),
        authenticator: Arc::new(Authenticator::new(client, "tulle-system")),
        settings: Arc::new(Settings::try_parse_from(arguments)?),
        turns: tulle_operator::api::turn::turns(),
        taps: Arc::default(),
    };
    for time in (now - HISTORY..=now).step_by(world::INTERVAL.unsigned_abs() as usize) {
        // The many are of the last minute only: more of them would only take longer.
        let many = if time > now - 60 { workloads } else { 0 };
        world::count(&mut aggregates.history(), many, time);
    }
    world::refuse(&aggregates, now);
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?;
    tokio::spawn(api::serve(vec![listener], api));
    tokio::spawn(go_on(aggregates, workloads));
    Ok(format!("http://{address}"))
}

/// Counts on, so that the last minute does not become empty.
async fn go_on(aggregates: Arc<Aggregates>, workloads: u32) {
    let mut every = tokio::time::interval(Duration::from_secs(world::INTERVAL.unsigned_abs()));
    every.tick().await;
    loop {
        every.tick().await;
        world::count(&mut aggregates.history(), workloads, Timestamp::now().as_second());
    }
}

/// An API server that knows one token, of the service account that may see every namespace.
async fn api_server(request: Request<Body>) -> Result<Response<Body>, BoxError> {
    let token = request.uri().path().ends_with("/tokenreviews");
    let asked = request.into_body().collect_bytes().await?;
    let mut review: Value = serde_json::from_slice(&asked)?;
    let known = review.pointer("/spec/token").and_then(Value::as_str) == Some(TOKEN);
    let status = match (token, known) {
        (true, true) => json!({"authenticated": true, "audiences": [AUDIENCE],
            "user": {"username": "system:serviceaccount:tulle-system:tulle-viewer"}}),
        (true, false) => json!({"authenticated": false}),
        (false, _) => json!({"allowed": false}),
    };
    review.as_object_mut().ok_or("not an object")?.insert("status".to_owned(), status);
    Ok(Response::new(Body::from(serde_json::to_vec(&review)?)))
}
