//! Answers about routes of the Gateway API.

use tulle_mesh::query;

use super::{all, proto};

impl From<query::Routes> for proto::RoutesReply {
    fn from(routes: query::Routes) -> Self {
        Self { window: routes.window, lost: routes.lost, rows: all(routes.rows) }
    }
}

impl From<query::RouteRow> for proto::RouteRow {
    fn from(row: query::RouteRow) -> Self {
        Self {
            party: Some(row.party.into()),
            route: row.route,
            rules: all(row.rules),
            backend: row.backend.map(proto::RouteBackend::from),
            set: row.set,
            revision: row.revision,
            last_seen: row.last_seen,
            golden: row.golden.map(proto::Golden::from),
        }
    }
}

impl From<query::RuleName> for proto::RuleName {
    fn from(rule: query::RuleName) -> Self {
        Self { index: rule.index, name: rule.name }
    }
}

impl From<query::RouteBackend> for proto::RouteBackend {
    fn from(backend: query::RouteBackend) -> Self {
        Self { party: Some(backend.party.into()), port: backend.port.map(u32::from) }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn every_field_of_a_row_is_in_its_message() {
        let routes: query::Routes = serde_json::from_value(json!({"window": 60, "lost": 2, "rows": [{
            "party": {"namespace": "shop", "kind": "Service", "name": "web"},
            "route": "HTTPRoute/shop/web",
            "rules": [{"index": 3, "name": "api"}],
            "backend": {"party": {"namespace": "shop", "kind": "Service", "name": "api"}, "port": 80},
            "set": "canary", "revision": "r2", "lastSeen": 7, "golden": {"requests": 5},
        }]}))
        .unwrap();
        let party =
            |name: &str| proto::Party { namespace: "shop".into(), kind: "Service".into(), name: name.into() };
        let row = proto::RouteRow {
            party: Some(party("web")),
            route: "HTTPRoute/shop/web".into(),
            rules: vec![proto::RuleName { index: 3, name: "api".into() }],
            backend: Some(proto::RouteBackend { party: Some(party("api")), port: Some(80) }),
            set: "canary".into(),
            revision: Some("r2".into()),
            last_seen: Some(7),
            golden: Some(proto::Golden { requests: 5, ..proto::Golden::default() }),
        };
        let wanted = proto::RoutesReply { window: 60, lost: 2, rows: vec![row] };
        assert_eq!(proto::RoutesReply::from(routes), wanted);
    }
}
