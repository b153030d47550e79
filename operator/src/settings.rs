//! Arguments of the operator.

use clap::Parser;

/// Tulle's control plane.
#[derive(Clone, Debug, Parser)]
#[command(version)]
pub struct Settings {
    /// The namespace that Tulle runs in.
    #[arg(long, env = "TULLE_NAMESPACE", default_value = "tulle-system")]
    pub namespace: String,
    /// This pod's name: who holds the Lease.
    #[arg(long, env = "TULLE_POD_NAME")]
    pub pod_name: String,
    /// This pod's address: where another replica forwards to.
    #[arg(long, env = "TULLE_POD_IP")]
    pub pod_ip: String,
    /// The service account of the operator, as its certificate names it.
    #[arg(long, env = "TULLE_SERVICE_ACCOUNT", default_value = "tulle-operator")]
    pub service_account: String,
}
