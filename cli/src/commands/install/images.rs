//! Registry and tag or digest of the images: as given, as the live Deployments have them, or those of a development build.
//! Pure, except for [`Digests::read`].

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Value, json};

use crate::exit::CliError;
use crate::objects::{items, text};

/// The registry of images that were built on the same machine and that no cluster can pull.
const DEVELOPMENT: &str = "tulle.local/";

/// Where the webhook's Deployment names the image of the sidecar.
const SIDECAR: &str = "/spec/template/metadata/annotations/tulle.dev~1sidecar-image";

/// Where a Deployment names its own image.
const OWN: &str = "/spec/template/spec/containers/0/image";

/// The parts of Tulle that have images.
const PARTS: [&str; 3] = ["operator", "webhook", "sidecar"];

/// Where the images of an installation come from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Images {
    /// With the folder. `None`: a development build.
    pub registry: Option<String>,
    pub tag: Option<String>,
    /// Whether digests name them: those of `--digests`, or those that are installed.
    pub by_digest: bool,
}

impl Images {
    /// Reads the name of an image of this part: `REGISTRY/tulle-PART:TAG`, the same with a digest after the tag or in its
    /// place, or `tulle.local/PART:TAG`.
    fn of(image: &str, part: &str) -> Option<Self> {
        let registry = |name: &str| Some(name.strip_suffix(part)?.strip_suffix("/tulle-")?.to_owned());
        if let Some((name, _)) = image.split_once('@') {
            // A container runtime ignores a tag in front of a digest.
            let name = tagged(name).map_or(name, |(name, _)| name);
            return Some(Self { registry: Some(registry(name)?), tag: None, by_digest: true });
        }
        let (name, tag) = tagged(image)?;
        if name.strip_prefix(DEVELOPMENT) == Some(part) {
            let tag = Some(tag.to_owned()).filter(|tag| tag != "dev");
            return Some(Self { registry: None, tag, by_digest: false });
        }
        Some(Self { registry: Some(registry(name)?), tag: Some(tag.to_owned()), by_digest: false })
    }

    /// What the options say, and for the rest what is installed. A tag that is a version is not kept: the images are to be
    /// those of this program.
    pub fn choose(given: &Self, live: Option<&Self>) -> Self {
        let Some(live) = live.filter(|_| given.registry.is_none()) else { return given.clone() };
        let kept = live.tag.clone().filter(|tag| !is_version(tag) || live.registry.is_none());
        let tag = given.tag.clone().or(kept);
        Self { registry: live.registry.clone(), tag, by_digest: given.by_digest }
    }

    /// Refuses to put a tag in the place of installed digests, also in another registry, unless the options name it.
    ///
    /// # Errors
    /// Digests are installed, and the options name neither those of this version nor a tag. This program does not know
    /// them, and a tag can be moved to another image.
    pub fn keep_digests(&self, operator: Option<&Value>, webhook: Option<&Value>) -> Result<(), CliError> {
        let is_asked_for = self.by_digest || self.tag.is_some();
        match installed(operator, webhook).find(|(_, image)| image.contains('@')) {
            Some((part, image)) if !is_asked_for => {
                let what = format!(
                    "the image of the {part} is {image}, and that of this version has another digest"
                );
                Err(CliError::failed(what)
                    .hint("name the digests of this version with --digests FILE, or its tag with --tag TAG"))
            }
            _ => Ok(()),
        }
    }

    /// Those of the Deployments that are installed. `None`: there is none.
    ///
    /// # Errors
    /// Their names are not those that this program writes, or differ.
    pub fn live(operator: Option<&Value>, webhook: Option<&Value>) -> Result<Option<Self>, CliError> {
        let mut found: Option<Self> = None;
        for (part, image) in installed(operator, webhook) {
            let unknown = |why: &str| {
                let what = format!("the image of the {part} is {image}, {why}");
                Err(CliError::failed(what).hint("name the images with --registry, and --tag or --digests"))
            };
            match Self::of(image, part) {
                None => return unknown("whose registry and tag this program cannot tell"),
                Some(images) if found.as_ref().is_some_and(|other| *other != images) => {
                    return unknown(
                        "which has another registry or tag than the others, or a digest where they have none",
                    );
                }
                Some(images) => found = Some(images),
            }
        }
        Ok(found)
    }
}

/// Part and image of each image that is installed.
fn installed<'a>(
    operator: Option<&'a Value>,
    webhook: Option<&'a Value>,
) -> impl Iterator<Item = (&'static str, &'a str)> {
    let sidecar = webhook.map(|webhook| text(webhook, SIDECAR)).filter(|image| !image.is_empty());
    let images = [("operator", operator.map(image)), ("webhook", webhook.map(image)), ("sidecar", sidecar)];
    images.into_iter().filter_map(|(part, image)| Some((part, image?)))
}

/// Name and tag of an image. `None`: it has no tag, though its registry may have a port.
fn tagged(image: &str) -> Option<(&str, &str)> {
    image.rsplit_once(':').filter(|(_, tag)| !tag.contains('/'))
}

/// Reads a registry as names of images begin: `HOST[:PORT][/FOLDER]`. For clap's `value_parser`.
///
/// # Errors
/// A name of an image cannot begin with the text, for example because it is a URL.
pub fn registry(text: &str) -> Result<String, String> {
    let other = |allowed: &'static str| {
        move |byte: u8| !byte.is_ascii_alphanumeric() && !allowed.as_bytes().contains(&byte)
    };
    let (host, folders) = match text.trim_end_matches('/').split_once('/') {
        Some((host, folders)) => (host, Some(folders)),
        None => (text.trim_end_matches('/'), None),
    };
    let is_host = !host.is_empty() && !host.ends_with(':') && !host.bytes().any(other("._-:[]"));
    let is_folder = |folder: &str| {
        !folder.is_empty()
            && !folder.bytes().any(other("._-"))
            && !folder.bytes().any(|byte| byte.is_ascii_uppercase())
    };
    if is_host && folders.is_none_or(|folders| folders.split('/').all(is_folder)) {
        return Ok(text.to_owned());
    }
    Err("write HOST[:PORT][/FOLDER] in lower case and without https://".to_owned())
}

/// Reads a tag. For clap's `value_parser`.
///
/// # Errors
/// The text is not a tag, for example because it has a digest.
pub fn tag(text: &str) -> Result<String, String> {
    let is_word = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    let is_tag = text.bytes().next().is_some_and(is_word)
        && text.len() <= 128
        && text.bytes().all(|byte| is_word(byte) || byte == b'.' || byte == b'-');
    if is_tag {
        return Ok(text.to_owned());
    }
    Err("a tag has letters, digits, `_`, `.` and `-`; digests are named with --digests".to_owned())
}

/// The digest of each part's image, for all architectures.
#[derive(Debug, PartialEq, Eq)]
pub struct Digests(BTreeMap<String, String>);

impl Digests {
    /// Reads a file of `cargo xtask images`.
    ///
    /// # Errors
    /// It cannot be read, has a line that is not `PART@sha256:DIGEST`, or lacks a part.
    pub fn read(file: &Path) -> Result<Self, CliError> {
        let text = std::fs::read_to_string(file);
        let text = text.map_err(|error| format!("cannot read {}: {error}", file.display()));
        let digests = text.and_then(|text| {
            Self::parse(&text).map_err(|why| format!("{} has no digests: {why}", file.display()))
        });
        digests.map_err(CliError::failed)
    }

    fn parse(text: &str) -> Result<Self, String> {
        let mut digests = BTreeMap::new();
        for line in text.lines().map(str::trim).filter(|line| !line.is_empty()) {
            let read =
                line.split_once('@').filter(|(part, digest)| PARTS.contains(part) && is_digest(digest));
            let Some((part, digest)) = read else {
                return Err(format!(
                    "invalid line {line:?}; write PART@sha256:DIGEST for each of {}",
                    PARTS.join(", ")
                ));
            };
            if digests.insert(part.to_owned(), digest.to_owned()).is_some() {
                return Err(format!("two lines for {part}"));
            }
        }
        match PARTS.iter().find(|part| !digests.contains_key(**part)) {
            Some(part) => Err(format!("no line for {part}")),
            None => Ok(Self(digests)),
        }
    }

    /// Names the images of these objects by digest in place of their tags.
    ///
    /// # Errors
    /// They are those of a development build, which no registry has.
    pub fn pin(&self, objects: &mut [Value]) -> Result<(), CliError> {
        for object in objects {
            for pointer in [OWN, SIDECAR] {
                let Some(value) = object.pointer_mut(pointer) else { continue };
                let image = value.as_str().unwrap_or_default();
                let pinned = self.pinned(image).ok_or_else(|| {
                    CliError::failed(format!(
                        "{image} is not an image in a registry, so that it has no digest"
                    ))
                    .hint("name the registry of the images with --registry REGISTRY")
                })?;
                *value = json!(pinned);
            }
        }
        Ok(())
    }

    fn pinned(&self, image: &str) -> Option<String> {
        let (name, _) = tagged(image)?;
        let (_, part) = name.rsplit_once("/tulle-")?;
        Some(format!("{name}@{}", self.0.get(part)?))
    }
}

/// Whether a text is `sha256:` and 64 hexadecimal digits.
fn is_digest(text: &str) -> bool {
    let is_hex = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
    text.strip_prefix("sha256:").is_some_and(|hex| hex.len() == 64 && hex.bytes().all(is_hex))
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
        Images { registry: registry.map(str::to_owned), tag: tag.map(str::to_owned), by_digest: false }
    }

    fn by_digest(registry: Option<&str>) -> Images {
        Images { by_digest: true, ..images(registry, None) }
    }

    /// A digest of one digit.
    fn digest(digit: &str) -> String {
        format!("sha256:{}", digit.repeat(64))
    }

    /// The file of digests that `cargo xtask images` writes.
    fn file() -> String {
        format!("operator@{}\nwebhook@{}\nsidecar@{}\n", digest("1"), digest("2"), digest("3"))
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
        assert_eq!(read("r.example:5000/tulle-operator@sha256:ab"), Some(by_digest(Some("r.example:5000"))));
        let both = "r.example:5000/tulle-operator:0.3.1@sha256:ab";
        assert_eq!(read(both), Some(by_digest(Some("r.example:5000"))), "as kustomize and Renovate write it");
        for other in ["r.example/mesh-operator:1", "r.example:5000/tulle-operator", "operator@sha256:ab", ""]
        {
            assert_eq!(read(other), None, "{other}");
        }
    }

    #[test]
    fn an_upgrade_stays_with_the_registry_and_takes_the_version_of_this_program() {
        let live = images(Some("r.example"), Some("0.3.1"));
        let choose = |given: &Images, live: &Images| Images::choose(given, Some(live));
        assert_eq!(choose(&Images::default(), &live), images(Some("r.example"), None));
        let moving = images(Some("r.example"), Some("nightly"));
        assert_eq!(choose(&Images::default(), &moving), moving);
        let given = images(None, Some("0.4.0"));
        assert_eq!(choose(&given, &live), images(Some("r.example"), Some("0.4.0")));
        let elsewhere = images(Some("other.example"), None);
        assert_eq!(choose(&elsewhere, &live), elsewhere);
        assert_eq!(Images::choose(&Images::default(), None), Images::default());
    }

    #[test]
    fn an_upgrade_does_not_put_a_tag_in_the_place_of_digests_unasked() {
        let (one, other) = (deployment("r/tulle-operator@sha256:1"), deployment("r/tulle-webhook:1"));
        // The registry may be named in each call, be it the same or a mirror.
        for unasked in [Images::default(), images(Some("r"), None), images(Some("other.example"), None)] {
            let error = unasked.keep_digests(Some(&one), Some(&other)).unwrap_err();
            let expected = "the image of the operator is r/tulle-operator@sha256:1, and that of this version";
            assert!(error.to_string().starts_with(expected), "{error}");
            assert_eq!(unasked.keep_digests(Some(&other), None), Ok(()), "installed by tag");
            assert_eq!(unasked.keep_digests(None, None), Ok(()), "not installed");
        }
        for asked in [by_digest(None), by_digest(Some("r")), images(None, Some("0.4.0"))] {
            assert_eq!(asked.keep_digests(Some(&one), Some(&other)), Ok(()));
        }
        let live = by_digest(Some("r.example"));
        assert_eq!(Images::choose(&by_digest(None), Some(&live)), live);
        let tag = images(None, Some("0.4.0"));
        assert_eq!(Images::choose(&tag, Some(&live)), images(Some("r.example"), Some("0.4.0")));
    }

    #[test]
    fn a_registry_or_tag_that_no_name_of_an_image_can_have_is_refused() {
        for fine in
            ["r.example:5000/team/", "localhost:5000", "[fd00::1]:5000/a/b", "r.example/my_team", "team"]
        {
            assert_eq!(registry(fine), Ok(fine.to_owned()));
        }
        for wrong in
            ["https://r.example", "r.example//team", "r.example/Team", "r.example/a@b", "", "/", "r:", "a b"]
        {
            let error = registry(wrong).expect_err(wrong);
            assert!(error.contains("without https://"), "{error}");
        }
        assert_eq!(tag("0.1.0-rc.1"), Ok("0.1.0-rc.1".to_owned()));
        for wrong in ["", "-1", "1+2", "a/b", &format!("0.1.0@{}", digest("1")), &"a".repeat(129)] {
            assert!(tag(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn digests_take_the_place_of_the_tags_of_all_three_images() {
        let registry = Some("r.example:5000/team".to_owned());
        let settings = crate::manifests::Settings { registry, ..crate::manifests::Settings::default() };
        let mut objects = crate::manifests::objects(&settings).unwrap();
        Digests::parse(&file()).unwrap().pin(&mut objects).unwrap();
        let text = json!(objects).to_string();
        for (part, digit) in [("operator", "1"), ("webhook", "2"), ("sidecar", "3")] {
            let image = format!("\"r.example:5000/team/tulle-{part}@{}\"", digest(digit));
            assert_eq!(text.matches(&image).count(), 1, "{image}");
            assert!(!text.contains(&format!("team/tulle-{part}:")), "{part}");
        }
        let mut objects = crate::manifests::objects(&crate::manifests::Settings::default()).unwrap();
        let error = Digests::parse(&file()).unwrap().pin(&mut objects).unwrap_err();
        assert!(error.to_string().starts_with("tulle.local/operator:dev is not an image"), "{error}");
    }

    #[test]
    fn a_file_without_the_digest_of_every_part_is_refused_with_the_line() {
        assert!(Digests::parse(&file().replace('\n', "\r\n\n")).is_ok());
        let refused = |text: String| Digests::parse(&text).unwrap_err();
        assert_eq!(refused(file().replace("sidecar@", "webhook@")), "two lines for webhook");
        let two = file().lines().take(2).collect::<Vec<_>>().join("\n");
        assert_eq!(refused(two), "no line for sidecar");
        assert!(refused(file().replace("webhook@", "proxy@")).starts_with("invalid line \"proxy@sha256:2"));
        for digest in ["sha256:ab", "sha512:ab", &digest("A"), &digest("1")[..70]] {
            let error = refused(format!("operator@{digest}\n"));
            assert!(error.starts_with(&format!("invalid line \"operator@{digest}\"")), "{error}");
        }
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
        let (one, other) = (deployment("r/tulle-operator@sha256:1"), deployment("r/tulle-webhook@sha256:2"));
        assert_eq!(Images::live(Some(&one), Some(&other)), Ok(Some(by_digest(Some("r")))));
        assert!(Images::live(Some(&one), Some(&same)).is_err(), "one by digest, the other by tag");
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
