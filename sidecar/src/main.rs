//! `tulle-sidecar init` sets the redirect rules, `tulle-sidecar proxy` is the data plane.

use tulle_sidecar::arguments::{Command, USAGE};
use tulle_sidecar::settings::Settings;
use tulle_sidecar::{log, run};

/// Its settings are in `.cargo/config.toml`.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> anyhow::Result<()> {
    log::init();
    let installed = rustls::crypto::aws_lc_rs::default_provider().install_default();
    installed.map_err(|_| anyhow::anyhow!("another cryptography provider is installed"))?;
    let arguments = std::env::args_os().skip(1).map(|argument| argument.to_string_lossy().into_owned());
    match Command::parse(arguments) {
        Ok(Command::Init(rules)) => {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(rules.apply())
        }
        Ok(Command::Proxy) => run::proxy(Settings::from_env()?),
        Ok(Command::Help) => {
            println!("{USAGE}");
            Ok(())
        }
        Ok(Command::Version) => {
            println!("tulle-sidecar {}", env!("CARGO_PKG_VERSION"));
            Ok(())
        }
        Err(error) => {
            eprintln!("tulle-sidecar: {error}\n\n{USAGE}");
            std::process::exit(2);
        }
    }
}
