//! Requests as the parameters of a URL, and answers as messages. Messages have the fields of the JSON.

use tulle_mesh::query;

use super::proto;
use crate::api::Parameters;

mod denials;
mod routes;

impl From<proto::StatRequest> for Parameters {
    fn from(asked: proto::StatRequest) -> Self {
        Self::of([
            ("by", by(asked.by)),
            ("namespace", asked.namespace),
            ("name", asked.name),
            ("from", asked.from),
            ("to", asked.to),
            ("window", number(asked.window)),
        ])
    }
}

impl From<proto::EdgesRequest> for Parameters {
    fn from(asked: proto::EdgesRequest) -> Self {
        Self::of([("namespace", asked.namespace), ("window", number(asked.window))])
    }
}

impl From<proto::RoutesRequest> for Parameters {
    fn from(asked: proto::RoutesRequest) -> Self {
        Self::of([("namespace", asked.namespace), ("window", number(asked.window))])
    }
}

impl From<proto::TimelineRequest> for Parameters {
    fn from(asked: proto::TimelineRequest) -> Self {
        Self::of([("namespace", asked.namespace), ("name", asked.name), ("window", number(asked.window))])
    }
}

impl From<proto::SidecarsRequest> for Parameters {
    fn from(asked: proto::SidecarsRequest) -> Self {
        Self::of([("namespace", asked.namespace)])
    }
}

impl From<proto::HealthRequest> for Parameters {
    fn from(_: proto::HealthRequest) -> Self {
        Self::default()
    }
}

impl From<proto::ExplainRequest> for Parameters {
    fn from(asked: proto::ExplainRequest) -> Self {
        let headers = asked.header.into_iter().map(|header| ("header", Some(header)));
        let others = [
            ("source", asked.source),
            ("destination", asked.destination),
            ("method", asked.method),
            ("path", asked.path),
        ];
        Self::of(others.into_iter().chain(headers))
    }
}

impl From<proto::AccessRequest> for Parameters {
    fn from(asked: proto::AccessRequest) -> Self {
        let can = |wanted: bool| wanted.then(|| "can".to_owned());
        Self::of([
            ("namespace", asked.namespace),
            ("name", asked.name),
            ("who", can(asked.who)),
            ("what", can(asked.what)),
            ("window", number(asked.window)),
        ])
    }
}

impl From<proto::EvidenceRequest> for Parameters {
    fn from(asked: proto::EvidenceRequest) -> Self {
        Self::of([("namespace", asked.namespace), ("canary", asked.canary)])
    }
}

/// The value of parameter `by`. A number that is not known becomes a value that is refused.
fn by(by: i32) -> Option<String> {
    let name = match proto::By::try_from(by) {
        Ok(proto::By::Unspecified) => return None,
        Ok(proto::By::Workload) => "workload",
        Ok(proto::By::Service) => "service",
        Ok(proto::By::Route) => "route",
        Ok(proto::By::Revision) => "revision",
        Err(_) => return Some(by.to_string()),
    };
    Some(name.to_owned())
}

fn number(number: Option<u64>) -> Option<String> {
    number.map(|number| number.to_string())
}

fn all<T, R: From<T>>(values: Vec<T>) -> Vec<R> {
    values.into_iter().map(R::from).collect()
}

impl From<query::Stat> for proto::StatReply {
    fn from(stat: query::Stat) -> Self {
        Self { window: stat.window, lost: stat.lost, rows: all(stat.rows) }
    }
}

impl From<query::StatRow> for proto::StatRow {
    fn from(row: query::StatRow) -> Self {
        Self {
            party: Some(row.party.into()),
            route: row.route,
            revision: row.revision,
            meshed: row.meshed.map(proto::Meshed::from),
            golden: Some(row.golden.into()),
        }
    }
}

impl From<query::Party> for proto::Party {
    fn from(party: query::Party) -> Self {
        Self { namespace: party.namespace, kind: party.kind, name: party.name }
    }
}

impl From<query::Meshed> for proto::Meshed {
    fn from(meshed: query::Meshed) -> Self {
        Self { with: meshed.with, of: meshed.of }
    }
}

impl From<query::Golden> for proto::Golden {
    fn from(golden: query::Golden) -> Self {
        Self {
            requests: golden.requests,
            failures: golden.failures,
            client_errors: golden.client_errors,
            abandoned: golden.abandoned,
            denied: golden.denied,
            rps: golden.rps,
            success: golden.success,
            p50_ms: golden.p50_ms,
            p95_ms: golden.p95_ms,
            p99_ms: golden.p99_ms,
            retries: golden.retries,
            reasons: all(golden.reasons),
            connections: golden.connections,
            failed_connections: golden.failed_connections,
            bytes_up: golden.bytes_up,
            bytes_down: golden.bytes_down,
            attempt_success: golden.attempt_success,
            timeouts: golden.timeouts,
            ejections: golden.ejections,
        }
    }
}

impl From<query::Reason> for proto::Reason {
    fn from(reason: query::Reason) -> Self {
        Self { name: reason.name, count: reason.count }
    }
}

impl From<query::Edges> for proto::EdgesReply {
    fn from(edges: query::Edges) -> Self {
        Self { window: edges.window, lost: edges.lost, edges: all(edges.edges) }
    }
}

impl From<query::Edge> for proto::Edge {
    fn from(edge: query::Edge) -> Self {
        Self {
            source: Some(edge.source.into()),
            destination: Some(edge.destination.into()),
            protocol: edge.protocol,
            mtls: edge.mtls,
            golden: Some(edge.golden.into()),
            port: edge.port.map(u32::from),
            client_ids: edge.client_ids,
            server_ids: edge.server_ids,
            client_zones: edge.client_zones,
            server_zones: edge.server_zones,
        }
    }
}

impl From<query::Timeline> for proto::TimelineReply {
    fn from(timeline: query::Timeline) -> Self {
        Self { step: timeline.step, start: timeline.start, points: all(timeline.points) }
    }
}

impl From<query::Sidecars> for proto::SidecarsReply {
    fn from(sidecars: query::Sidecars) -> Self {
        Self { sidecars: all(sidecars.sidecars), without: sidecars.without }
    }
}

impl From<query::Sidecar> for proto::Sidecar {
    fn from(sidecar: query::Sidecar) -> Self {
        Self {
            namespace: sidecar.namespace,
            pod: sidecar.pod,
            workload: Some(sidecar.workload.into()),
            version: sidecar.version,
            connected: sidecar.connected,
            acknowledged: sidecar.acknowledged,
            resources: sidecar.resources,
            behind_seconds: sidecar.behind_seconds,
            refused: sidecar.refused,
            certificate_not_after: sidecar.certificate_not_after,
            operator: sidecar.operator,
            memory_bytes: sidecar.memory_bytes,
        }
    }
}

impl From<query::Health> for proto::HealthReply {
    fn from(health: query::Health) -> Self {
        Self {
            version: health.version,
            leader: health.leader,
            pod: health.pod,
            trust_domain: health.trust_domain,
            root_not_after: health.root_not_after,
            sidecars: health.sidecars,
            history: health.history,
            series: health.series,
            max_series: health.max_series,
        }
    }
}

impl From<query::Explanation> for proto::ExplainReply {
    fn from(explanation: query::Explanation) -> Self {
        Self { stages: all(explanation.stages), outcome: explanation.outcome, reaches: explanation.reaches }
    }
}

impl From<query::Stage> for proto::Stage {
    fn from(stage: query::Stage) -> Self {
        let verdict = match stage.verdict {
            query::Verdict::Pass => proto::Verdict::Pass,
            query::Verdict::Stop => proto::Verdict::Stop,
            query::Verdict::Depends => proto::Verdict::Depends,
        };
        Self { name: stage.name, verdict: verdict.into(), object: stage.object, because: stage.because }
    }
}

impl From<query::Access> for proto::AccessReply {
    fn from(access: query::Access) -> Self {
        let suggested = access.suggested.iter().map(ToString::to_string).collect();
        Self {
            rows: all(access.rows),
            suggested,
            truncated: access.truncated,
            window: access.window,
            lost: access.lost,
        }
    }
}

impl From<query::AccessRow> for proto::AccessRow {
    fn from(row: query::AccessRow) -> Self {
        Self {
            client: row.client,
            destination: Some(row.destination.into()),
            methods: row.methods,
            paths: row.paths,
            allowed_by: row.allowed_by,
            seen: row.seen,
        }
    }
}

impl From<query::Diff> for proto::DiffReply {
    fn from(diff: query::Diff) -> Self {
        Self { pods: diff.pods, rows: all(diff.rows), window: diff.window, lost: diff.lost }
    }
}

impl From<query::DiffRow> for proto::DiffRow {
    fn from(row: query::DiffRow) -> Self {
        Self { edge: Some(row.edge.into()), verdict: row.verdict, because: row.because }
    }
}

impl From<query::Evidence> for proto::EvidenceReply {
    fn from(evidence: query::Evidence) -> Self {
        Self {
            namespace: evidence.namespace,
            name: evidence.name,
            leader: evidence.leader,
            epoch: evidence.epoch,
            blocks: evidence.blocks,
            block_start: evidence.block_start,
            canary: Some(evidence.canary.into()),
            stable: Some(evidence.stable.into()),
            pods: all(evidence.pods),
            tests: all(evidence.tests),
            verdict: evidence.verdict,
            because: evidence.because,
        }
    }
}

impl From<query::VersionAttempts> for proto::VersionAttempts {
    fn from(version: query::VersionAttempts) -> Self {
        Self {
            revision: version.revision,
            attempts: version.attempts,
            failures: version.failures,
            unreached: version.unreached,
            client_errors: version.client_errors,
        }
    }
}

impl From<query::PodAttempts> for proto::PodAttempts {
    fn from(pod: query::PodAttempts) -> Self {
        Self {
            name: pod.name,
            version: pod.version,
            revision: pod.revision,
            attempts: pod.attempts,
            failures: pod.failures,
            unreached: pod.unreached,
            client_errors: pod.client_errors,
            p50_ms: pod.p50_ms,
            p95_ms: pod.p95_ms,
            p99_ms: pod.p99_ms,
        }
    }
}

impl From<query::EvidenceTest> for proto::EvidenceTest {
    fn from(test: query::EvidenceTest) -> Self {
        Self { name: test.name, odds: test.odds, certain: test.certain, blocks: test.blocks }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn party(name: &str) -> proto::Party {
        proto::Party { namespace: "shop".into(), kind: "Deployment".into(), name: name.into() }
    }

    /// Every number another, so that none can stand for another.
    fn golden() -> (serde_json::Value, proto::Golden) {
        let json = json!({
            "requests": 1, "failures": 2, "clientErrors": 3, "abandoned": 4, "denied": 5, "rps": 6.5,
            "success": 0.75, "p50Ms": 8.5, "p95Ms": 9.5, "p99Ms": 10.5, "retries": 11,
            "reasons": [{"name": "UpstreamReset", "count": 12}],
            "connections": 13, "failedConnections": 14, "bytesUp": 15, "bytesDown": 16,
            "attemptSuccess": 0.5, "timeouts": 17,
            "ejections": 17,
        });
        let message = proto::Golden {
            requests: 1,
            failures: 2,
            client_errors: 3,
            abandoned: 4,
            denied: 5,
            rps: 6.5,
            success: Some(0.75),
            p50_ms: Some(8.5),
            p95_ms: Some(9.5),
            p99_ms: Some(10.5),
            retries: 11,
            reasons: vec![proto::Reason { name: "UpstreamReset".into(), count: 12 }],
            connections: 13,
            failed_connections: 14,
            bytes_up: 15,
            bytes_down: 16,
            attempt_success: Some(0.5),
            timeouts: 17,
            ejections: 17,
        };
        (json, message)
    }

    #[test]
    fn every_count_of_a_row_is_in_its_message() {
        let (of_json, of_message) = golden();
        let stat: query::Stat = serde_json::from_value(json!({"window": 60, "lost": 2, "rows": [{
            "party": {"namespace": "shop", "kind": "Deployment", "name": "web"},
            "route": "HTTPRoute/shop/web", "revision": "r1", "meshed": {"with": 1, "of": 2}, "golden": of_json,
        }]}))
        .unwrap();
        let row = proto::StatRow {
            party: Some(party("web")),
            route: Some("HTTPRoute/shop/web".into()),
            revision: Some("r1".into()),
            meshed: Some(proto::Meshed { with: 1, of: 2 }),
            golden: Some(of_message),
        };
        assert_eq!(proto::StatReply::from(stat), proto::StatReply { window: 60, lost: 2, rows: vec![row] });
    }

    #[test]
    fn what_is_not_known_is_absent_and_not_zero() {
        let golden = proto::Golden::from(query::Golden::default());
        assert_eq!((golden.success, golden.p99_ms), (None, None));
        let sidecar = proto::Sidecar::from(query::Sidecar::default());
        assert_eq!((sidecar.behind_seconds, sidecar.certificate_not_after), (None, None));
        assert_eq!((sidecar.operator, sidecar.memory_bytes), (None, None));
        let row = proto::RouteRow::from(query::RouteRow::default());
        assert_eq!((row.backend, row.last_seen, row.golden), (None, None, None));
        assert_eq!(proto::StatRow::from(query::StatRow::default()).meshed, None);
    }

    #[test]
    fn an_edge_keeps_its_direction() {
        let edge: query::Edge = serde_json::from_value(json!({
            "source": {"namespace": "shop", "kind": "Deployment", "name": "web"},
            "destination": {"namespace": "shop", "kind": "Deployment", "name": "cart"},
            "protocol": "http2", "mtls": true, "port": 80, "clientIds": ["c"], "serverIds": ["s"],
            "clientZones": ["a"], "serverZones": ["b"],
        }))
        .unwrap();
        let wanted = proto::Edge {
            source: Some(party("web")),
            destination: Some(party("cart")),
            protocol: "http2".into(),
            mtls: true,
            golden: Some(proto::Golden::default()),
            port: Some(80),
            client_ids: vec!["c".into()],
            server_ids: vec!["s".into()],
            client_zones: vec!["a".into()],
            server_zones: vec!["b".into()],
        };
        assert_eq!(proto::Edge::from(edge), wanted);
    }

    #[test]
    fn verdicts_keep_their_meaning() {
        let of = |verdict| proto::Stage::from(query::Stage { verdict, ..query::Stage::default() }).verdict();
        assert_eq!(of(query::Verdict::Pass), proto::Verdict::Pass);
        assert_eq!(of(query::Verdict::Stop), proto::Verdict::Stop);
        assert_eq!(of(query::Verdict::Depends), proto::Verdict::Depends);
    }

    #[test]
    fn suggested_policies_are_json() {
        let policy = json!({"kind": "MeshPolicy", "metadata": {"name": "web"}});
        let access = query::Access { suggested: vec![policy.clone()], ..query::Access::default() };
        let reply = proto::AccessReply::from(access);
        let found: Vec<serde_json::Value> =
            reply.suggested.iter().map(|text| serde_json::from_str(text).unwrap()).collect();
        assert_eq!(found, [policy]);
    }

    #[test]
    fn answers_about_policies_say_which_time_they_are_about() {
        let access = query::Access { window: 7_200, lost: 2, ..query::Access::default() };
        let reply = proto::AccessReply::from(access);
        assert_eq!((reply.window, reply.lost), (7_200, 2));
        let diff = query::Diff { window: 3_600, lost: 1, ..query::Diff::default() };
        let reply = proto::DiffReply::from(diff);
        assert_eq!((reply.window, reply.lost), (3_600, 1));
    }

    #[test]
    fn every_count_of_evidence_is_in_its_message() {
        let evidence: query::Evidence = serde_json::from_value(json!({
            "namespace": "shop", "name": "web", "leader": true, "epoch": 1, "blocks": 2, "blockStart": 3,
            "canary": {"revision": "new", "attempts": 14, "failures": 13, "unreached": 12, "clientErrors": 11},
            "stable": {"revision": "old", "attempts": 24, "failures": 23, "unreached": 22, "clientErrors": 21},
            "pods": [{
                "name": "a", "version": "canary", "revision": "new", "attempts": 34, "failures": 33, "unreached": 32,
                "clientErrors": 31, "p50Ms": 0.5, "p95Ms": 9.5, "p99Ms": 9.9,
            }],
            "tests": [{"name": "errors", "odds": 4.5, "certain": 200.5, "blocks": 40}],
            "verdict": "Pass", "because": "not worse",
        }))
        .unwrap();
        let version = |revision: &str, tens: u64| proto::VersionAttempts {
            revision: revision.into(),
            attempts: tens + 4,
            failures: tens + 3,
            unreached: tens + 2,
            client_errors: tens + 1,
        };
        let pod = proto::PodAttempts {
            name: "a".into(),
            version: "canary".into(),
            revision: "new".into(),
            attempts: 34,
            failures: 33,
            unreached: 32,
            client_errors: 31,
            p50_ms: Some(0.5),
            p95_ms: Some(9.5),
            p99_ms: Some(9.9),
        };
        let test = proto::EvidenceTest { name: "errors".into(), odds: Some(4.5), certain: 200.5, blocks: 40 };
        let wanted = proto::EvidenceReply {
            namespace: "shop".into(),
            name: "web".into(),
            leader: true,
            epoch: 1,
            blocks: 2,
            block_start: Some(3),
            canary: Some(version("new", 10)),
            stable: Some(version("old", 20)),
            pods: vec![pod],
            tests: vec![test],
            verdict: "Pass".into(),
            because: "not worse".into(),
        };
        assert_eq!(proto::EvidenceReply::from(evidence), wanted);
    }

    #[test]
    fn a_request_becomes_the_parameters_of_the_path() {
        let asked = proto::StatRequest {
            by: proto::By::Service.into(),
            namespace: Some("shop".into()),
            to: Some("shop/web".into()),
            window: Some(600),
            ..proto::StatRequest::default()
        };
        let given = |pairs: &[(&'static str, &str)]| {
            Parameters::of(pairs.iter().map(|(name, value)| (*name, Some((*value).to_owned()))))
        };
        let wanted = [("by", "service"), ("namespace", "shop"), ("to", "shop/web"), ("window", "600")];
        assert_eq!(Parameters::from(asked), given(&wanted));
        assert_eq!(Parameters::from(proto::StatRequest::default()), Parameters::default());
        let asked = proto::AccessRequest { who: true, ..proto::AccessRequest::default() };
        assert_eq!(Parameters::from(asked), given(&[("who", "can")]));
        let asked =
            proto::AccessRequest { what: true, window: Some(7_200), ..proto::AccessRequest::default() };
        assert_eq!(Parameters::from(asked), given(&[("what", "can"), ("window", "7200")]));
        let asked = proto::ExplainRequest {
            source: Some("shop/web".into()),
            header: vec!["x-user:beta".into(), "x-time:1".into()],
            ..proto::ExplainRequest::default()
        };
        let wanted = [("source", "shop/web"), ("header", "x-user:beta"), ("header", "x-time:1")];
        assert_eq!(Parameters::from(asked), given(&wanted));
    }
}
