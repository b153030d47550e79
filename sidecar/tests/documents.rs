//! The table of events in the sidecar's README is what the code says. That of failure reasons is compared where they are
//! mapped (`src/error.rs`).

use std::fs;
use std::path::Path;

use tulle_mesh::counted_event::{FAILURE_KINDS, KINDS};

const HEAD: &str = "| kind of event | reason | counted when |\n";

fn table() -> String {
    let mut table = HEAD.to_owned() + "|---|---|---|\n";
    for kind in FAILURE_KINDS {
        table.push_str(&format!("| `{}` | a failure reason | {} |\n", kind.name, kind.when));
    }
    for kind in KINDS {
        let mut name = format!("`{}`", kind.name);
        for reason in kind.reasons {
            table.push_str(
                &format!("| {name} | `{}` | {} |\n", reason.name, reason.when).replace("|  |", "| |"),
            );
            // The rows below belong to the same kind.
            name.clear();
        }
    }
    let shadows = KINDS.iter().flat_map(|kind| kind.shadow).map(|name| format!("`{name}`"));
    let shadows = shadows.collect::<Vec<_>>().join(", ");
    table + &format!("| {shadows} | as those above | a policy in Shadow would have done it |\n")
}

#[test]
fn the_table_of_events_in_the_readme_is_what_the_code_says() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md");
    let readme = fs::read_to_string(&path).unwrap();
    let (before, rest) = readme.split_once("| kind of event |").expect("the README has the table");
    // An empty line or the end of the document ends the table.
    let after = rest.split_once("\n\n").map_or(String::new(), |(_, after)| format!("\n{after}"));
    let generated = format!("{before}{}{after}", table());
    if std::env::var_os("TULLE_UPDATE").is_some() {
        fs::write(&path, &generated).unwrap();
        return;
    }
    assert!(
        readme == generated,
        "README.md is stale: TULLE_UPDATE=1 cargo test -p tulle-sidecar table_of_events"
    );
}
