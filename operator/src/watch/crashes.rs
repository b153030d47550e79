//! Reads from a pod's status how often a container of the application was restarted, and when it last ended.

use super::wire;
use crate::model::Crashes;

/// The restarts of one container of a pod: of several containers the one that crashes, or has crashed most often. `None`:
/// there were none. Init containers, and with them the sidecar of the mesh, do not count.
pub(super) fn crashes(status: &wire::PodStatus) -> Option<Box<Crashes>> {
    let containers = status.container_statuses.iter().flatten();
    let crashed = containers.filter(|container| container.restart_count > 0 || is_looping(container));
    let worst = crashed.max_by_key(|container| (is_looping(container), container.restart_count))?;
    Some(Box::new(Crashes {
        container: worst.name.as_str().into(),
        restarts: worst.restart_count,
        is_looping: is_looping(worst),
        last_unix: ended(worst.state.as_ref()).max(ended(worst.last_state.as_ref())),
    }))
}

/// Whether kubelet waits before it starts the container again.
fn is_looping(container: &wire::ContainerStatus) -> bool {
    let waiting = container.state.as_ref().and_then(|state| state.waiting.as_ref());
    waiting.and_then(|waiting| waiting.reason.as_deref()) == Some("CrashLoopBackOff")
}

/// When a container ended, in seconds since 1970. 0: the state does not say.
fn ended(state: Option<&wire::ContainerState>) -> i64 {
    let terminated = state.and_then(|state| state.terminated.as_ref());
    terminated.and_then(|end| end.finished_at.as_ref()).map_or(0, |time| time.0.as_second())
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn crashes_of(containers: Value) -> Option<Crashes> {
        let status = serde_json::from_value(json!({"containerStatuses": containers})).unwrap();
        crashes(&status).map(|crashes| *crashes)
    }

    fn container(name: &str, restarts: u32, state: Value) -> Value {
        let ended = json!({"terminated": {"exitCode": 1, "finishedAt": "1970-01-01T00:01:40Z"}});
        let last = if restarts > 0 { ended } else { json!({}) };
        json!({"name": name, "restartCount": restarts, "state": state, "lastState": last})
    }

    #[test]
    fn the_container_that_crashes_is_known_with_its_restarts_and_its_last_end() {
        let back_off = json!({"waiting": {"reason": "CrashLoopBackOff", "message": "back-off 40s"}});
        let running = json!({"running": {"startedAt": "1970-01-01T00:02:00Z"}});
        let exporter = container("exporter", 9, running.clone());
        let found = crashes_of(json!([exporter, container("app", 4, back_off)]));
        let app = Crashes { container: "app".into(), restarts: 4, is_looping: true, last_unix: 100 };
        assert_eq!(found, Some(app));
        let found = crashes_of(json!([container("app", 1, running)]));
        let app = Crashes { container: "app".into(), restarts: 1, is_looping: false, last_unix: 100 };
        assert_eq!(found, Some(app));
    }

    #[test]
    fn a_container_that_runs_for_the_first_time_or_has_not_started_has_not_crashed() {
        let running = json!({"running": {"startedAt": "1970-01-01T00:02:00Z"}});
        assert_eq!(crashes_of(json!([container("app", 0, running)])), None);
        let pulls = json!({"waiting": {"reason": "ImagePullBackOff"}});
        assert_eq!(crashes_of(json!([container("app", 0, pulls)])), None);
        assert_eq!(crashes_of(json!(null)), None);
    }

    #[test]
    fn a_container_that_has_just_ended_ended_last_then() {
        let ended = json!({"terminated": {"exitCode": 1, "finishedAt": "1970-01-01T00:03:20Z"}});
        let found = crashes_of(json!([container("app", 1, ended)]));
        assert_eq!(found.map(|crashes| crashes.last_unix), Some(200));
    }
}
