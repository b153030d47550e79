//! The seal: an annotation in which injection signs the sidecar, so that a later call can verify it.
//!
//! The API server calls the webhook again when another webhook has changed the pod. This call may reach a replica of
//! another version, or find an image that was pinned to its digest in between. A comparison with what *this* build
//! injects would reject both. Therefore the injecting replica signs what it has injected, with a key that the replicas
//! share, and any replica can verify it. The signature covers what determines where traffic goes: image, arguments,
//! user, the variables that the sidecar reads, token and trust bundle. It does not cover resources, probes, additional
//! mounts and the places of the containers among others.

use std::fmt::Write as _;

use aws_lc_rs::hmac;
use serde_json::{Value, json};

use super::{INIT, Mode, PROXY, containers, containers_at, name_of};

/// Version of the seal's format; seals of other versions are not accepted.
const VERSION: &str = "v1";

/// The signing key that the replicas share.
#[derive(Clone, Debug)]
pub struct SealKey(hmac::Key);

impl SealKey {
    /// Derives the key from a secret that every replica has.
    pub fn derive(secret: &[u8]) -> Self {
        let root = hmac::Key::new(hmac::HMAC_SHA256, secret);
        let derived = hmac::sign(&root, b"tulle injection seal v1");
        Self(hmac::Key::new(hmac::HMAC_SHA256, derived.as_ref()))
    }

    /// The seal of an injected pod: `v1 IMAGE SIGNATURE`.
    pub(super) fn seal(&self, pod: &Value, namespace: &str, mode: Mode, image: &str) -> String {
        let signature = hmac::sign(&self.0, content(pod, namespace, mode, image).as_bytes());
        let mut hex = String::new();
        for byte in signature.as_ref() {
            let _ = write!(hex, "{byte:02x}");
        }
        format!("{VERSION} {image} {hex}")
    }

    /// Whether a seal is valid for a pod.
    pub(super) fn verify(&self, seal: &str, pod: &Value, namespace: &str, mode: Mode) -> bool {
        let parts: Vec<&str> = seal.split(' ').collect();
        let [VERSION, image, signature] = parts[..] else { return false };
        let bytes: Option<Vec<u8>> = (0..signature.len() / 2)
            .map(|at| u8::from_str_radix(signature.get(2 * at..2 * at + 2)?, 16).ok())
            .collect();
        let signed = content(pod, namespace, mode, image);
        let genuine = bytes.is_some_and(|bytes| hmac::verify(&self.0, signed.as_bytes(), &bytes).is_ok());
        let images = injected_containers(pod).all(|container| {
            container.get("image").and_then(Value::as_str).is_some_and(|found| is_same_image(found, image))
        });
        genuine && images
    }
}

/// Whether an image is the injected one, or the injected one pinned to a digest by another webhook. If the injected one
/// is named by digest itself, no other digest is the same: a repository also has images of earlier versions.
pub(super) fn is_same_image(found: &str, injected: &str) -> bool {
    let pinned = || {
        let (name, digest) = found.split_once('@')?;
        let hex = digest.strip_prefix("sha256:")?;
        let (injected, installed) = injected.split_once('@').unwrap_or((injected, digest));
        let digest_is_whole =
            installed == digest && hex.len() == 64 && hex.chars().all(|c| c.is_ascii_hexdigit());
        // Webhooks that pin images keep or drop the tag.
        let repository =
            injected.rsplit_once(':').filter(|(_, tag)| !tag.contains('/')).map_or(injected, |(r, _)| r);
        Some(digest_is_whole && (name == injected || name == repository))
    };
    found == injected || pinned().unwrap_or(false)
}

/// Tulle's containers, in the order of injection, wherever other webhooks have put them.
fn injected_containers(pod: &Value) -> impl Iterator<Item = &Value> {
    [INIT, PROXY].into_iter().flat_map(move |name| {
        containers_at(pod, "/spec/initContainers").filter(move |container| name_of(container) == name)
    })
}

/// The signed text. It does not contain fields to which the API server adds defaults.
fn content(pod: &Value, namespace: &str, mode: Mode, image: &str) -> String {
    let containers: Vec<Value> = injected_containers(pod)
        .map(|container| {
            let at = |path: &str| container.pointer(path).cloned().unwrap_or_default();
            json!([
                at("/name"),
                at("/args"),
                at("/command"),
                at("/envFrom"),
                at("/restartPolicy"),
                at("/securityContext/runAsUser"),
                containers::variables(container),
                containers::mounts(container),
            ])
        })
        .collect();
    let volumes: Vec<Value> = containers::volumes()
        .iter()
        .map(|wanted| {
            let found = containers_at(pod, "/spec/volumes").find(|volume| name_of(volume) == name_of(wanted));
            json!([name_of(wanted), found.map(containers::volume_source)])
        })
        .collect();
    json!([VERSION, namespace, format!("{mode:?}"), image, containers, volumes]).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pinned_image_is_the_same_and_a_foreign_one_is_not() {
        let digest = "0".repeat(64);
        let injected = "registry.example:5000/tulle/sidecar:1.2";
        for same in [
            injected.to_owned(),
            format!("{injected}@sha256:{digest}"),
            format!("registry.example:5000/tulle/sidecar@sha256:{digest}"),
        ] {
            assert!(is_same_image(&same, injected), "{same}");
        }
        for other in [
            "registry.example:5000/tulle/sidecar:1.3".to_owned(),
            format!("mirror.example/tulle/sidecar@sha256:{digest}"),
            format!("registry.example@sha256:{digest}"),
            "registry.example:5000/tulle/sidecar@sha256:1".to_owned(),
        ] {
            assert!(!is_same_image(&other, injected), "{other}");
        }
    }

    #[test]
    fn a_sidecar_installed_by_digest_is_not_accepted_with_another_digest_of_its_repository() {
        let (ours, other) = ("0".repeat(64), "1".repeat(64));
        for injected in [
            format!("registry.example:5000/tulle/sidecar@sha256:{ours}"),
            format!("registry.example:5000/tulle/sidecar:1.2@sha256:{ours}"),
        ] {
            assert!(is_same_image(&injected, &injected));
            assert!(is_same_image(&format!("registry.example:5000/tulle/sidecar@sha256:{ours}"), &injected));
            assert!(!is_same_image(&injected.replace(&ours, &other), &injected), "{injected}");
            let (name, _) = injected.split_once('@').unwrap();
            assert!(!is_same_image(name, &injected), "{name} in place of {injected}");
        }
    }
}
