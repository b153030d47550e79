//! The official conformance suite of the Gateway API. What it does not look at is in suite `routes`.

use anyhow::Result;

use super::Test;
use crate::conformance;
use crate::kubectl::Kube;

pub(super) const TESTS: &[Test] = &[(
    "the official conformance suite v1.6.3 passes with the profiles MESH-HTTP and MESH-GRPC, every extended feature and no skip",
    official,
)];

fn official(kube: &Kube) -> Result<()> {
    conformance::passes(kube).map(drop)
}
