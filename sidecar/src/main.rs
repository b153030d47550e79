//! `tulle-sidecar init` sets the redirect rules, `tulle-sidecar proxy` is the data plane.

use clap::Parser;
use tulle_sidecar::init::Rules;
use tulle_sidecar::settings::Settings;
use tulle_sidecar::{log, run};

/// Its settings are in `.cargo/config.toml`.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// Tulle's sidecar.
#[derive(Parser)]
#[command(version)]
enum Command {
    /// Sets the redirect rules of this network namespace and exits.
    Init(Rules),
    /// Runs the proxy.
    Proxy,
}

fn main() -> anyhow::Result<()> {
    log::init();
    let installed = rustls::crypto::aws_lc_rs::default_provider().install_default();
    installed.map_err(|_| anyhow::anyhow!("another cryptography provider is installed"))?;
    match Command::parse() {
        Command::Init(rules) => {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(rules.apply())
        }
        Command::Proxy => run::proxy(Settings::from_env()?),
    }
}
