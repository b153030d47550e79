//! The resources that are in force, as `tulle config POD --diff` reads them.

use tulle_mesh::resources::Resources;

use crate::config::accepted::AcceptedResources;

/// All of them as JSON ([`Resources`]).
pub fn json(accepted: &AcceptedResources) -> String {
    serde_json::to_string(&Resources { resources: accepted.described() }).unwrap_or_default()
}
