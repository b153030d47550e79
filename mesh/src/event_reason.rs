//! Why the operator publishes a Kubernetes event.
//!
//! One enum generates the field `reason` of events, the field `reason` of the operator's log and
//! docs/src/reference/events.md. Names never change, because users filter by them. In commands, upper-case words stand for
//! names of the reader's cluster.

/// The field `type` of an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum EventType {
    /// What happened is as it should be.
    Normal,
    /// A user may have to act.
    Warning,
}

impl EventType {
    /// The value of the field.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Normal => "Normal",
            Self::Warning => "Warning",
        }
    }
}

/// The object that an event is on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Regarding {
    /// A pod without a sidecar.
    Pod,
    /// A meshed namespace.
    Namespace,
    /// A Service.
    Service,
    /// A route of the Gateway API.
    Route,
    /// MeshConfig `mesh`.
    MeshConfig,
    /// A Canary.
    Canary,
}

impl Regarding {
    /// Every kind of object, in the order in which documentation lists them.
    pub const ALL: [Self; 6] =
        [Self::Pod, Self::Namespace, Self::Service, Self::Route, Self::MeshConfig, Self::Canary];
}

/// Each reason: its name, the object, the type, what was observed, and what to do.
macro_rules! event_reasons {
    ($($name:ident, $regarding:ident, $type:ident, $sentence:literal, $remedy:literal;)+) => {
        /// Why the operator publishes an event.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum EventReason {
            $(
                #[doc = $sentence]
                $name,
            )+
        }

        impl EventReason {
            /// Every reason, in the order in which documentation lists them.
            pub const ALL: &'static [Self] = &[$(Self::$name,)+];

            /// The word in events, in logs and, where a condition has the same reason, in conditions.
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$name => stringify!($name),)+
                }
            }

            /// The object that the event is on.
            pub const fn regarding(self) -> Regarding {
                match self {
                    $(Self::$name => Regarding::$regarding,)+
                }
            }

            /// The type of the event.
            pub const fn event_type(self) -> EventType {
                match self {
                    $(Self::$name => EventType::$type,)+
                }
            }

            /// What was observed, as a sentence.
            pub const fn sentence(self) -> &'static str {
                match self {
                    $(Self::$name => $sentence,)+
                }
            }

            /// What to do, as a sentence.
            pub const fn remedy(self) -> &'static str {
                match self {
                    $(Self::$name => $remedy,)+
                }
            }
        }
    };
}

event_reasons! {
    NoSidecar, Pod, Warning,
        "The pod was created before its namespace was labelled, or while the webhook did not answer.",
        "Recreate the pod.";
    OptOutIgnored, Pod, Warning,
        "The pod has the label `tulle.dev/inject: disabled`, and its namespace is `required`.",
        "Remove the label and recreate the pod, or exempt its service account.";
    SidecarImpossible, Pod, Warning,
        "The namespace is `required`, and the pod uses `hostNetwork`, runs on Windows or has the sidecar of another mesh.",
        "Move the pod to another namespace, or exempt its service account.";
    TrustNotWritten, Namespace, Warning,
        "ConfigMap `tulle-trust` could not be written, for example because a ResourceQuota allows no other; new pods stay in Init.",
        "Correct what the message names, such as the quota: the operator writes the ConfigMap again within 30 s.";
    AddressConflict, Service, Warning,
        "The Service claims an address of another Service, without effect.",
        "Remove the address from the Service that has the event.";
    NoMatchingParent, Route, Warning,
        "The Service or the port does not exist, or the Service has no cluster address.",
        "Correct `parentRefs`, or the Service.";
    UnsupportedValue, Route, Warning,
        "Tulle does not support a value of the route, or the operator cannot read the route.",
        "Correct what the message names, or upgrade the operator.";
    IncompatibleFilters, Route, Warning,
        "Two filters of a rule exclude each other.",
        "Remove one of the two.";
    RouteReasonConflicted, Route, Warning,
        "A route of a stronger kind has the port.",
        "Delete one of the two routes, or move one to another port.";
    TooManyRules, Route, Warning,
        "Older routes leave no room at the port, where all together may have 512 rules and 1 MiB.",
        "Remove rules from the routes of the port: `tulle routes SERVICE` lists them.";
    RootMissing, MeshConfig, Warning,
        "Secret `tulle-root` does not exist.",
        "Restore it from its backup; without one, the message says how to create a new root.";
    RootMismatch, MeshConfig, Warning,
        "Secret `tulle-root` contains no valid root.",
        "Restore it from its backup; the message says what is wrong with it.";
    RootReplaced, MeshConfig, Warning,
        "Secret `tulle-root` contains a different root than the one in use.",
        "Restore it from its backup, or restart the operators if the new root is intended.";
    Started, Canary, Normal,
        "A revision goes through the steps, or is tried again by hand.",
        "Nothing; `tulle canary status CANARY` follows the rollout.";
    WeightChanged, Canary, Normal,
        "The weight, or what a step sends by match or copies, has changed.",
        "Nothing.";
    Paused, Canary, Normal,
        "A pause waits for a user.",
        "Look at the revision, and run the command in the message.";
    Resumed, Canary, Normal,
        "A user has ended a pause.",
        "Nothing.";
    Approved, Canary, Normal,
        "A revision that was approved before came back, and is approved at once.",
        "Nothing.";
    Promoted, Canary, Normal,
        "The revision is approved; the message says why.",
        "Nothing: the remaining pods are replaced.";
    Restored, Canary, Normal,
        "The target is back at the approved revision.",
        "Nothing.";
    StableIsBack, Canary, Normal,
        "Pods of the stable revision are ready again, and the failed one gets no traffic.",
        "Nothing.";
    Returned, Canary, Normal,
        "After an aborted promotion the former revision carries all requests.",
        "Nothing.";
    Failed, Canary, Warning,
        "The revision was stopped; the message has the judge's sentence, or who stopped it.",
        "Correct the revision and deploy it again; `tulle canary status CANARY` shows the evidence.";
    FailedBefore, Canary, Warning,
        "A revision that failed and was undone has come back, and is not tried again.",
        "Deploy a good revision, or try this one again with the command in the message.";
    ActionIgnored, Canary, Warning,
        "An action had no effect; the message says why.",
        "Compare the action with the phase and the revision of the Canary: `tulle canary status CANARY`.";
    NothingToCompareWith, Canary, Warning,
        "No stable pod is left, so the revision takes all traffic. One that had a share of it and has not passed stays on trial, and is judged alone; any other is approved.",
        "Find out why the stable pods have gone: `kubectl get events`.";
    ServingFailedRevision, Canary, Warning,
        "A failed revision serves because nothing else can.",
        "Deploy a good revision, or accept this one with the action in the message.";
    PodsLost, Canary, Warning,
        "Pods were lost during a promotion, and some users go back to the former revision.",
        "Find out why the pods were lost: `kubectl get pods`.";
    PromotionStalled, Canary, Warning,
        "Not all pods were replaced before the deadline.",
        "Look at `kubectl describe` of the target and of its pods that are not ready.";
    TargetPaused, Canary, Warning,
        "The revision is promoted, and its Deployment is paused, so no pod is replaced.",
        "Run the command in the message: `kubectl rollout resume`.";
    HeldByJudge, Canary, Warning,
        "The judge does not let the revision pass: it surely answers more with 4xx, none of its requests ends while those to the stable revision do, or it has looked worse for five minutes. It keeps its share of the requests. Once per rollout.",
        "Run the command in the message: `tulle canary abort CANARY` takes the requests away. Or promote the revision, if it is meant to answer so.";
    DeadlineExceeded, Canary, Warning,
        "No verdict before `spec.deadline`.",
        "Send more requests to the revision, or promote or abort it with the action in the message.";
    DeadlineNotHeld, Canary, Warning,
        "The Deployment will be reported as failed while the Canary holds it back.",
        "Apply the ClusterRole of the operator's version: it needs `get` and `patch` of `deployments/status`.";
    TooFewPods, Canary, Warning,
        "For a minute the revision has had too few ready pods for its step, or none at all.",
        "Find out why its pods are missing or not ready: `kubectl get pods`. Or raise `maxSurge`, or lower the weights.";
    NoSplit, Canary, Warning,
        "A Service of the target cannot be split, and the step waits.",
        "Correct what the message names, or promote or abort the revision.";
    NoGate, Canary, Warning,
        "Pods of the revision have no readiness gate, usually because they have no sidecar: Kubernetes replaces the stable pods whatever the weight.",
        "`kubectl rollout undo` stops it. Remove `tulle.dev/inject: disabled` from the pod template, or label the namespace, and deploy again.";
    ClientsDialPods, Canary, Warning,
        "No sidecar dials the Service, only its pods, and the step waits.",
        "Configure the clients as the message says, or promote or abort the revision.";
    RefusedBySidecar, Canary, Warning,
        "A sidecar rejects the weight, usually because it is older than the operator.",
        "Restart the pod that the message names.";
    UndoFailed, Canary, Warning,
        "The previous template could not be restored; the message has the answer of the API server.",
        "Restore it with `kubectl rollout undo`, or give the operator the permission that it lacks.";
}

impl EventReason {
    /// The reason of this name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|reason| reason.name() == name)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::fs;
    use std::path::Path;

    use super::*;

    const INTRODUCTION: &str = "\
# Events

Kubernetes events of component `tulle-operator`, as `kubectl get events` shows them. Words in capitals stand for names of
your cluster. [Conditions](conditions.md) say what holds now. Generated from
[event_reason.rs](../../../mesh/src/event_reason.rs): `TULLE_UPDATE=1 cargo test -p tulle-mesh event_reason`.
";

    /// The heading of the section about an object, and what holds for all its events.
    fn section(regarding: Regarding) -> (&'static str, &'static str) {
        match regarding {
            Regarding::Pod => (
                "Pods without a sidecar",
                "\
Each is reported once per pod while one operator leads. Pods that are exempt, finished or terminating, and static
pods, are not reported.",
            ),
            Regarding::Namespace => (
                "Namespaces",
                "\
Of namespaces with the label `tulle.dev/inject`. Repeated every five minutes while it holds.",
            ),
            Regarding::Service => ("Services", "Each claim is reported once, and again when it returns."),
            Regarding::Route => (
                "Routes",
                "\
HTTPRoute, GRPCRoute, TLSRoute and TCPRoute that a parent does not accept, with the reason and message of
[condition `Accepted`](conditions.md#routes). One event each time that one of the two changes, and at most one per route
and reason in five minutes.",
            ),
            Regarding::MeshConfig => {
                ("MeshConfig", "As [condition `RootValid`](conditions.md#meshconfig), which says when it is over.")
            }
            Regarding::Canary => (
                "Canaries",
                "Each transition of a rollout is an event with a message of its own, which names the revision.",
            ),
        }
    }

    fn table(regarding: Regarding) -> String {
        let (heading, preface) = section(regarding);
        let mut table = format!(
            "\n## {heading}\n\n{preface}\n\n| reason | type | observed | what to do |\n|---|---|---|---|\n"
        );
        for reason in EventReason::ALL.iter().filter(|reason| reason.regarding() == regarding) {
            let (name, event_type) = (reason.name(), reason.event_type().name());
            let (sentence, remedy) = (reason.sentence(), reason.remedy());
            table.push_str(&format!("| `{name}` | {event_type} | {sentence} | {remedy} |\n"));
        }
        table
    }

    #[test]
    fn the_page_of_events_is_what_the_code_says() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/src/reference/events.md");
        let generated = INTRODUCTION.to_owned() + &Regarding::ALL.into_iter().map(table).collect::<String>();
        if std::env::var_os("TULLE_UPDATE").is_some() {
            fs::write(&path, &generated).unwrap();
        }
        let checked_in = fs::read_to_string(&path).unwrap_or_default();
        assert!(
            checked_in == generated,
            "events.md is stale: TULLE_UPDATE=1 cargo test -p tulle-mesh event_reason"
        );
    }

    #[test]
    fn every_reason_is_in_one_section_of_the_page() {
        let page: String = Regarding::ALL.into_iter().map(table).collect();
        for reason in EventReason::ALL {
            assert_eq!(page.matches(&format!("\n| `{}` |", reason.name())).count(), 1, "{reason:?}");
        }
    }

    #[test]
    fn names_are_unique_words_in_pascal_case() {
        let names: HashSet<_> = EventReason::ALL.iter().map(|reason| reason.name()).collect();
        assert_eq!(names.len(), EventReason::ALL.len());
        for name in names {
            assert!(name.starts_with(|first: char| first.is_ascii_uppercase()), "{name}");
            assert!(name.chars().all(|letter| letter.is_ascii_alphanumeric()), "{name}");
            assert!(name.contains(|letter: char| letter.is_ascii_lowercase()), "{name}");
            // The API server accepts no more.
            assert!(name.len() <= 128, "{name}");
        }
    }

    #[test]
    fn every_reason_is_found_by_its_name_and_no_other_word_is_one() {
        for reason in EventReason::ALL {
            assert_eq!(EventReason::from_name(reason.name()), Some(*reason));
        }
        for word in ["", "nosidecar", "Accepted"] {
            assert_eq!(EventReason::from_name(word), None, "{word}");
        }
    }

    #[test]
    fn every_reason_is_explained_in_sentences_that_fit_into_a_row_of_a_table() {
        for reason in EventReason::ALL {
            for text in [reason.sentence(), reason.remedy()] {
                assert!(text.ends_with('.') && !text.contains('|') && !text.contains('\n'), "{text}");
                assert_eq!(text.matches('`').count() % 2, 0, "{text}");
            }
        }
    }
}
