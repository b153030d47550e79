//! The sample shop: a service that calls the next one and can return errors, and a load generator.

mod load;
mod serve;

use clap::Parser;

/// The sample shop.
#[derive(Parser)]
enum Command {
    /// Serves requests.
    Serve(serve::Serve),
    /// Sends requests at a fixed rate and counts the responses.
    Load(load::Load),
    /// Sends one request, and prints the status and the body.
    Get {
        /// `host:port` of the service.
        target: String,
    },
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    match Command::parse() {
        Command::Serve(serve) => serve.run().await,
        Command::Load(load) => load.run().await,
        Command::Get { target } => {
            let (status, body) = serve::get(&target).await?;
            println!("{} {}", status.as_u16(), String::from_utf8_lossy(&body).trim());
            Ok(())
        }
    }
}
