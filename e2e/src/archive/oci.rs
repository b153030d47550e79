//! Archives of OCI image layouts, each with one image for all its architectures.
//!
//! In: the program of each architecture. Out: a tar file that skopeo, podman and containerd read: an image index, and
//! below it a manifest, a configuration and a layer per architecture, all named by digest. The layers are not compressed,
//! so that the digests depend on the programs alone and not on the version of a compressor.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::Result;
use serde_json::{Value, json};

use super::{Content, FILE, config, end, entry, hex, layer, process};
use crate::host;

const INDEX: &str = "application/vnd.oci.image.index.v1+json";
const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const LAYER: &str = "application/vnd.oci.image.layer.v1.tar";

/// A reference to a blob.
struct Descriptor {
    media_type: &'static str,
    /// With the algorithm, as in `sha256:…`.
    digest: String,
    size: usize,
}

impl Descriptor {
    fn json(&self) -> Value {
        json!({"mediaType": self.media_type, "digest": self.digest, "size": self.size})
    }
}

/// The blobs of a layout by the hexadecimal part of their digest, and so in an order that depends on their content only.
#[derive(Default)]
struct Blobs(BTreeMap<String, Vec<u8>>);

impl Blobs {
    fn add(&mut self, media_type: &'static str, content: Vec<u8>) -> Descriptor {
        let (hex, size) = (hex(&content), content.len());
        let digest = format!("sha256:{hex}");
        self.0.insert(hex, content);
        Descriptor { media_type, digest, size }
    }
}

/// Writes the archive of an image named `name`, `REPOSITORY:TAG`, with these architectures. Returns the digest of its
/// image index, which does not depend on the name: a registry that gets the layout unchanged serves it under this digest.
///
/// # Errors
/// A program cannot be read, or the archive cannot be written.
pub fn write(name: &str, contents: &[Content<'_>], archive: &Path) -> Result<String> {
    let mut blobs = Blobs::default();
    let mut manifests = Vec::new();
    for content in contents {
        let mut manifest = image(&mut blobs, *content)?.json();
        manifest["platform"] = json!({"architecture": content.architecture, "os": "linux"});
        manifests.push(manifest);
    }
    let index = json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": manifests}).to_string();
    let index = blobs.add(INDEX, index.into_bytes());
    // Annotations of the entry point, which is not pushed: skopeo chooses by the first, containerd names by the second.
    let tag = name.rsplit_once(':').map_or(name, |(_, tag)| tag);
    let mut only = index.json();
    only["annotations"] = json!({"org.opencontainers.image.ref.name": tag, "io.containerd.image.name": name});
    let entry_point = json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": [only]}).to_string();
    let mut tar = Vec::new();
    entry(&mut tar, "oci-layout", 0o644, FILE, br#"{"imageLayoutVersion":"1.0.0"}"#);
    entry(&mut tar, "index.json", 0o644, FILE, entry_point.as_bytes());
    for (hex, content) in &blobs.0 {
        entry(&mut tar, &format!("blobs/sha256/{hex}"), 0o644, FILE, content);
    }
    end(&mut tar);
    host::write(archive, tar)?;
    Ok(index.digest)
}

/// Adds the image of one architecture, and returns its manifest's descriptor.
fn image(blobs: &mut Blobs, content: Content<'_>) -> Result<Descriptor> {
    let layer = blobs.add(LAYER, layer(content)?);
    let config = config(content.architecture, &layer.digest, &process(content));
    let config = blobs.add(CONFIG, config.into_bytes());
    let manifest =
        json!({"schemaVersion": 2, "mediaType": MANIFEST, "config": config.json(), "layers": [layer.json()]});
    Ok(blobs.add(MANIFEST, manifest.to_string().into_bytes()))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::PathBuf;
    use std::process::Command;

    use super::*;

    /// A folder of this test alone, with a program for each architecture.
    fn folder(name: &str) -> PathBuf {
        let folder = std::env::temp_dir().join(format!("tulle-oci-{name}-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        for architecture in ["amd64", "arm64"] {
            fs::write(folder.join(architecture), format!("program for {architecture}")).unwrap();
        }
        folder
    }

    /// Writes the image of the folder's programs; returns its archive and digest.
    fn written(folder: &Path, name: &str) -> (PathBuf, String) {
        let programs = ["amd64", "arm64"].map(|architecture| (architecture, folder.join(architecture)));
        let contents: Vec<Content<'_>> = programs
            .iter()
            .map(|(architecture, program)| Content {
                architecture,
                program: Some(program.as_path()),
                may_net_raw: false,
            })
            .collect();
        let archive = folder.join("image.oci.tar");
        let digest = write(name, &contents, &archive).unwrap();
        (archive, digest)
    }

    fn file(archive: &Path, name: &str) -> Vec<u8> {
        Command::new("tar").arg("-xOf").arg(archive).arg(name).output().unwrap().stdout
    }

    /// The content that a descriptor refers to, after its digest and size are compared.
    fn blob(archive: &Path, descriptor: &Value) -> Vec<u8> {
        let digest = descriptor["digest"].as_str().unwrap();
        let hash = digest.strip_prefix("sha256:").unwrap();
        let content = file(archive, &format!("blobs/sha256/{hash}"));
        assert_eq!(hex(&content), hash);
        assert_eq!(descriptor["size"], content.len());
        content
    }

    fn parsed(content: &[u8]) -> Value {
        serde_json::from_slice(content).unwrap()
    }

    #[test]
    fn a_layout_leads_from_its_index_to_the_program_of_each_architecture() {
        let folder = folder("layout");
        let (archive, digest) = written(&folder, "registry.example/team/tulle-operator:0.1.0");
        assert_eq!(parsed(&file(&archive, "oci-layout"))["imageLayoutVersion"], "1.0.0");
        let entry_point = parsed(&file(&archive, "index.json"));
        let manifests = entry_point["manifests"].as_array().unwrap();
        assert_eq!(manifests.len(), 1, "skopeo copies a layout with one entry without being given a name");
        assert_eq!(manifests[0]["digest"], digest.as_str());
        assert_eq!(manifests[0]["mediaType"], INDEX);
        assert_eq!(manifests[0]["annotations"]["org.opencontainers.image.ref.name"], "0.1.0");
        let index = parsed(&blob(&archive, &manifests[0]));
        let images = index["manifests"].as_array().unwrap();
        let architectures: Vec<&Value> =
            images.iter().map(|image| &image["platform"]["architecture"]).collect();
        assert_eq!(architectures, ["amd64", "arm64"]);
        for image in images {
            let architecture = image["platform"]["architecture"].as_str().unwrap();
            let manifest = parsed(&blob(&archive, image));
            assert_eq!(manifest["mediaType"], image["mediaType"]);
            let config = parsed(&blob(&archive, &manifest["config"]));
            assert_eq!(config["architecture"], architecture);
            assert_eq!(config["config"]["Entrypoint"][0], "/program");
            let layer = &manifest["layers"][0];
            assert_eq!(config["rootfs"]["diff_ids"][0], layer["digest"], "the layer is not compressed");
            let tar = folder.join("layer.tar");
            fs::write(&tar, blob(&archive, layer)).unwrap();
            assert_eq!(file(&tar, "program"), format!("program for {architecture}").as_bytes());
        }
        fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn the_same_programs_give_the_same_digest_under_every_name_and_others_another() {
        let folder = folder("digest");
        let (archive, digest) = written(&folder, "registry.example/tulle-operator:1");
        let bytes = fs::read(archive).unwrap();
        let (archive, again) = written(&folder, "registry.example/tulle-operator:1");
        assert_eq!((&again, fs::read(archive).unwrap()), (&digest, bytes));
        assert_eq!(written(&folder, "mirror.example/tulle-operator:2").1, digest);
        fs::write(folder.join("arm64"), "another program").unwrap();
        assert_ne!(written(&folder, "registry.example/tulle-operator:1").1, digest);
        fs::remove_dir_all(folder).unwrap();
    }
}
