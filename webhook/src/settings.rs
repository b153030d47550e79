//! Command-line arguments and environment of the webhook.

use clap::Parser;

/// Tulle's admission webhook.
#[derive(Clone, Debug, Parser)]
#[command(version)]
pub struct Settings {
    /// Namespace of Tulle's control plane.
    #[arg(long, env = "TULLE_NAMESPACE", default_value = "tulle-system")]
    pub namespace: String,
    /// This pod's name.
    #[arg(long, env = "TULLE_POD_NAME", default_value = "")]
    pub pod_name: String,
    /// The trust domain while there is no MeshConfig.
    #[arg(long, env = "TULLE_TRUST_DOMAIN", default_value = "cluster.local")]
    pub trust_domain: String,
    /// Image of the injected sidecar.
    #[arg(long, env = "TULLE_SIDECAR_IMAGE")]
    pub sidecar_image: String,
    /// Name of the webhook's Service.
    #[arg(long, default_value = "tulle-webhook")]
    pub service: String,
    /// `host:port` of the operator, as sidecars reach it.
    #[arg(long, env = "TULLE_OPERATOR")]
    pub operator: Option<String>,
}

impl Settings {
    /// `host:port` of the operator, as sidecars reach it.
    pub fn operator(&self) -> String {
        let port = tulle_mesh::ports::DISCOVERY;
        self.operator.clone().unwrap_or_else(|| format!("tulle-operator.{}.svc:{port}", self.namespace))
    }
}
