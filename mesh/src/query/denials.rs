//! What is answered about single denials.

use serde::{Deserialize, Serialize};

use super::Party;

/// The last requests and connections that access rules or Strict mTLS refused, the latest first: of six hours at most, 20
/// of a workload, and 200 of an answer.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Denials {
    /// Whether the replica that answers leads: sidecars report single denials to the leader, and another replica has
    /// those of up to two seconds ago.
    pub leader: bool,
    /// How many more were refused at about the same time, and are not listed.
    pub dropped: u64,
    /// The rows.
    pub rows: Vec<DenialRow>,
}

/// A request or connection that was refused.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct DenialRow {
    /// [`crate::denial::DenialId`], as in the header `tulle-denial` of the answer and in the log.
    pub id: String,
    /// When, in milliseconds since 1970, by the clock of the sidecar.
    pub at_unix_ms: i64,
    /// The workload whose sidecar refused.
    pub workload: Party,
    /// Who called. Absent: somebody of a namespace that the token does not show.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub caller: Option<Party>,
    /// The method; empty: a connection whose content is opaque.
    pub method: String,
    /// The path, without its query.
    pub path: String,
    /// The sidecar has cut the method, the host or the path.
    pub cut: bool,
    /// The MeshPolicy, which is in the namespace of the workload; empty: mTLS is Strict.
    pub policy: String,
    /// What decided: `DenyRule(0)`, `NoAllowMatched`, `Plaintext`.
    pub rule: String,
}

impl Denials {
    /// Removes the names of callers of other namespaces than this one: beside a method and a path, a name says what
    /// somebody else has tried.
    pub fn hide_callers_outside(&mut self, namespace: &str) {
        let is_hidden = |caller: &Party| !caller.namespace.is_empty() && caller.namespace != namespace;
        for row in &mut self.rows {
            row.caller = row.caller.take().filter(|caller| !is_hidden(caller));
        }
    }
}
