//! Every check, with the number that never changes.

/// A check.
#[derive(Debug, PartialEq, Eq)]
pub struct Check {
    /// Its number: never given to another check, so that it can be searched for.
    pub id: &'static str,
    /// The heading below which it stands.
    pub category: &'static str,
    /// What holds if all is well.
    pub title: &'static str,
}

/// Declares the checks, and the list of them.
macro_rules! checks {
    ($($name:ident $id:literal $category:literal $title:literal;)+) => {
        $(
            #[doc = concat!($id, ": ", $title, ".")]
            pub const $name: Check = Check { id: $id, category: $category, title: $title };
        )+

        /// Every check, in the order in which they are reported.
        pub const ALL: &[&Check] = &[$(&$name),+];
    };
}

checks! {
    SERVER "T0101" "cluster" "the Kubernetes version is supported";
    KUBELETS "T0102" "cluster" "every node can run native sidecars";
    PERMISSIONS "T0103" "cluster" "you may install Tulle";
    POD_SECURITY "T0104" "cluster" "labelled namespaces admit the init container";
    DEFINITIONS "T0201" "definitions" "the CustomResourceDefinitions are installed";
    VERSIONS "T0202" "definitions" "the CustomResourceDefinitions serve v1alpha1";
    MANAGER "T0203" "definitions" "one tool manages the CustomResourceDefinitions";
    OBJECTS "T0204" "definitions" "every object of the installation exists";
    SCHEMAS "T0205" "definitions" "the CustomResourceDefinitions have the schemas of their version";
    DEPLOYMENT "T0301" "operator" "operator and webhook are available";
    REPLICAS "T0302" "operator" "one replica may fail";
    LEADER "T0303" "operator" "a replica leads";
    QUERY "T0304" "operator" "the operator answers";
    SKEW "T0305" "operator" "this program has the operator's version";
    SERIES "T0306" "operator" "the operator has room for all series";
    ROOT "T0401" "certificates" "the root certificate is valid for long enough, and the MeshConfig is in use";
    HOOKS "T0501" "webhook" "the webhook configurations are installed";
    BUNDLE "T0502" "webhook" "the API server can verify the webhook";
    FAILURE "T0503" "webhook" "the failure policies are those of Tulle";
    ENDPOINTS "T0504" "webhook" "the Services have endpoints";
    NAMESPACES "T0601" "namespaces" "labelled namespaces are known";
    INJECTED "T0602" "namespaces" "every pod of labelled namespaces has a sidecar";
    SIDECAR_SKEW "T0701" "sidecars" "every sidecar has a supported version";
    REFUSED "T0702" "sidecars" "no sidecar has refused its configuration";
    BEHIND "T0703" "sidecars" "every sidecar has the present configuration";
    CERTIFICATE "T0704" "sidecars" "every sidecar has a valid certificate";
    POLICIES "T0801" "policies" "every MeshPolicy is enforced";
    CANARIES "T0901" "canaries" "every Canary is valid, and none is stuck or has failed";
    DEADLINES "T0902" "canaries" "no rollout has passed its deadline undecided";
    OWNERS "T0903" "canaries" "no other tool undoes a rollout";
    STRATEGY "T0904" "canaries" "every target keeps stable pods while a new version is judged";
    ROUTES "T0920" "routes" "every route is accepted";
    CILIUM "T0930" "network" "the network plugin leaves Services' addresses to the sidecar";
}
