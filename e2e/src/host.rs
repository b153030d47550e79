//! This machine: runs commands, installs packages, and keeps the cache.

use std::fs;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use sha2::{Digest, Sha256};

use crate::progress::step;

/// Programs that the cluster needs, and the Debian packages that contain them.
const PROGRAMS: &[(&str, &str)] = &[
    ("containerd", "containerd"),
    ("runc", "runc"),
    ("/usr/lib/cni/ptp", "containernetworking-plugins"),
    ("nft", "nftables"),
    ("iptables", "iptables"),
    ("conntrack", "conntrack"),
    ("ethtool", "ethtool"),
    ("socat", "socat"),
    ("ip", "iproute2"),
    ("nsenter", "util-linux"),
    ("mount", "mount"),
];

/// Programs that compiling the workspace needs besides cargo, and their Debian packages.
pub const TOOLCHAIN: &[(&str, &str)] = &[("cc", "gcc"), ("make", "make"), ("strip", "binutils")];

/// How many lines of standard error are shown of a command that failed.
const LAST_LINES: usize = 200;

/// Root folder of the workspace from which this program was built.
pub fn workspace() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or(Path::new("."))
}

/// Folder for build results that are kept between runs and clones, with their content hash in the name.
pub fn cache() -> Result<PathBuf> {
    let base = match (std::env::var_os("XDG_CACHE_HOME"), std::env::var_os("HOME")) {
        (Some(cache), _) => PathBuf::from(cache),
        (None, Some(home)) => PathBuf::from(home).join(".cache"),
        (None, None) => bail!("neither XDG_CACHE_HOME nor HOME is set; set HOME"),
    };
    let cache = base.join("tulle");
    fs::create_dir_all(&cache).with_context(|| format!("cannot create {}", cache.display()))?;
    Ok(cache)
}

/// Fails unless the process runs as root.
pub fn require_root() -> Result<()> {
    if !rustix::process::geteuid().is_root() {
        bail!(
            "the embedded cluster needs root for network namespaces and mounts; run this command as root or with sudo -E"
        );
    }
    Ok(())
}

/// Installs the Debian packages of the programs that are missing.
pub fn install_programs() -> Result<()> {
    install_packages(PROGRAMS)
}

/// Installs the packages of missing programs; `programs` are pairs of a program and its package.
pub fn install_packages(programs: &[(&str, &str)]) -> Result<()> {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let missing = || -> Vec<&str> {
        programs.iter().filter(|(program, _)| !is_installed(program)).map(|(_, p)| *p).collect()
    };
    if missing().is_empty() {
        return Ok(());
    }
    let _turn = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let missing = missing();
    if missing.is_empty() {
        return Ok(());
    }
    let by_hand = format!("apt-get install -y --no-install-recommends {}", missing.join(" "));
    if !is_installed("apt-get") {
        bail!(
            "missing packages: {}; install the equivalents of this command for Debian and Ubuntu: {by_hand}",
            missing.join(", ")
        );
    }
    step(&format!("installing {}", missing.join(" ")));
    let noninteractive = |command: &mut Command| output(command.env("DEBIAN_FRONTEND", "noninteractive"));
    // Waits for another apt, which often runs on a machine that has just started.
    let apt_options = ["-qq", "-o", "DPkg::Lock::Timeout=300"];
    if let Err(error) = noninteractive(Command::new("apt-get").arg("update").args(apt_options)) {
        eprintln!("warning: apt-get update failed; installing from the present package lists: {error:#}");
    }
    let install = ["install", "-y", "--no-remove", "--no-install-recommends"];
    noninteractive(Command::new("apt-get").args(install).args(apt_options).args(&missing))
        .with_context(|| format!("cannot install packages; try: {by_hand}"))?;
    Ok(())
}

/// Kernel settings that kubelet checks, and the values that it expects.
pub const KERNEL_SETTINGS: [(&str, &str); 6] = [
    ("vm/overcommit_memory", "1"),
    ("vm/panic_on_oom", "0"),
    ("kernel/panic", "10"),
    ("kernel/panic_on_oops", "1"),
    ("kernel/keys/root_maxkeys", "1000000"),
    ("kernel/keys/root_maxbytes", "25000000"),
];

/// The present values of [`KERNEL_SETTINGS`].
pub fn kernel_settings() -> Vec<String> {
    let value = |name: &str| fs::read_to_string(Path::new("/proc/sys").join(name)).unwrap_or_default();
    KERNEL_SETTINGS.iter().map(|(name, _)| format!("{name} = {}", value(name).trim())).collect()
}

/// PATH with the folders of system programs, which may be missing from a root shell's.
pub fn path() -> std::ffi::OsString {
    let mut path = std::env::var_os("PATH").unwrap_or_default();
    path.push(":/usr/local/sbin:/usr/sbin:/sbin");
    path
}

/// Whether a program is on the PATH (or at the given absolute path).
pub fn is_installed(program: &str) -> bool {
    if program.starts_with('/') {
        return Path::new(program).exists();
    }
    std::env::split_paths(&path()).any(|folder| folder.join(program).is_file())
}

/// Runs a command and returns its standard output.
///
/// # Errors
/// The command line and its standard error, when it cannot be started or exits non-zero.
pub fn output(command: &mut Command) -> Result<String> {
    output_within(command, Duration::from_secs(3600))
}

/// Runs a command, kills it after `limit`, and returns its standard output.
///
/// # Errors
/// The command line and its standard error, or the limit.
pub fn output_within(command: &mut Command, limit: Duration) -> Result<String> {
    let shown = shown(command);
    let Ended { status, stdout, stderr } = ended_within(command, limit)?;
    if !status.success() {
        bail!("{shown}: {status}\n{}{}", stdout.trim_end(), stderr.trim_end());
    }
    Ok(stdout)
}

/// A command that has ended, whether or not it did what it was asked for.
#[derive(Clone, Debug)]
pub struct Ended {
    /// How it ended.
    pub status: ExitStatus,
    /// What it has printed.
    pub stdout: String,
    /// The same for standard error.
    pub stderr: String,
}

/// Runs a command to its end, and kills it after `limit`.
///
/// # Errors
/// It cannot be started, or the limit.
pub fn ended_within(command: &mut Command, limit: Duration) -> Result<Ended> {
    let shown = shown(command);
    let piped =
        command.env("PATH", path()).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = piped.spawn().with_context(|| format!("cannot run {shown}"))?;
    let (text, error) = (read_in_background(child.stdout.take()), read_in_background(child.stderr.take()));
    let start = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if start.elapsed() > limit {
            child.kill()?;
            child.wait()?;
            bail!("{shown}: killed after {} s", limit.as_secs());
        }
        thread::sleep(Duration::from_millis(5));
    };
    let read = |reader: thread::JoinHandle<Vec<u8>>| {
        String::from_utf8_lossy(&reader.join().unwrap_or_default()).into_owned()
    };
    Ok(Ended { status, stdout: read(text), stderr: read(error) })
}

/// Runs a command, passes each line of its standard error to `line` as soon as it is written, and returns its standard
/// output. A carriage return also ends a line, as in progress bars. `line` returns whether the line only tells of
/// progress: an error leaves such lines out, so that they do not push its cause out of sight.
///
/// # Errors
/// The command line and the last lines of its standard error, when it cannot be started or exits non-zero.
pub fn output_with_progress(command: &mut Command, mut line: impl FnMut(&str) -> bool) -> Result<String> {
    let shown = shown(command);
    let piped =
        command.env("PATH", path()).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = piped.spawn().with_context(|| format!("cannot run {shown}"))?;
    let text = read_in_background(child.stdout.take());
    let mut lines = std::collections::VecDeque::new();
    if let Some(errors) = child.stderr.take() {
        let mut pending = Vec::new();
        for byte in std::io::BufReader::new(errors).bytes() {
            match byte? {
                b'\n' | b'\r' => {
                    let text = String::from_utf8_lossy(&pending).into_owned();
                    pending.clear();
                    if line(&text) {
                        continue;
                    }
                    lines.push_back(text);
                    if lines.len() > LAST_LINES {
                        lines.pop_front();
                    }
                }
                byte => pending.push(byte),
            }
        }
        lines.push_back(String::from_utf8_lossy(&pending).into_owned());
    }
    let status = child.wait()?;
    let text = String::from_utf8_lossy(&text.join().unwrap_or_default()).into_owned();
    if !status.success() {
        let lines: Vec<String> = lines.into_iter().filter(|line| !line.trim().is_empty()).collect();
        bail!("{shown}: {status}\n{}{}", text.trim_end(), lines.join("\n"));
    }
    Ok(text)
}

/// Reads a pipe to its end in a thread, so that the program that writes to it does not block.
fn read_in_background(pipe: Option<impl Read + Send + 'static>) -> thread::JoinHandle<Vec<u8>> {
    thread::spawn(move || {
        let mut all = Vec::new();
        // After an error, the bytes read so far are returned.
        let _ = pipe.map(|mut pipe| pipe.read_to_end(&mut all));
        all
    })
}

/// Runs a command with inherited standard input, output and error.
pub fn run(command: &mut Command) -> Result<()> {
    let shown = shown(command);
    let status = command.status().with_context(|| format!("cannot run {shown}"))?;
    if !status.success() {
        bail!("{shown}: {status}");
    }
    Ok(())
}

fn shown(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    // Shortened, because a script that is passed as an argument would fill the screen.
    words.map(|word| word.to_string_lossy().chars().take(200).collect()).collect::<Vec<String>>().join(" ")
}

/// Hash of the content of files and of `extra`.
pub fn content_key(files: &[&Path], extra: &str) -> Result<String> {
    let mut hash = Sha256::new();
    hash.update(extra.as_bytes());
    for file in files {
        let content = fs::read(file).with_context(|| format!("cannot read {}", file.display()))?;
        hash.update((content.len() as u64).to_be_bytes());
        hash.update(&content);
    }
    Ok(hash.finalize().iter().take(8).map(|byte| format!("{byte:02x}")).collect())
}

/// Writes a file atomically, so that a run that is killed leaves no incomplete file.
pub fn write(path: &Path, content: impl AsRef<[u8]>) -> Result<()> {
    let parent = path.parent().with_context(|| format!("{} has no parent folder", path.display()))?;
    fs::create_dir_all(parent).with_context(|| format!("cannot create {}", parent.display()))?;
    let half = path.with_extension("half");
    let mut file = fs::File::create(&half).with_context(|| format!("cannot write {}", half.display()))?;
    file.write_all(content.as_ref())?;
    fs::rename(&half, path).with_context(|| format!("cannot write {}", path.display()))
}
