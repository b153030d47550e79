//! Traces of one request in a hundred, and a collector that counts their spans.

use std::fs;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context as _, Result};
use serde_json::json;
use tonic::transport::Server;
use tonic::{Request, Response, Status};
use tulle_crds::MeshConfig;
use tulle_mesh::otlp::trace_service_server::{TraceService, TraceServiceServer};
use tulle_mesh::otlp::{ExportTraceServiceRequest, ExportTraceServiceResponse};
use tulle_operator::model::Model;

/// Where the collector listens: at the server's address, which both sidecars reach.
pub const COLLECTOR: &str = "10.77.0.2:4317";

/// Turns tracing on.
///
/// # Errors
/// When the MeshConfig cannot be read.
pub fn apply(model: &mut Model) -> Result<()> {
    let config = json!({
        "apiVersion": "tulle.dev/v1alpha1",
        "kind": "MeshConfig",
        "metadata": {"name": "mesh", "uid": "mesh", "generation": 1},
        "spec": {"trustDomain": "cluster.local", "tracing": {"endpoint": format!("http://{COLLECTOR}"), "sampling": "1%"}},
    });
    let config: MeshConfig = serde_json::from_value(config).context("cannot read the MeshConfig")?;
    model.apply_config(Some(&config));
    Ok(())
}

/// Turns tracing off.
pub fn delete(model: &mut Model) {
    model.apply_config(None);
}

/// Counts spans, and writes how many there were into a file.
struct Collector {
    spans: AtomicU64,
    file: PathBuf,
}

#[tonic::async_trait]
impl TraceService for Collector {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        let scopes = request.get_ref().resource_spans.iter().flat_map(|resource| &resource.scope_spans);
        let count: usize = scopes.map(|scope| scope.spans.len()).sum();
        let all = self.spans.fetch_add(count as u64, Ordering::Relaxed) + count as u64;
        fs::write(&self.file, all.to_string()).map_err(|error| Status::internal(error.to_string()))?;
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

/// Runs the collector.
///
/// # Errors
/// When its address is taken.
pub async fn collect(file: PathBuf) -> Result<()> {
    let address: SocketAddr = COLLECTOR.parse().context("the collector's address")?;
    let collector = TraceServiceServer::new(Collector { spans: AtomicU64::new(0), file });
    Server::builder().add_service(collector).serve(address).await.context("the collector has ended")
}
