//! The official conformance suite of the Gateway API, and `tulle explain` for all of its manifests. What the official
//! suite does not look at is in suite `routes`.

mod compared;
mod explained;
mod requests;

use anyhow::Result;

use super::Test;
use crate::conformance;
use crate::kubectl::Kube;

pub(super) const TESTS: &[Test] = &[
    (
        "the official conformance suite v1.6.3 passes with the profiles MESH-HTTP and MESH-GRPC, every extended feature and no skip",
        official,
    ),
    // In the namespaces of the official suite, which its manifests name.
    ("tulle explain and the sidecar agree about every manifest of the official suite", explained::agree),
];

fn official(kube: &Kube) -> Result<()> {
    conformance::passes(kube).map(drop)
}
