//! The sidecar's README names every kind of event that its users find in metrics. Reasons of failures are checked
//! where they are mapped (`src/error.rs`).

use std::fs;
use std::path::Path;

#[test]
fn the_readme_names_every_kind_of_event() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let readme = fs::read_to_string(root.join("README.md")).unwrap();
    let mut names = Vec::new();
    let mut folders = vec![root.join("src")];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            let text = fs::read_to_string(&path).unwrap();
            let found = text.split("event(\"").skip(1);
            names.extend(found.filter_map(|after| after.split('"').next().map(str::to_owned)));
        }
    }
    assert!(names.len() > 40, "{names:?}");
    let missing: Vec<&String> = names.iter().filter(|name| !readme.contains(&format!("`{name}`"))).collect();
    assert_eq!(missing, Vec::<&String>::new());
}
