//! Which namespace Tulle is in, as its own objects say. Pure.

use serde_json::Value;

use crate::exit::CliError;
use crate::objects::{items, text};

/// An object that names the namespace of Tulle.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Witness {
    /// `Kind/name`.
    pub object: String,
    /// The namespace that it names.
    pub namespace: String,
}

impl Witness {
    /// The Service that a webhook configuration calls.
    pub fn of_webhooks(configuration: &Value) -> Vec<Self> {
        let called = items(configuration, "/webhooks").iter();
        Self::distinct(configuration, called.map(|hook| text(hook, "/clientConfig/service/namespace")))
    }

    /// The service accounts of a binding.
    pub fn of_subjects(binding: &Value) -> Vec<Self> {
        let subjects = items(binding, "/subjects").iter();
        Self::distinct(binding, subjects.map(|subject| text(subject, "/namespace")))
    }

    fn distinct<'a>(object: &Value, namespaces: impl Iterator<Item = &'a str>) -> Vec<Self> {
        let title = format!("{}/{}", text(object, "/kind"), text(object, "/metadata/name"));
        let mut namespaces: Vec<&str> = namespaces.filter(|namespace| !namespace.is_empty()).collect();
        namespaces.sort_unstable();
        namespaces.dedup();
        let one = |namespace: &str| Self { object: title.clone(), namespace: namespace.to_owned() };
        namespaces.into_iter().map(one).collect()
    }
}

/// The namespace on which all agree. `None`: nothing names one, so nothing of Tulle was found.
///
/// # Errors
/// They disagree with each other, or with the namespace that the user has named.
pub fn agreed(witnesses: &[Witness], given: Option<&str>, force: bool) -> Result<Option<String>, CliError> {
    let said = || {
        let lines = witnesses.iter().map(|witness| format!("\n  {}: {}", witness.object, witness.namespace));
        lines.collect::<String>()
    };
    let Some(first) = witnesses.first() else { return Ok(given.map(str::to_owned)) };
    let agree = witnesses.iter().all(|witness| witness.namespace == first.namespace);
    match given {
        Some(given) if force || (agree && given == first.namespace) => Ok(Some(given.to_owned())),
        Some(given) if agree => {
            let what = format!("Tulle is in namespace {}, not in {given}:{}", first.namespace, said());
            Err(CliError::failed(what).hint(format!("write --system-namespace {}", first.namespace)))
        }
        None if agree => Ok(Some(first.namespace.clone())),
        _ => Err(CliError::failed(format!("objects of Tulle name several namespaces:{}", said())).hint(
            "find out which are left from an older installation; --system-namespace NAMESPACE --force chooses one",
        )),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn witness(object: &str, namespace: &str) -> Witness {
        Witness { object: object.to_owned(), namespace: namespace.to_owned() }
    }

    #[test]
    fn the_binding_still_names_the_namespace_when_the_webhook_configurations_are_gone() {
        let binding = json!({"kind": "ClusterRoleBinding", "metadata": {"name": "tulle-operator"},
            "subjects": [{"kind": "ServiceAccount", "name": "tulle-operator", "namespace": "mesh"}]});
        let found = Witness::of_subjects(&binding);
        assert_eq!(found, [witness("ClusterRoleBinding/tulle-operator", "mesh")]);
        assert_eq!(agreed(&found, None, false), Ok(Some("mesh".to_owned())));
    }

    #[test]
    fn a_configuration_names_each_namespace_that_it_calls_once() {
        let call = |namespace: &str| json!({"clientConfig": {"service": {"namespace": namespace}}});
        let configuration = json!({"kind": "MutatingWebhookConfiguration", "metadata": {"name": "tulle"},
            "webhooks": [call("mesh"), call("mesh"), {"clientConfig": {"url": "https://example.com"}}]});
        assert_eq!(
            Witness::of_webhooks(&configuration),
            [witness("MutatingWebhookConfiguration/tulle", "mesh")]
        );
    }

    #[test]
    fn objects_that_disagree_are_listed_and_nothing_is_removed() {
        let both = [witness("A/tulle", "mesh"), witness("B/tulle", "tulle-system")];
        let error = agreed(&both, None, false).unwrap_err();
        assert_eq!(
            error.to_string(),
            "objects of Tulle name several namespaces:\n  A/tulle: mesh\n  B/tulle: tulle-system"
        );
        assert!(agreed(&both, Some("mesh"), false).is_err());
        assert_eq!(agreed(&both, Some("mesh"), true), Ok(Some("mesh".to_owned())));
    }

    #[test]
    fn a_namespace_that_the_user_names_must_be_the_one_that_the_objects_name() {
        let one = [witness("A/tulle", "mesh")];
        assert_eq!(agreed(&one, Some("mesh"), false), Ok(Some("mesh".to_owned())));
        let error = agreed(&one, Some("tulle-system"), false).unwrap_err();
        assert!(error.to_string().starts_with("Tulle is in namespace mesh, not in tulle-system"), "{error}");
        assert_eq!(agreed(&[], None, false), Ok(None));
        assert_eq!(agreed(&[], Some("mesh"), false), Ok(Some("mesh".to_owned())));
    }
}
