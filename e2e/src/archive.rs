//! Archives of container images, in the format of `docker save`; [`oci`] writes those that are released.
//!
//! In: static programs and the files that they need. Out: a tar file that containerd, docker, kind, k3d and minikube load: a configuration
//! of the image, one layer, and a manifest that names both by their content. Written here and not by docker or buildah,
//! because they differ in whether a file keeps its capabilities, and because the same program then always makes the same
//! image.

pub mod oci;

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

/// What goes into an image.
#[derive(Clone, Copy, Debug)]
pub struct Content<'a> {
    /// Architecture as images name it, `amd64` or `arm64`.
    pub architecture: &'a str,
    /// The program, started without arguments; `None`: nothing is in the image, and test pods mount the host's programs.
    pub program: Option<&'a Path>,
    /// Whether a process that runs the program may have CAP_NET_RAW although it is not root. One of a container that is
    /// not given the capability starts without.
    pub may_net_raw: bool,
}

/// Changes when other bytes are written for the same program: part of the key under which archives are kept.
pub const FORMAT: &str = "1";

/// Tar writes in blocks of this many bytes.
const BLOCK: usize = 512;
/// Kinds of entries: a file, and attributes of the entry that follows.
const FILE: u8 = b'0';
const ATTRIBUTES: u8 = b'x';

/// Writes the archive of an image named `name`.
///
/// # Errors
/// The program cannot be read, or the archive cannot be written.
pub fn write(name: &str, content: Content<'_>, archive: &Path) -> Result<()> {
    save(name, content.architecture, &layer(content)?, &process(content), archive)
}

/// How the image is started, as in the field `config` of its configuration.
fn process(content: Content<'_>) -> Value {
    match content.program {
        Some(_) => json!({"User": "65532:65532", "Entrypoint": ["/program"]}),
        None => json!({"Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"]}),
    }
}

/// A file of an image with several.
pub struct File<'a> {
    /// Path without the leading slash.
    pub path: &'a str,
    /// Permissions.
    pub mode: u32,
    pub content: &'a [u8],
}

/// Writes the archive of an image named `name` with these files. `run`: how it is started, as in the field `config` of an
/// image's configuration.
///
/// # Errors
/// The archive cannot be written.
pub fn write_files(
    name: &str,
    architecture: &str,
    files: &[File<'_>],
    run: &Value,
    archive: &Path,
) -> Result<()> {
    let mut layer = Vec::new();
    for file in files {
        entry(&mut layer, file.path, file.mode, FILE, file.content);
    }
    end(&mut layer);
    save(name, architecture, &layer, run, archive)
}

/// Writes the archive of an image with one layer.
fn save(name: &str, architecture: &str, layer: &[u8], run: &Value, archive: &Path) -> Result<()> {
    let layer_digest = hex(layer);
    let config = config(architecture, &format!("sha256:{layer_digest}"), run);
    let (config_file, layer_file) =
        (format!("{}.json", hex(config.as_bytes())), format!("{layer_digest}.tar"));
    let manifest = json!([{"Config": config_file, "RepoTags": [name], "Layers": [layer_file]}]).to_string();
    let mut tar = Vec::new();
    for (name, content) in
        [(&*config_file, config.as_bytes()), (&*layer_file, layer), ("manifest.json", manifest.as_bytes())]
    {
        entry(&mut tar, name, 0o644, FILE, content);
    }
    end(&mut tar);
    let half = archive.with_extension("half");
    fs::write(&half, tar).with_context(|| format!("cannot write {}", half.display()))?;
    fs::rename(&half, archive).with_context(|| format!("cannot write {}", archive.display()))
}

/// The configuration of an image with one layer, which is not compressed.
fn config(architecture: &str, layer: &str, run: &Value) -> String {
    json!({
        "created": "1970-01-01T00:00:00Z",
        "architecture": architecture,
        "os": "linux",
        "config": run,
        "rootfs": {"type": "layers", "diff_ids": [layer]},
        "history": [{"created": "1970-01-01T00:00:00Z", "created_by": "cargo xtask"}],
    })
    .to_string()
}

/// The file system of an image.
fn layer(content: Content<'_>) -> Result<Vec<u8>> {
    let mut tar = Vec::new();
    if let Some(program) = content.program {
        let bytes = fs::read(program).with_context(|| format!("cannot read {}", program.display()))?;
        if content.may_net_raw {
            let attribute = attribute(b"SCHILY.xattr.security.capability", &may_net_raw());
            entry(&mut tar, "attributes/program", 0o644, ATTRIBUTES, &attribute);
        }
        entry(&mut tar, "program", 0o755, FILE, &bytes);
    }
    end(&mut tar);
    Ok(tar)
}

/// The extended attribute `security.capability` (`struct vfs_cap_data` of linux/capability.h) of a file whose processes
/// may take CAP_NET_RAW into use. The bit that would take it at the start is not set: the kernel then refuses to start
/// the program where the container may not have the capability.
fn may_net_raw() -> [u8; 20] {
    const VFS_CAP_REVISION_2: u32 = 0x0200_0000;
    const CAP_NET_RAW: u32 = 13;
    let mut data = [0; 20];
    let (revision, rest) = data.split_at_mut(4);
    revision.copy_from_slice(&VFS_CAP_REVISION_2.to_le_bytes());
    let (permitted, _) = rest.split_at_mut(4);
    permitted.copy_from_slice(&(1_u32 << CAP_NET_RAW).to_le_bytes());
    data
}

/// A record of an entry of attributes: its length in decimal, which counts itself too, name and value.
fn attribute(name: &[u8], value: &[u8]) -> Vec<u8> {
    let rest = [b" ", name, b"=", value, b"\n"].concat();
    let mut length = rest.len();
    while length != rest.len() + length.to_string().len() {
        length = rest.len() + length.to_string().len();
    }
    [length.to_string().as_bytes(), &rest].concat()
}

/// Appends an entry of root's, of 1970. Names have at most 100 bytes.
fn entry(tar: &mut Vec<u8>, name: &str, mode: u32, kind: u8, content: &[u8]) {
    let mut header = Vec::with_capacity(BLOCK);
    let mut field = |value: &[u8], width: usize| {
        let end = header.len() + width;
        header.extend_from_slice(value.get(..width).unwrap_or(value));
        header.resize(end, 0);
    };
    field(name.as_bytes(), 100);
    field(format!("{mode:07o}").as_bytes(), 8);
    field(b"0000000", 8); // user
    field(b"0000000", 8); // group
    field(format!("{:011o}", content.len()).as_bytes(), 12);
    field(b"00000000000", 12); // time
    field(b"        ", 8); // checksum: counts as spaces
    field(&[kind], 1);
    field(b"", 100); // target of a link
    field(b"ustar\x0000", 8);
    field(b"", BLOCK - 265);
    let checksum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
    drop(header.splice(148..156, format!("{checksum:06o}\0 ").into_bytes()));
    tar.extend_from_slice(&header);
    tar.extend_from_slice(content);
    tar.resize(tar.len().next_multiple_of(BLOCK), 0);
}

/// Two empty blocks end an archive.
fn end(tar: &mut Vec<u8>) {
    tar.resize(tar.len() + 2 * BLOCK, 0);
}

fn hex(content: &[u8]) -> String {
    Sha256::digest(content).iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    /// A folder of this test alone.
    fn folder(name: &str) -> std::path::PathBuf {
        let folder = std::env::temp_dir().join(format!("tulle-archive-{name}-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        folder
    }

    fn tar(arguments: &[&str], file: &Path) -> String {
        let run = Command::new("tar").args(arguments).arg(file).output().unwrap();
        assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
        String::from_utf8_lossy(&run.stdout).into_owned()
    }

    #[test]
    fn tar_reads_the_program_its_rights_and_its_capability() {
        let folder = folder("layer");
        let program = folder.join("source");
        fs::write(&program, [7_u8; 1_000]).unwrap();
        for (may_net_raw, expected) in [(true, "x: 20 security.capability"), (false, "")] {
            let content = Content { architecture: "amd64", program: Some(&program), may_net_raw };
            let file = folder.join("layer.tar");
            fs::write(&file, layer(content).unwrap()).unwrap();
            let list = tar(&["--xattrs", "--xattrs-include=*", "-tvvf"], &file);
            assert!(list.starts_with("-rwxr-xr-x"), "{list}");
            assert!(list.contains("0/0") && list.contains(" 1000 ") && list.contains(" program"), "{list}");
            assert_eq!(list.contains("security.capability"), may_net_raw, "{list}");
            assert!(list.contains(expected), "{list}");
        }
        fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn the_manifest_names_configuration_and_layer_by_their_content() {
        let folder = folder("image");
        let file = folder.join("image.tar");
        let content = Content { architecture: "arm64", program: None, may_net_raw: false };
        write("tulle.local/empty:1", content, &file).unwrap();
        let read = |name: &str| {
            let run = Command::new("tar").arg("-xOf").arg(&file).arg(name).output().unwrap();
            run.stdout
        };
        let manifest: serde_json::Value = serde_json::from_slice(&read("manifest.json")).unwrap();
        let manifest = &manifest[0];
        assert_eq!(manifest["RepoTags"][0], "tulle.local/empty:1");
        let config_file = manifest["Config"].as_str().unwrap();
        assert_eq!(config_file, format!("{}.json", hex(&read(config_file))));
        let config: serde_json::Value = serde_json::from_slice(&read(config_file)).unwrap();
        let layer_file = manifest["Layers"][0].as_str().unwrap();
        let digest = hex(&read(layer_file));
        assert_eq!(layer_file, format!("{digest}.tar"));
        assert_eq!(config["rootfs"]["diff_ids"][0], format!("sha256:{digest}"));
        assert_eq!(config["architecture"], "arm64");
        fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn an_image_of_several_files_has_each_at_its_path_with_its_rights() {
        let folder = folder("files");
        let file = folder.join("image.tar");
        let files = [
            File { path: "usr/local/bin/server", mode: 0o755, content: b"program" },
            File { path: "cert.crt", mode: 0o644, content: b"certificate" },
        ];
        let run = json!({"Entrypoint": ["/usr/local/bin/server"]});
        write_files("example.test/echo:v1", "amd64", &files, &run, &file).unwrap();
        let list = tar(&["-tf"], &file);
        let layer = list.lines().find(|name| name.ends_with(".tar")).unwrap();
        let inner = folder.join("layer.tar");
        fs::write(&inner, Command::new("tar").arg("-xOf").arg(&file).arg(layer).output().unwrap().stdout)
            .unwrap();
        let list = tar(&["-tvf"], &inner);
        let lines: Vec<&str> = list.lines().collect();
        assert!(lines[0].starts_with("-rwxr-xr-x") && lines[0].ends_with(" usr/local/bin/server"), "{list}");
        assert!(lines[1].starts_with("-rw-r--r--") && lines[1].ends_with(" cert.crt"), "{list}");
        fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn the_capability_is_permitted_and_not_taken_at_the_start() {
        // `setcap cap_net_raw+p`
        let expected = [1, 0, 0, 2, 0, 0x20, 0, 0];
        let data = may_net_raw();
        assert_eq!(data[1..8], expected[1..]);
        assert_eq!(data[0] & 1, 0, "VFS_CAP_FLAGS_EFFECTIVE");
        assert!(data[8..].iter().all(|byte| *byte == 0));
    }

    #[test]
    fn the_length_of_an_attribute_counts_itself() {
        for size in [0, 1, 85, 86, 87, 88, 89, 980, 990] {
            let record = attribute(b"name", &vec![b'v'; size]);
            let (length, _) = record.split_at(record.iter().position(|byte| *byte == b' ').unwrap());
            let length: usize = std::str::from_utf8(length).unwrap().parse().unwrap();
            assert_eq!(length, record.len());
        }
    }
}
