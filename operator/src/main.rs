//! `tulle-operator`: the control plane. The library's documentation describes it.

use clap::Parser as _;
use tulle_operator::run;
use tulle_operator::settings::Settings;

#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let filter = tracing_subscriber::EnvFilter::try_from_env("TULLE_LOG").unwrap_or_else(|_| "info".into());
    tracing_subscriber::fmt().json().flatten_event(true).with_env_filter(filter).init();
    let installed = rustls::crypto::aws_lc_rs::default_provider().install_default();
    installed.map_err(|_| anyhow::anyhow!("another cryptography provider is installed"))?;
    run::run(Settings::parse()).await
}
