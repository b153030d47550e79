//! `cargo xtask images` builds what goes to a registry: Tulle's programs in the release profile, for each architecture.
//!
//! Per part it writes an OCI image layout with all architectures, a software bill of materials, and an archive for docker
//! per architecture; and for all parts a file with the digests. It prints the commands that push, sign and attest them,
//! and runs none of these.

mod sbom;

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use crate::archive::{self, Content};
use crate::build;
use crate::host;
use crate::images;
use crate::progress::{say, step};

/// A processor architecture that images are built for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Arch {
    /// x86-64.
    Amd64,
    /// 64-bit ARM.
    Arm64,
}

/// The parts of Tulle that have images.
const PARTS: [&str; 3] = ["operator", "webhook", "sidecar"];

impl Arch {
    /// Its name in image manifests.
    fn name(self) -> &'static str {
        match self {
            Self::Amd64 => "amd64",
            Self::Arm64 => "arm64",
        }
    }

    /// Its name in Rust and GNU triples.
    fn machine(self) -> &'static str {
        match self {
            Self::Amd64 => "x86_64",
            Self::Arm64 => "aarch64",
        }
    }

    fn triple(self) -> String {
        format!("{}-unknown-linux-gnu", self.machine())
    }

    fn is_this_machine(self) -> bool {
        self.machine() == std::env::consts::ARCH
    }

    /// The C compiler and library of another architecture, and cargo's variables that name them.
    fn cross(self) -> Result<Vec<(String, String)>> {
        if self.is_this_machine() {
            return Ok(Vec::new());
        }
        let gnu = format!("{}-linux-gnu", self.machine());
        let (compiler, headers) = (format!("{gnu}-gcc"), format!("/usr/{gnu}/include/stdio.h"));
        let packages = (format!("gcc-{}", gnu.replace('_', "-")), format!("libc6-dev-{}-cross", self.name()));
        host::install_packages(&[(&compiler, &packages.0), (&headers, &packages.1)])?;
        let triple = self.triple().replace('-', "_");
        Ok(vec![
            (format!("CARGO_TARGET_{}_LINKER", triple.to_uppercase()), compiler.clone()),
            (format!("CC_{triple}"), compiler),
            (format!("AR_{triple}"), format!("{gnu}-ar")),
        ])
    }
}

/// What was written of one part.
struct Written {
    part: &'static str,
    /// The OCI image layout.
    layout: PathBuf,
    /// The digest of the layout's image index.
    digest: String,
    sbom: PathBuf,
    /// An archive for docker per architecture.
    docker: Vec<DockerArchive>,
}

/// An image of one architecture for `docker load`, which does not keep the digest.
struct DockerArchive {
    name: String,
    file: PathBuf,
}

/// What all parts have in common.
struct Release<'a> {
    registry: &'a str,
    tag: &'a str,
    /// Where the files are written.
    folder: PathBuf,
}

impl Release<'_> {
    fn repository(&self, part: &str) -> String {
        format!("{}/tulle-{part}", self.registry)
    }

    fn file(&self, part: &str, suffix: &str) -> PathBuf {
        self.folder.join(format!("tulle-{part}-{}{suffix}", self.tag))
    }
}

/// Builds the images `REGISTRY/tulle-PART:TAG` for these architectures and prints how they are pushed.
pub fn run(registry: &str, tag: &str, architectures: &[Arch]) -> Result<()> {
    let target = std::env::current_exe()?;
    let target = target.ancestors().nth(3).context("xtask is not in a target folder of cargo")?;
    for arch in architectures {
        compile(*arch)?;
    }
    let triples: Vec<String> = architectures.iter().map(|arch| arch.triple()).collect();
    let sources = sbom::Sources::read(&packages(), &triples)?;
    let registry = registry.trim_end_matches('/');
    let release = Release { registry, tag, folder: target.join("images") };
    std::fs::create_dir_all(&release.folder)
        .with_context(|| format!("cannot create {}", release.folder.display()))?;
    let mut parts = Vec::new();
    for part in PARTS {
        let document = sources.document(&format!("tulle-{part}"))?;
        let sbom = release.file(part, ".spdx.json");
        host::write(&sbom, serde_json::to_string_pretty(&document)? + "\n")?;
        let program = |arch: &Arch| target.join(arch.triple()).join("release").join(format!("tulle-{part}"));
        let programs: Vec<(Arch, PathBuf)> =
            architectures.iter().map(|arch| (*arch, program(arch))).collect();
        let docker = docker_archives(&release, part, &programs)?;
        let (layout, digest) = layout(&release, part, &programs)?;
        parts.push(Written { part, layout, digest, sbom, docker });
    }
    let digests = release.folder.join(format!("tulle-{tag}.digests"));
    host::write(&digests, lines(&parts))?;
    say(&format!("\ndigests, also in {}:\n{}", digests.display(), lines(&parts)));
    say(&commands(&release, &parts, &digests));
    Ok(())
}

/// The packages of the parts.
fn packages() -> [String; 3] {
    PARTS.map(|part| format!("tulle-{part}"))
}

/// The digests, a line per part, as `tulle install --digests` reads them.
fn lines(parts: &[Written]) -> String {
    parts.iter().map(|written| format!("{}@{}\n", written.part, written.digest)).collect()
}

/// The commands for what was written.
fn commands(release: &Release<'_>, parts: &[Written], digests: &Path) -> String {
    let (registry, tag) = (release.registry, release.tag);
    let mut text = "to push all architectures under these digests:\n".to_owned();
    for Written { part, layout, .. } in parts {
        let (from, to) = (layout.display(), release.repository(part));
        let _ = writeln!(text, "skopeo copy --all --preserve-digests oci-archive:{from} docker://{to}:{tag}");
    }
    text.push_str("\nto sign them, and to attest what they are made of:\n");
    for Written { part, digest, sbom, .. } in parts {
        let image = format!("{}@{digest}", release.repository(part));
        let _ = writeln!(text, "cosign sign --recursive {image}");
        let _ = writeln!(text, "cosign attest --type spdxjson --predicate {} {image}", sbom.display());
    }
    text.push_str("\nto install them by digest:\n");
    let _ = writeln!(text, "tulle install --apply --registry {registry} --digests {}", digests.display());
    text.push_str("\nto push with docker, which compresses the layers and so changes the digests:\n");
    for archive in parts.iter().flat_map(|written| &written.docker) {
        let (file, name) = (archive.file.display(), &archive.name);
        let _ = writeln!(text, "docker load -i {file} && docker push {name}");
    }
    for Written { part, docker, .. } in parts {
        let name = format!("{}:{tag}", release.repository(part));
        let each: Vec<&str> = docker.iter().map(|archive| archive.name.as_str()).collect();
        let each = each.join(" ");
        let _ = writeln!(text, "docker manifest create {name} {each} && docker manifest push {name}");
    }
    text
}

fn compile(arch: Arch) -> Result<()> {
    let triple = arch.triple();
    let mut cross = arch.cross()?;
    if arch == Arch::Arm64 {
        // Kernels for 64-bit ARM have pages of 4, 16 or 64 KiB; jemalloc runs on pages up to what it was built for.
        cross.push(("JEMALLOC_SYS_WITH_LG_PAGE".to_owned(), "16".to_owned()));
    }
    standard_library(&triple)?;
    let mut arguments = vec!["build", "--locked", "--release", "--target", &triple, "--bins"];
    let packages = packages();
    packages.iter().for_each(|package| arguments.extend(["--package", package]));
    build::cargo_with(
        host::workspace(),
        &format!("compiling operator, webhook and sidecar for {}", arch.name()),
        &arguments,
        &cross,
    )
    .map(drop)
}

/// Makes sure that Rust's standard library for a target is there, installed by rustup if need be.
fn standard_library(triple: &str) -> Result<()> {
    let rustc = || Command::new(std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into()));
    let folder = host::output(rustc().args(["--print", "target-libdir", "--target", triple]))?;
    if PathBuf::from(folder.trim()).is_dir() {
        return Ok(());
    }
    step(&format!("rustup target add {triple}"));
    if let Err(error) = host::output(Command::new("rustup").args(["target", "add", triple])) {
        bail!(
            "Rust's standard library for {triple} is missing; install it with: rustup target add {triple}\n{error:#}"
        );
    }
    Ok(())
}

/// Writes the image of each architecture for docker.
fn docker_archives(
    release: &Release<'_>,
    part: &str,
    programs: &[(Arch, PathBuf)],
) -> Result<Vec<DockerArchive>> {
    let mut archives = Vec::new();
    for (arch, program) in programs {
        images::ensure_static(program)?;
        let name = format!("{}:{}-{}", release.repository(part), release.tag, arch.name());
        let file = release.file(part, &format!("-{}.tar", arch.name()));
        step(&format!("building image {name} for {}", arch.name()));
        archive::write(&name, content(part, *arch, program), &file)?;
        let size = std::fs::metadata(&file)?.len() as f64 / 1e6;
        say(&format!("{name}: {size:.2} MB"));
        archives.push(DockerArchive { name, file });
    }
    Ok(archives)
}

/// Writes one image for all architectures; returns its archive and its digest.
fn layout(release: &Release<'_>, part: &str, programs: &[(Arch, PathBuf)]) -> Result<(PathBuf, String)> {
    let contents: Vec<Content<'_>> =
        programs.iter().map(|(arch, program)| content(part, *arch, program)).collect();
    let file = release.file(part, ".oci.tar");
    let name = format!("{}:{}", release.repository(part), release.tag);
    let digest = archive::oci::write(&name, &contents, &file)?;
    Ok((file, digest))
}

fn content<'a>(part: &str, arch: Arch, program: &'a Path) -> Content<'a> {
    // As the image of the embedded cluster.
    let may_net_raw =
        images::TULLE.iter().any(|image| image.package == format!("tulle-{part}") && image.may_net_raw);
    Content { architecture: arch.name(), program: Some(program), may_net_raw }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(part: &'static str) -> Written {
        let docker = ["amd64", "arm64"].map(|architecture| DockerArchive {
            name: format!("registry.example/team/tulle-{part}:1.2.3-{architecture}"),
            file: PathBuf::from(format!("/images/tulle-{part}-1.2.3-{architecture}.tar")),
        });
        Written {
            part,
            layout: PathBuf::from(format!("/images/tulle-{part}-1.2.3.oci.tar")),
            digest: format!("sha256:{part}"),
            sbom: PathBuf::from(format!("/images/tulle-{part}-1.2.3.spdx.json")),
            docker: docker.into(),
        }
    }

    #[test]
    fn what_is_signed_attested_and_installed_is_the_digest_that_is_pushed() {
        let release =
            Release { registry: "registry.example/team", tag: "1.2.3", folder: PathBuf::from("/images") };
        let parts = PARTS.map(written);
        assert_eq!(
            lines(&parts),
            "operator@sha256:operator\nwebhook@sha256:webhook\nsidecar@sha256:sidecar\n"
        );
        let text = commands(&release, &parts, Path::new("/images/tulle-1.2.3.digests"));
        for line in [
            "skopeo copy --all --preserve-digests oci-archive:/images/tulle-operator-1.2.3.oci.tar docker://registry.example/team/tulle-operator:1.2.3",
            "cosign sign --recursive registry.example/team/tulle-sidecar@sha256:sidecar",
            "cosign attest --type spdxjson --predicate /images/tulle-webhook-1.2.3.spdx.json registry.example/team/tulle-webhook@sha256:webhook",
            "tulle install --apply --registry registry.example/team --digests /images/tulle-1.2.3.digests",
            "docker manifest create registry.example/team/tulle-operator:1.2.3 registry.example/team/tulle-operator:1.2.3-amd64 registry.example/team/tulle-operator:1.2.3-arm64 && docker manifest push registry.example/team/tulle-operator:1.2.3",
        ] {
            assert!(text.lines().any(|found| found == line), "{line:?} is missing:\n{text}");
        }
    }
}
