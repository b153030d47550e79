//! The sandbox process, which keeps a pod's namespaces alive: it sleeps until it is killed.

fn main() {
    loop {
        std::thread::park();
    }
}
