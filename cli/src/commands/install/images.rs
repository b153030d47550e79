//! Registry and tag of the images: as given, as the live Deployments have them, or those of a development build. Pure.

use serde_json::Value;

use crate::exit::CliError;
use crate::objects::{items, text};

/// The registry of images that were built on the same machine and that no cluster can pull.
const DEVELOPMENT: &str = "tulle.local/";

/// Where the webhook's Deployment names the image of the sidecar.
const SIDECAR: &str = "/spec/template/metadata/annotations/tulle.dev~1sidecar-image";

/// Where the images of an installation come from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Images {
    /// With the folder. `None`: a development build.
    pub registry: Option<String>,
    pub tag: Option<String>,
}

impl Images {
    /// Reads the name of an image of this part: `REGISTRY/tulle-PART:TAG`, or `tulle.local/PART:TAG`.
    fn of(image: &str, part: &str) -> Option<Self> {
        let (name, tag) = image.rsplit_once(':').filter(|(_, tag)| !tag.contains('/'))?;
        if name.contains('@') {
            return None;
        }
        if name.strip_prefix(DEVELOPMENT) == Some(part) {
            return Some(Self { registry: None, tag: Some(tag.to_owned()).filter(|tag| tag != "dev") });
        }
        let registry = name.strip_suffix(part)?.strip_suffix("/tulle-")?;
        Some(Self { registry: Some(registry.to_owned()), tag: Some(tag.to_owned()) })
    }

    /// What the options say, and for the rest what is installed. A tag that is a version is not kept: the images are to be
    /// those of this program.
    pub fn choose(given: &Self, live: Option<&Self>) -> Self {
        let Some(live) = live.filter(|_| given.registry.is_none()) else { return given.clone() };
        let kept = live.tag.clone().filter(|tag| !is_version(tag) || live.registry.is_none());
        Self { registry: live.registry.clone(), tag: given.tag.clone().or(kept) }
    }

    /// Those of the Deployments that are installed. `None`: there is none.
    ///
    /// # Errors
    /// Their names are not those that this program writes, or differ.
    pub fn live(operator: Option<&Value>, webhook: Option<&Value>) -> Result<Option<Self>, CliError> {
        let mut found: Option<Self> = None;
        let installed = [
            ("operator", operator.map(image)),
            ("webhook", webhook.map(image)),
            ("sidecar", webhook.map(|webhook| text(webhook, SIDECAR)).filter(|image| !image.is_empty())),
        ];
        for (part, image) in installed {
            let Some(image) = image else { continue };
            let unknown = |why: &str| {
                let what = format!("the image of the {part} is {image}, {why}");
                Err(CliError::failed(what).hint("name the images with --registry and --tag"))
            };
            match Self::of(image, part) {
                None => return unknown("whose registry and tag this program cannot tell"),
                Some(images) if found.as_ref().is_some_and(|other| *other != images) => {
                    return unknown("which has another registry or tag than the others");
                }
                Some(images) => found = Some(images),
            }
        }
        Ok(found)
    }
}

/// The image of a Deployment's first container.
fn image(deployment: &Value) -> &str {
    let containers = items(deployment, "/spec/template/spec/containers");
    containers.first().map_or("", |container| text(container, "/image"))
}

/// Whether a tag is a version such as `0.3.1`, `v0.3.1` or `0.4.0-rc.1`.
fn is_version(tag: &str) -> bool {
    let mut parts = tag.trim_start_matches('v').splitn(3, '.');
    let mut is_number = || {
        let part = parts.next().unwrap_or_default();
        part.chars().next().is_some_and(|digit| digit.is_ascii_digit())
    };
    is_number() && is_number() && is_number()
}

/// Images of these objects that no cluster can pull.
pub fn development(objects: &[Value]) -> Vec<String> {
    let images = objects.iter().map(image).filter(|image| image.starts_with(DEVELOPMENT));
    images.map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn images(registry: Option<&str>, tag: Option<&str>) -> Images {
        Images { registry: registry.map(str::to_owned), tag: tag.map(str::to_owned) }
    }

    fn deployment(image: &str) -> Value {
        json!({"spec": {"template": {"spec": {"containers": [{"image": image}]}}}})
    }

    #[test]
    fn registry_and_tag_are_read_from_the_images_that_this_program_writes() {
        let read = |image: &str| Images::of(image, "operator");
        assert_eq!(
            read("r.example:5000/team/tulle-operator:0.3.1"),
            Some(images(Some("r.example:5000/team"), Some("0.3.1")))
        );
        assert_eq!(read("tulle.local/operator:dev"), Some(images(None, None)));
        assert_eq!(read("tulle.local/operator:2"), Some(images(None, Some("2"))));
        for other in
            ["r.example/mesh-operator:1", "r.example:5000/tulle-operator", "r/tulle-operator@sha256:ab", ""]
        {
            assert_eq!(read(other), None, "{other}");
        }
    }

    #[test]
    fn an_upgrade_stays_with_the_registry_and_takes_the_version_of_this_program() {
        let live = images(Some("r.example"), Some("0.3.1"));
        assert_eq!(Images::choose(&Images::default(), Some(&live)), images(Some("r.example"), None));
        let moving = images(Some("r.example"), Some("nightly"));
        assert_eq!(Images::choose(&Images::default(), Some(&moving)), moving);
        let given = images(None, Some("0.4.0"));
        assert_eq!(Images::choose(&given, Some(&live)), images(Some("r.example"), Some("0.4.0")));
        let elsewhere = images(Some("other.example"), None);
        assert_eq!(Images::choose(&elsewhere, Some(&live)), elsewhere);
        assert_eq!(Images::choose(&Images::default(), None), Images::default());
    }

    #[test]
    fn images_that_differ_or_that_somebody_has_renamed_must_be_named() {
        let (one, other) = (deployment("r/tulle-operator:1"), deployment("s/tulle-webhook:1"));
        let same = deployment("r/tulle-webhook:1");
        assert_eq!(Images::live(Some(&one), Some(&same)), Ok(Some(images(Some("r"), Some("1")))));
        assert_eq!(Images::live(None, None), Ok(None));
        let error = Images::live(Some(&one), Some(&other)).unwrap_err();
        assert!(error.to_string().contains("s/tulle-webhook:1"), "{error}");
        let mut sidecar = same.clone();
        sidecar["spec"]["template"]["metadata"] =
            json!({"annotations": {"tulle.dev/sidecar-image": "s/tulle-sidecar:1"}});
        let error = Images::live(Some(&one), Some(&sidecar)).unwrap_err();
        assert!(error.to_string().starts_with("the image of the sidecar is s/tulle-sidecar:1"), "{error}");
        let renamed = deployment("mirror/operator:1");
        assert!(Images::live(Some(&renamed), None).is_err());
    }

    #[test]
    fn images_of_a_development_build_are_found() {
        let objects = crate::manifests::objects(&crate::manifests::Settings::default()).unwrap();
        assert_eq!(development(&objects), ["tulle.local/operator:dev", "tulle.local/webhook:dev"]);
        let registry = Some("r.example".to_owned());
        let settings = crate::manifests::Settings { registry, ..crate::manifests::Settings::default() };
        assert_eq!(development(&crate::manifests::objects(&settings).unwrap()), Vec::<String>::new());
    }
}
