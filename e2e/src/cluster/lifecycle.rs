//! Starts and stops the cluster, from outside the node's namespaces.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process};

use super::files::Node;
use super::{components, files, pki};
use crate::host;
use crate::images;
use crate::progress::step;

/// Time limit of each step of the start, with room for slow machines.
const STEP_TIMEOUT: Duration = Duration::from_secs(120);

/// Mount point of control groups: the hierarchy of version 2, or those of version 1.
const CGROUPS: &str = "/sys/fs/cgroup";

/// The embedded cluster of this machine.
pub struct Cluster {
    state: PathBuf,
}

impl Cluster {
    /// The cluster whose state is in `TULLE_CLUSTER` or the default folder.
    pub fn new() -> Result<Self> {
        let state = std::env::var_os("TULLE_CLUSTER")
            .map_or_else(|| PathBuf::from("/var/tmp/tulle-cluster"), PathBuf::from);
        Ok(Self { state })
    }

    /// A cluster with its state in another folder; it can run at the same time as the default one.
    pub fn at(state: &Path) -> Self {
        Self { state: state.to_path_buf() }
    }

    /// Starts the cluster unless it is running, and waits until its nodes are ready. `count` is the number of nodes;
    /// `None` keeps the current number, or starts one.
    pub fn up(&self, count: Option<u8>) -> Result<()> {
        host::require_root()?;
        host::install_programs()?;
        let current = u8::try_from(self.nodes().len()).unwrap_or(0);
        let size_matches = count.is_none_or(|count| count == current);
        let _turn = lock()?;
        // A cluster that was ready before may only be busy; one whose start was interrupted never becomes ready.
        let was_ready = self.nodes().first().is_some_and(|first| first.api_ready().exists());
        if size_matches && was_ready && self.pid().is_some() && self.wait_ready(STEP_TIMEOUT).is_ok() {
            return Ok(());
        }
        let components = components::binary()?;
        let pause = images::archive(&images::PAUSE)?;
        self.down()?;
        step("starting the embedded cluster");
        let count = count.unwrap_or(current.max(1));
        let nodes: Vec<Node> = (1..=count).map(|number| Node { state: self.state.clone(), number }).collect();
        files::write(&nodes)?;
        pki::create(&self.state.join("pki"), &nodes)?;
        nodes.iter().try_for_each(|node| make_cgroups(&node.cgroup()))?;
        self.start_node(&components, count)?;
        self.wait_up("containerd to listen (see: cargo xtask cluster logs containerd)", || {
            nodes.iter().all(|node| node.containerd().exists())
        })?;
        self.load(&pause)?;
        self.wait_up(
            "the API server to become ready (see: cargo xtask cluster logs kube-apiserver)",
            || self.responds(&[], "/readyz"),
        )?;
        nodes.iter().take(1).try_for_each(|first| host::write(&first.api_ready(), ""))?;
        let dns = self.state.join("dns.yaml");
        host::output(self.kubectl()?.arg("apply").arg("-f").arg(dns))?;
        self.wait_ready(STEP_TIMEOUT)?;
        self.wait_up("Services to be reachable (see: cargo xtask cluster logs kube-proxy)", || {
            self.responds(&["--server=https://10.96.0.1:443"], "/readyz")
        })?;
        self.wait_up("DNS to become ready (see: cargo xtask cluster logs coredns)", || {
            self.responds(&[&format!("--server=http://{}", files::DNS_READY)], "/ready")
        })
    }

    /// Whether the API server responds, or another server that `server` sets as kubectl's `--server`.
    fn responds(&self, server: &[&str], path: &str) -> bool {
        let kubectl = self.kubectl().map(|mut kubectl| {
            host::output(kubectl.args(server).args(["get", "--raw", path, "--request-timeout=2s"]))
        });
        kubectl.is_ok_and(|answer| answer.is_ok())
    }

    /// The nodes with which the cluster was started.
    fn nodes(&self) -> Vec<Node> {
        let node = |number| Node { state: self.state.clone(), number };
        (1..=u8::MAX).map(node).take_while(|node| node.folder().exists()).collect()
    }

    /// Stops every process of the cluster and removes its files and control groups.
    pub fn down(&self) -> Result<()> {
        if let Some(pid) = self.pid() {
            kill_process(pid, Signal::KILL).ok();
            self.wait_for(Duration::from_secs(20), "the node's processes to end", || self.pid().is_none())?;
        }
        remove_cgroups(&self.state);
        if self.state.exists() {
            let empty = fs::read_dir(&self.state)?.next().is_none();
            // Clusters of earlier builds have no marker.
            let earlier = ["logs", "pki"].iter().all(|folder| self.state.join(folder).exists());
            if !empty && !earlier && !self.state.join(files::MARKER).exists() {
                bail!(
                    "{} is not the folder of a cluster, so it is not removed; set TULLE_CLUSTER to another folder",
                    self.state.display()
                );
            }
            remove_state(&self.state)?;
        }
        Ok(())
    }

    /// Files, control groups, mounts and processes of the cluster on this machine; empty once it is down.
    pub fn left_behind(&self) -> Vec<String> {
        let mut left = Vec::new();
        if self.state.exists() {
            left.push(self.state.display().to_string());
        }
        left.extend(cgroups(&self.state).iter().map(|group| group.display().to_string()));
        let mine = self.state.display().to_string();
        let mounts = fs::read_to_string("/proc/mounts").unwrap_or_default();
        left.extend(mounts.lines().filter(|line| line.contains(&mine)).map(str::to_owned));
        for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
            let command = fs::read(entry.path().join("cmdline")).unwrap_or_default();
            let command = String::from_utf8_lossy(&command).replace('\0', " ");
            let ours = command.split([' ', '=', ':']).any(|word| Path::new(word).starts_with(&self.state));
            if ours && entry.file_name() != *std::process::id().to_string() {
                left.push(format!("process {}: {command}", entry.file_name().to_string_lossy()));
            }
        }
        left
    }

    /// Prints the nodes and pods.
    pub fn status(&self) -> Result<()> {
        if self.pid().is_none() {
            bail!("the cluster is not running; start it with: cargo xtask cluster up");
        }
        host::run(self.kubectl()?.args(["get", "nodes,pods", "--all-namespaces", "-o", "wide"]))
    }

    /// kubectl as the cluster's administrator.
    pub fn kubectl(&self) -> Result<Command> {
        let mut command = self.inside(&components::binary()?.display().to_string())?;
        command.arg("kubectl");
        Ok(command)
    }

    /// A command inside the first node's namespaces.
    pub fn inside(&self, program: &str) -> Result<Command> {
        let Some(init) = self.pid().and_then(child_of) else {
            bail!("the cluster is not running; start it with: cargo xtask cluster up");
        };
        let mut command = Command::new("nsenter");
        command
            .env("PATH", host::path())
            .args(["-t", &init.to_string(), "-m", "-p", "-n", "-u", "-i"])
            .arg(format!("--wd={}", std::env::current_dir()?.display()))
            .arg(program)
            .env("KUBECONFIG", self.state.join("pki/admin.conf"))
            .env("CONTAINERD_ADDRESS", Node { state: self.state.clone(), number: 1 }.containerd())
            .env("CONTAINERD_NAMESPACE", "k8s.io");
        Ok(command)
    }

    /// Loads an image archive into every node, unless that node has loaded it already.
    pub fn load(&self, archive: &Path) -> Result<()> {
        let name = archive.file_name().with_context(|| format!("{} is not a file", archive.display()))?;
        for node in self.nodes() {
            // One marker file per image name, because the archive loaded last determines the image.
            let file = name.to_string_lossy();
            let image = file.rsplit_once('-').map_or(&*file, |(image, _)| image);
            let loaded = node.folder().join("images").join(image);
            if fs::read_to_string(&loaded).is_ok_and(|last| last == file) {
                continue;
            }
            let mut ctr = self.inside("ctr")?;
            ctr.env("CONTAINERD_ADDRESS", node.containerd());
            host::output(ctr.args(["images", "import"]).arg(archive))?;
            host::write(&loaded, file.as_bytes())?;
        }
        Ok(())
    }

    /// Folder of the first node's static pods.
    pub fn static_pods(&self) -> PathBuf {
        Node { state: self.state.clone(), number: 1 }.folder().join("static-pods")
    }

    /// Prints the log of a component.
    pub fn print_log(&self, component: &str) -> Result<()> {
        let path = self.state.join("logs").join(component);
        let log = fs::read_to_string(&path).with_context(|| {
            let names = fs::read_dir(self.state.join("logs")).into_iter().flatten().flatten();
            let names: Vec<String> = names.map(|e| e.file_name().to_string_lossy().into_owned()).collect();
            format!("cannot read the log of {component:?}; there are logs of {}", names.join(", "))
        })?;
        print!("{log}");
        Ok(())
    }

    fn start_node(&self, components: &Path, count: u8) -> Result<()> {
        let log = fs::File::create(self.state.join("logs/node"))?;
        // A copy, so that rebuilding xtask does not pull the program from under pid 1.
        let init = self.state.join("xtask-init");
        fs::copy("/proc/self/exe", &init)?;
        let child = Command::new("setsid")
            .args(["unshare", "--mount", "--pid", "--net", "--uts", "--ipc", "--fork", "--kill-child"])
            .args(["--mount-proc", "--propagation", "private"])
            .arg(&init)
            .env("PATH", host::path())
            .args(["cluster", "init"])
            .arg(&self.state)
            .arg(components)
            .arg(format!("--nodes={count}"))
            .stdin(Stdio::null())
            .stderr(log.try_clone()?)
            .stdout(log)
            .spawn()
            .context("cannot start the first node")?;
        host::write(&self.state.join("node.pid"), child.id().to_string())?;
        // is_node() recognises the process only after it has executed unshare.
        self.wait_for(Duration::from_secs(2), "the node to start", || self.pid().is_some()).ok();
        Ok(())
    }

    /// The process that holds the namespaces, if it is running. It is also searched by its arguments, because an xtask
    /// that was killed may not have written `node.pid`.
    fn pid(&self) -> Option<Pid> {
        let written = fs::read_to_string(self.state.join("node.pid")).ok();
        let written = written.and_then(|text| text.trim().parse().ok()).filter(|pid| self.is_node(*pid));
        let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
        let mut numbers = entries.filter_map(|entry| entry.file_name().to_string_lossy().parse().ok());
        written.or_else(|| numbers.find(|pid| self.is_node(*pid))).and_then(Pid::from_raw)
    }

    /// Whether a process is the parent of the node's pid 1.
    fn is_node(&self, pid: i32) -> bool {
        let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let arguments: Vec<&[u8]> = command.split(|byte| *byte == 0).collect();
        let state = self.state.display().to_string();
        let init = [b"cluster".as_slice(), b"init", state.as_bytes()];
        arguments.first().is_some_and(|program| program.ends_with(b"unshare"))
            && arguments.windows(3).any(|window| window == init)
    }

    fn wait_ready(&self, timeout: Duration) -> Result<()> {
        let wanted = self.nodes().len();
        let result = self.wait_for(timeout, "every node to become ready", || {
            let nodes = self.kubectl().and_then(|mut kubectl| {
                host::output(kubectl.args(["get", "nodes", "--no-headers", "--request-timeout=2s"]))
            });
            nodes.is_ok_and(|text| text.lines().filter(|line| line.contains(" Ready")).count() == wanted)
        });
        result.context("the cluster is not ready (see: cargo xtask cluster logs kubelet)")
    }

    /// Waits for a step of the start, or fails when the node has ended.
    fn wait_up(&self, what: &str, done: impl Fn() -> bool) -> Result<()> {
        let ended = || self.pid().is_none();
        self.wait_for(STEP_TIMEOUT, what, || done() || ended())?;
        if ended() {
            let log = fs::read_to_string(self.state.join("logs/node")).unwrap_or_default();
            let last: Vec<&str> = log.lines().rev().take(5).collect();
            bail!(
                "the node has ended; last lines of its log:\n{}",
                last.into_iter().rev().collect::<Vec<_>>().join("\n")
            );
        }
        Ok(())
    }

    fn wait_for(&self, timeout: Duration, what: &str, done: impl Fn() -> bool) -> Result<()> {
        let start = Instant::now();
        while !done() {
            if start.elapsed() > timeout {
                bail!("timed out after {} s waiting for {what}", timeout.as_secs());
            }
            thread::sleep(Duration::from_millis(100));
        }
        Ok(())
    }
}

impl Cluster {
    /// Keeps other runs of demo, tests and installations from this cluster until the file is dropped, because the first
    /// to end would stop it under the others.
    pub fn reserve(&self) -> Result<fs::File> {
        let path = self.state.with_extension("lock");
        let file = fs::File::create(&path).with_context(|| format!("cannot create {}", path.display()))?;
        if rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive).is_err() {
            step(
                "waiting for another run that uses this cluster (TULLE_CLUSTER=FOLDER starts a cluster of its own)",
            );
            rustix::fs::flock(&file, rustix::fs::FlockOperation::LockExclusive)?;
        }
        Ok(file)
    }

    /// Notes whether tests are in the middle of something: a cluster on which they were interrupted is not used again.
    pub fn set_in_use(&self, in_use: bool) -> Result<()> {
        let note = self.state.join("in-use");
        match in_use {
            true => host::write(&note, ""),
            false if note.exists() => fs::remove_file(&note).context("cannot remove a note"),
            false => Ok(()),
        }
    }

    /// Whether tests were interrupted on it.
    pub fn was_interrupted(&self) -> bool {
        self.state.join("in-use").exists()
    }
}

/// Takes the lock that lets only one xtask at a time start a cluster; dropping the file releases it.
fn lock() -> Result<fs::File> {
    let file = fs::File::open(host::cache()?)?;
    rustix::fs::flock(&file, rustix::fs::FlockOperation::LockExclusive)?;
    Ok(file)
}

fn child_of(pid: Pid) -> Option<i32> {
    let path = format!("/proc/{pid}/task/{pid}/children", pid = pid.as_raw_nonzero());
    fs::read_to_string(path).ok()?.split_whitespace().next()?.parse().ok()
}

/// The roots of every control group hierarchy: one on cgroup v2, one per controller on v1.
fn cgroup_roots() -> Vec<PathBuf> {
    let top = PathBuf::from(CGROUPS);
    if top.join("cgroup.controllers").exists() {
        return vec![top];
    }
    let entries = fs::read_dir(&top).into_iter().flatten().flatten().map(|entry| entry.path());
    entries.filter(|path| path.is_dir() && !path.is_symlink()).collect()
}

/// Creates a kubelet's root control group, which must exist, on v1 with the CPUs and memory nodes of the machine.
fn make_cgroups(name: &str) -> Result<()> {
    for root in cgroup_roots() {
        let group = root.join(name);
        fs::create_dir_all(&group).with_context(|| format!("cannot create {}", group.display()))?;
        for file in ["cpuset.cpus", "cpuset.mems"] {
            if let Ok(value) = fs::read_to_string(root.join(file)) {
                fs::write(group.join(file), value.trim()).ok();
            }
        }
        // v2: kubelet does not start with a root group that lacks one of the machine's controllers.
        for controller in fs::read_to_string(root.join("cgroup.controllers")).unwrap_or_default().split(' ') {
            for folder in [&root, &group] {
                fs::write(folder.join("cgroup.subtree_control"), format!("+{}", controller.trim())).ok();
            }
        }
        // A machine with both versions has its controllers in the hierarchies of version 1.
        if root == Path::new(CGROUPS)
            && let Ok(controllers) = fs::read_to_string(group.join("cgroup.subtree_control"))
            && let Some(missing) = ["cpu", "memory", "pids"].iter().find(|name| !controllers.contains(**name))
        {
            bail!(
                "control group {} has no controller {missing}, which kubelet needs; run on the machine itself, or in a container with its own, empty control group namespace",
                group.display()
            );
        }
    }
    Ok(())
}

/// The control groups of a cluster's nodes.
fn cgroups(state: &Path) -> Vec<PathBuf> {
    let prefix = format!("{}-node", files::cgroup_prefix(state));
    let folders = cgroup_roots().into_iter().filter_map(|root| fs::read_dir(root).ok());
    let ours = folders.flatten().flatten().filter(|e| e.file_name().to_string_lossy().starts_with(&prefix));
    ours.map(|entry| entry.path()).collect()
}

fn remove_cgroups(state: &Path) {
    // Retried, because the kernel reports a group as busy for a moment after its last process was killed.
    for _ in 0..50 {
        let left = cgroups(state);
        left.iter().for_each(|group| remove_group(group));
        if left.iter().all(|group| !group.exists()) {
            return;
        }
        thread::sleep(Duration::from_millis(100));
    }
}

fn remove_group(group: &Path) {
    for entry in fs::read_dir(group).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_group(&entry.path());
        }
    }
    fs::remove_dir(group).ok();
}

fn remove_state(state: &Path) -> Result<()> {
    for _ in 0..50 {
        match fs::remove_dir_all(state) {
            Ok(()) => return Ok(()),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            Err(_) => thread::sleep(Duration::from_millis(100)),
        }
    }
    fs::remove_dir_all(state).with_context(|| format!("cannot remove {}", state.display()))
}
