//! `tulle`, also called as `kubectl tulle`. See the library's documentation.

use std::process::ExitCode;

use tulle_cli::cluster::Context;
use tulle_cli::{args, commands};

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    // TLS takes the process's provider. An error means that there is one already.
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let cli = match args::parse(std::env::args_os()) {
        Ok(cli) => cli,
        Err(error) => error.exit(),
    };
    let context = Context::new(&cli.global);
    match commands::run(&context, cli.command).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            error.print(&context.output);
            ExitCode::from(error.code())
        }
    }
}
