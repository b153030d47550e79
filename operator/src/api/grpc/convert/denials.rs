//! The last denials: what is asked for, and the answer.

use tulle_mesh::query;

use super::{all, proto};
use crate::api::Parameters;

impl From<proto::DenialsRequest> for Parameters {
    fn from(asked: proto::DenialsRequest) -> Self {
        Self::of([("namespace", asked.namespace), ("name", asked.name)])
    }
}

impl From<query::Denials> for proto::DenialsReply {
    fn from(denials: query::Denials) -> Self {
        Self { leader: denials.leader, dropped: denials.dropped, rows: all(denials.rows) }
    }
}

impl From<query::DenialRow> for proto::DenialRow {
    fn from(row: query::DenialRow) -> Self {
        Self {
            id: row.id,
            at_unix_ms: row.at_unix_ms,
            workload: Some(row.workload.into()),
            caller: row.caller.map(proto::Party::from),
            method: row.method,
            path: row.path,
            cut: row.cut,
            policy: row.policy,
            rule: row.rule,
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn every_field_of_a_denial_is_in_its_message() {
        let denials: query::Denials = serde_json::from_value(json!({"leader": true, "dropped": 2, "rows": [{
            "id": "0123456789abcdef", "atUnixMs": 7,
            "workload": {"namespace": "shop", "kind": "Deployment", "name": "web"},
            "caller": {"namespace": "pay", "kind": "ServiceAccount", "name": "cart"},
            "method": "POST", "path": "/orders", "cut": true, "policy": "guarded", "rule": "DenyRule(0)",
        }]}))
        .unwrap();
        let party = |namespace: &str, kind: &str, name: &str| {
            Some(proto::Party { namespace: namespace.into(), kind: kind.into(), name: name.into() })
        };
        let row = proto::DenialRow {
            id: "0123456789abcdef".into(),
            at_unix_ms: 7,
            workload: party("shop", "Deployment", "web"),
            caller: party("pay", "ServiceAccount", "cart"),
            method: "POST".into(),
            path: "/orders".into(),
            cut: true,
            policy: "guarded".into(),
            rule: "DenyRule(0)".into(),
        };
        let wanted = proto::DenialsReply { leader: true, dropped: 2, rows: vec![row] };
        assert_eq!(proto::DenialsReply::from(denials), wanted);
        assert_eq!(
            proto::DenialRow::from(query::DenialRow::default()).caller,
            None,
            "a caller that is hidden"
        );
    }

    #[test]
    fn a_request_names_a_workload() {
        let asked = proto::DenialsRequest { namespace: Some("shop".into()), name: Some("web".into()) };
        let wanted = [("namespace", Some("shop".to_owned())), ("name", Some("web".to_owned()))];
        assert_eq!(Parameters::from(asked), Parameters::of(wanted));
    }
}
