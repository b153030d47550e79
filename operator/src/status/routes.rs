//! Status of the Gateway API's routes: what each parent that is a Service of the mesh gets to read.
//!
//! In: the parents that a route's status has, and what holds for each of our own. Out: the parents that it should have.
//! The entries of other controllers stay as they are and where they are, whatever is in them: this works on JSON.
//!
//! ```text
//!   look    which routes are looked at, and when
//!   events  a Warning on a route that is not accepted
//!   times   how long it took until all sidecars had acknowledged a change
//! ```

pub mod events;
pub mod look;
pub mod times;

use std::borrow::Cow;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use serde_json::{Value, json};

use crate::discovery::RouteAcknowledgement;

/// Name under which this operator writes into the status of the Gateway API's objects.
pub const CONTROLLER: &str = "tulle.dev/mesh-controller";
/// Condition: the parent takes the route.
pub const ACCEPTED: &str = "Accepted";
/// Condition: everything that the route refers to was found.
pub const RESOLVED_REFS: &str = "ResolvedRefs";
/// Condition: some rules are left out. Present only while it is true.
pub const PARTIALLY_INVALID: &str = "PartiallyInvalid";
/// Condition of our own: sidecars enforce this generation.
pub const ACKNOWLEDGED: &str = "tulle.dev/Acknowledged";
/// Conditions that this operator writes. Others in our entries are somebody else's.
const OWN: [&str; 4] = [ACCEPTED, RESOLVED_REFS, PARTIALLY_INVALID, ACKNOWLEDGED];
/// Entries that the schema allows, of all controllers.
const MOST_PARENTS: usize = 32;
/// Conditions that the schema allows in one entry.
const MOST_CONDITIONS: usize = 8;
/// Characters of a message that the schema allows.
const LONGEST_MESSAGE: usize = 32_768;
/// Sidecars that are named in a message.
const MOST_NAMES: usize = 3;

/// The status of a condition.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Truth {
    /// It holds.
    True,
    /// It does not.
    False,
    /// Not decided yet.
    Unknown,
}

impl Truth {
    /// As the API spells it.
    fn as_str(self) -> &'static str {
        match self {
            Self::True => "True",
            Self::False => "False",
            Self::Unknown => "Unknown",
        }
    }
}

impl From<bool> for Truth {
    fn from(holds: bool) -> Self {
        if holds { Self::True } else { Self::False }
    }
}

/// A condition as it should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decided {
    /// Its type.
    pub type_: &'static str,
    /// Whether it holds.
    pub status: Truth,
    /// One word.
    pub reason: Cow<'static, str>,
    /// What was observed, and what to do.
    pub message: String,
}

/// A parent of a route that is ours.
#[derive(Clone, Debug, PartialEq)]
pub struct Parent {
    /// The reference exactly as it stands in the route.
    pub reference: Value,
    /// Conditions, in the order in which new ones are added.
    pub conditions: Vec<Decided>,
}

/// The parents of a route's status.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Entries {
    /// All entries, of all controllers.
    pub parents: Vec<Value>,
    /// Own entries for which there was no room.
    pub left_out: usize,
}

/// Computes the entries of a route's status from those that it has. Own entries of parents that are not in `ours` are
/// removed.
pub fn entries(current: &[Value], ours: &[Parent], generation: i64, now: &Time) -> Entries {
    let mut missing: Vec<&Parent> = Vec::new();
    for parent in ours {
        if !missing.iter().any(|known| known.reference == parent.reference) {
            missing.push(parent);
        }
    }
    let mut result = Entries::default();
    for entry in current {
        if !is_own(entry) {
            result.parents.push(entry.clone());
            continue;
        }
        let reference = entry.get("parentRef");
        if let Some(position) = missing.iter().position(|parent| Some(&parent.reference) == reference) {
            result.parents.push(written(Some(entry), missing.remove(position), generation, now));
        }
    }
    for parent in missing {
        if result.parents.len() < MOST_PARENTS {
            result.parents.push(written(None, parent, generation, now));
        } else {
            result.left_out += 1;
        }
    }
    result
}

/// The condition of an own entry, as the object has it.
pub fn found<'a>(current: &'a [Value], reference: &Value, type_: &str) -> Option<&'a Value> {
    let mut own = current.iter().filter(|entry| is_own(entry));
    let entry = own.find(|entry| entry.get("parentRef") == Some(reference))?;
    list(entry, "conditions").iter().find(|condition| text(condition, "type") == type_)
}

/// A field of an object that is a text. Empty: it has none.
pub fn text<'a>(of: &'a Value, field: &str) -> &'a str {
    of.get(field).and_then(Value::as_str).unwrap_or_default()
}

/// A field of an object that is a list. Empty: it has none.
pub fn list<'a>(of: &'a Value, field: &str) -> &'a [Value] {
    of.get(field).and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default()
}

fn is_own(entry: &Value) -> bool {
    text(entry, "controllerName") == CONTROLLER
}

fn written(old: Option<&Value>, parent: &Parent, generation: i64, now: &Time) -> Value {
    let old = old.map(|old| list(old, "conditions")).unwrap_or_default();
    json!({
        "parentRef": parent.reference,
        "controllerName": CONTROLLER,
        "conditions": conditions(old, &parent.conditions, generation, now),
    })
}

/// Computes conditions from those that there are. The time of a condition moves with its status only. Conditions of our
/// own that are not in `decided` are removed; others stay, as far as there is room.
pub fn conditions(old: &[Value], decided: &[Decided], generation: i64, now: &Time) -> Vec<Value> {
    let mut missing: Vec<&Decided> = decided.iter().collect();
    let mut result = Vec::with_capacity(old.len().max(decided.len()));
    for condition in old {
        let type_ = text(condition, "type");
        if let Some(position) = missing.iter().position(|decided| decided.type_ == type_) {
            result.push(condition_of(Some(condition), missing.remove(position), generation, now));
        } else if !OWN.contains(&type_) {
            result.push(condition.clone());
        }
    }
    result.extend(missing.into_iter().map(|decided| condition_of(None, decided, generation, now)));
    while result.len() > MOST_CONDITIONS {
        let Some(foreign) = result.iter().rposition(|condition| !OWN.contains(&text(condition, "type")))
        else {
            break;
        };
        result.remove(foreign);
    }
    result
}

fn condition_of(old: Option<&Value>, decided: &Decided, generation: i64, now: &Time) -> Value {
    let status = decided.status.as_str();
    let same = old.filter(|old| text(old, "status") == status);
    let since = same.and_then(|old| old.get("lastTransitionTime")).cloned();
    let message = match decided.message.char_indices().nth(LONGEST_MESSAGE) {
        Some((end, _)) => decided.message.get(..end).unwrap_or_default(),
        None => decided.message.as_str(),
    };
    json!({
        "type": decided.type_,
        "status": status,
        "reason": decided.reason,
        "message": message,
        "observedGeneration": generation,
        "lastTransitionTime": since.unwrap_or_else(|| json!(now)),
    })
}

/// Condition `tulle.dev/Acknowledged` of a route that is accepted or not, from what its sidecars have said. One that is
/// not accepted may be in force too: what needs an unsupported filter is answered with an error.
pub fn acknowledged(accepted: bool, seen: &RouteAcknowledgement) -> Decided {
    let RouteAcknowledgement { holding, behind, refusal, .. } = seen;
    let (status, reason, message) = match (behind.len(), refusal) {
        _ if *holding == 0 && accepted => {
            (Truth::Unknown, "NotInUse", "no sidecar uses this route yet".to_owned())
        }
        _ if *holding == 0 => (
            Truth::Unknown,
            "NotAccepted",
            "no sidecar holds this route for this parent: it is not accepted".to_owned(),
        ),
        (0, _) => (Truth::True, "Acknowledged", format!("{holding} of {holding} sidecars")),
        (count, refusal) => {
            let mut names: Vec<&str> = behind.iter().map(String::as_str).take(MOST_NAMES).collect();
            let more = count.saturating_sub(names.len());
            let more = (more > 0).then(|| format!("{more} more"));
            names.extend(more.as_deref());
            let (acknowledged, names) = (holding.saturating_sub(count), names.join(", "));
            let progress = format!("{acknowledged} of {holding} sidecars; behind: {names}");
            match refusal {
                Some(refusal) => (Truth::False, "RefusedBySidecar", format!("{progress}; {refusal}")),
                None => (Truth::False, "Propagating", progress),
            }
        }
    };
    Decided { type_: ACKNOWLEDGED, status, reason: reason.into(), message }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::jiff::Timestamp;

    use super::*;

    fn at(second: i64) -> Time {
        Time(Timestamp::from_second(second).unwrap())
    }

    fn accepted(status: Truth, message: &str) -> Decided {
        let reason = if status == Truth::True { "Accepted" } else { "UnsupportedValue" };
        Decided { type_: ACCEPTED, status, reason: reason.into(), message: message.to_owned() }
    }

    fn service(name: &str) -> Value {
        json!({"group": "", "kind": "Service", "name": name, "port": 80})
    }

    fn parent(name: &str) -> Parent {
        Parent { reference: service(name), conditions: vec![accepted(Truth::True, "accepted")] }
    }

    /// The entry of another controller for the same Service, with fields that this build does not know.
    fn foreign(name: &str) -> Value {
        json!({"parentRef": service(name), "controllerName": "example.com/other", "future": 1,
            "conditions": [{"type": "Accepted", "status": "False", "reason": "No", "message": ""}]})
    }

    fn of(current: &[Value], ours: &[Parent]) -> Vec<Value> {
        entries(current, ours, 3, &at(60)).parents
    }

    #[test]
    fn a_reference_is_echoed_exactly_and_every_condition_has_the_generation() {
        let found = of(&[], &[parent("web")]);
        assert_eq!(
            found,
            [json!({
                "parentRef": {"group": "", "kind": "Service", "name": "web", "port": 80},
                "controllerName": "tulle.dev/mesh-controller",
                "conditions": [{"type": "Accepted", "status": "True", "reason": "Accepted",
                    "message": "accepted", "observedGeneration": 3,
                    "lastTransitionTime": "1970-01-01T00:01:00Z"}],
            })]
        );
    }

    #[test]
    fn entries_of_other_controllers_stay_what_and_where_they_are() {
        let own = of(&[], &[parent("web")]).remove(0);
        let current = [foreign("a"), own.clone(), foreign("web")];
        assert_eq!(of(&current, &[parent("web"), parent("new")])[..3], current);
        assert_eq!(of(&current, &[parent("web"), parent("new")]).len(), 4);
    }

    #[test]
    fn an_own_entry_goes_with_its_parent_and_a_foreign_one_for_the_same_parent_stays() {
        let own = of(&[], &[parent("web"), parent("gone")]);
        let current = [own[1].clone(), foreign("gone"), own[0].clone()];
        assert_eq!(of(&current, &[parent("web")]), [foreign("gone"), own[0].clone()]);
        assert_eq!(of(&current, &[]), [foreign("gone")]);
    }

    #[test]
    fn a_parent_has_one_own_entry_however_often_it_is_named() {
        let own = of(&[], &[parent("web"), parent("web")]);
        assert_eq!(own.len(), 1);
        let twice = [own[0].clone(), own[0].clone()];
        assert_eq!(of(&twice, &[parent("web")]), own);
    }

    #[test]
    fn nothing_is_written_when_nothing_but_time_differs() {
        let before = entries(&[], &[parent("web")], 3, &at(60)).parents;
        assert_eq!(entries(&before, &[parent("web")], 3, &at(99)).parents, before);
        assert_ne!(entries(&before, &[parent("web")], 4, &at(99)).parents, before, "another generation");
    }

    #[test]
    fn the_time_of_a_condition_moves_with_its_status_only() {
        let mut web = parent("web");
        let first = entries(&[], std::slice::from_ref(&web), 3, &at(60)).parents;
        let time = |entries: &[Value]| {
            found(entries, &service("web"), ACCEPTED).unwrap()["lastTransitionTime"]
                .as_str()
                .map(str::to_owned)
        };
        web.conditions = vec![accepted(Truth::True, "another message")];
        let second = entries(&first, std::slice::from_ref(&web), 4, &at(70)).parents;
        assert_ne!(first, second);
        assert_eq!(time(&second), time(&first));
        web.conditions = vec![accepted(Truth::False, "no")];
        let third = entries(&second, &[web], 4, &at(80)).parents;
        assert_eq!(time(&third).as_deref(), Some("1970-01-01T00:01:20Z"));
    }

    #[test]
    fn no_more_than_32_entries_are_written_and_a_stale_own_one_makes_room() {
        let mut current: Vec<Value> = (0..31).map(|number| foreign(&number.to_string())).collect();
        current.extend(of(&[], &[parent("gone")]));
        let found = entries(&current, &[parent("a"), parent("b")], 3, &at(60));
        assert_eq!((found.parents.len(), found.left_out), (32, 1));
        assert_eq!(found.parents[..31], current[..31]);
        assert_eq!(found.parents[31]["parentRef"], service("a"));
    }

    #[test]
    fn partially_invalid_is_there_only_while_it_is_true() {
        let mut web = parent("web");
        let dropped = Decided {
            type_: PARTIALLY_INVALID,
            status: Truth::True,
            reason: "UnsupportedValue".into(),
            message: "Dropped Rule 1".to_owned(),
        };
        web.conditions.push(dropped);
        let partly = of(&[], &[web]);
        assert!(found(&partly, &service("web"), PARTIALLY_INVALID).is_some());
        let whole = of(&partly, &[parent("web")]);
        assert!(found(&whole, &service("web"), PARTIALLY_INVALID).is_none());
        assert!(found(&whole, &service("web"), ACCEPTED).is_some());
    }

    #[test]
    fn conditions_of_others_in_our_entry_stay_while_there_is_room() {
        let other = |number: usize| json!({"type": format!("example.com/{number}"), "status": "True"});
        let decided = [accepted(Truth::True, "accepted")];
        let few: Vec<Value> = (0..7).map(other).collect();
        let kept = conditions(&few, &decided, 1, &at(0));
        assert_eq!(kept[..7], few);
        assert_eq!(text(&kept[7], "type"), ACCEPTED);
        let many: Vec<Value> = (0..8).map(other).collect();
        let kept = conditions(&many, &decided, 1, &at(0));
        assert_eq!((kept.len(), text(&kept[7], "type")), (8, ACCEPTED));
    }

    #[test]
    fn a_message_is_cut_where_the_schema_ends_it() {
        let long = accepted(Truth::False, &"é".repeat(LONGEST_MESSAGE + 1));
        let cut = conditions(&[], &[long], 1, &at(0));
        assert_eq!(text(&cut[0], "message").chars().count(), LONGEST_MESSAGE);
    }

    fn seen(holding: usize, behind: &[&str]) -> RouteAcknowledgement {
        let behind = behind.iter().map(|pod| (*pod).to_owned()).collect();
        RouteAcknowledgement { holding, behind, ..RouteAcknowledgement::default() }
    }

    #[test]
    fn acknowledged_says_how_many_sidecars_and_names_three_that_are_behind() {
        let of = |seen: &RouteAcknowledgement| {
            let found = acknowledged(true, seen);
            (found.status, found.reason.into_owned(), found.message)
        };
        let unused = (Truth::Unknown, "NotInUse".to_owned(), "no sidecar uses this route yet".to_owned());
        assert_eq!(of(&seen(0, &[])), unused);
        let all = (Truth::True, "Acknowledged".to_owned(), "2 of 2 sidecars".to_owned());
        assert_eq!(of(&seen(2, &[])), all);
        let (status, reason, message) = of(&seen(12, &["shop/a", "shop/b"]));
        assert_eq!((status, reason.as_str()), (Truth::False, "Propagating"));
        assert_eq!(message, "10 of 12 sidecars; behind: shop/a, shop/b");
        let many = of(&seen(5, &["shop/a", "shop/b", "shop/c", "shop/d", "shop/e"])).2;
        assert_eq!(many, "0 of 5 sidecars; behind: shop/a, shop/b, shop/c, 2 more");
        let refused = RouteAcknowledgement {
            refusal: Some("pod shop/a: requires routes/v1".to_owned()),
            ..seen(2, &["shop/a"])
        };
        let (_, reason, message) = of(&refused);
        assert_eq!(reason, "RefusedBySidecar");
        assert_eq!(message, "1 of 2 sidecars; behind: shop/a; pod shop/a: requires routes/v1");
    }

    #[test]
    fn a_route_that_is_not_accepted_is_awaited_only_of_sidecars_that_hold_it() {
        let of = |seen| {
            let found = acknowledged(false, &seen);
            (found.status, found.reason.into_owned())
        };
        assert_eq!(of(seen(0, &[])), (Truth::Unknown, "NotAccepted".to_owned()));
        assert_eq!(of(seen(2, &["shop/a"])), (Truth::False, "Propagating".to_owned()));
        assert_eq!(of(seen(2, &[])), (Truth::True, "Acknowledged".to_owned()));
    }
}
