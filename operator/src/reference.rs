//! Every reason of a condition is described in the documentation, and nothing else is. Reasons of events are those of
//! [`EventReason`], which generates their page, and stand nowhere else.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use tulle_crds::Phase;
use tulle_mesh::event_reason::EventReason;

/// Where reasons stand: files, and folders with all that is below them.
const SOURCES: [&str; 13] = [
    "src/rollout/machine.rs",
    "src/rollout/machine",
    "src/rollout/driver.rs",
    "src/rollout/driver",
    "src/status",
    "src/uninjected.rs",
    "src/identity/root.rs",
    "src/model/uninjected.rs",
    "src/model/split.rs",
    "src/model/gateway/status.rs",
    "src/model/gateway/check.rs",
    "src/model/gateway/backend.rs",
    "../crds/src/condition.rs",
];

/// Words of these files that are neither: actions of events, statuses of conditions, kinds and values of
/// Kubernetes and of the Gateway API. Names of features of the Gateway API begin with `HTTPRoute` or `Mesh`.
const OTHERS: [&str; 22] = [
    "Accept",
    "Compare",
    "Cookie",
    "Deployment",
    "DeploymentPaused",
    "False",
    "GRPCRoute",
    "Header",
    "Inject",
    "NewReplicaSetAvailable",
    "Permanent",
    "Pod",
    "ProgressDeadlineExceeded",
    "ReplicaSet",
    "Resolve",
    "Rollout",
    "Service",
    "Services",
    "Session",
    "True",
    "Unknown",
    "XMesh",
];

/// Names of events that the code has as strings too: a type of condition, and a reason of `tulle_crds`, which does not
/// know of events.
const ALSO_OF_CONDITIONS: [&str; 2] = ["Promoted", "RefusedBySidecar"];

fn is_feature(word: &str) -> bool {
    word.starts_with("HTTPRoute") || word.starts_with("Mesh")
}

/// Whether a string is one word of the form that Kubernetes wants of reasons.
fn is_word(text: &str) -> bool {
    text.starts_with(|first: char| first.is_ascii_uppercase())
        && text.chars().all(|letter| letter.is_ascii_alphanumeric())
        && text.contains(|letter: char| letter.is_ascii_lowercase())
}

/// Such strings in the code of a file, without its tests.
fn words_of(code: &str) -> BTreeSet<String> {
    let code = code.split("#[cfg(test)]\nmod tests {").next().unwrap_or_default();
    let lines = code.lines().filter(|line| !line.trim_start().starts_with("//"));
    let mut words = BTreeSet::new();
    for line in lines {
        // What stands before the first quote and after the last one is outside a string.
        let mut parts: Vec<&str> = line.split('"').skip(1).collect();
        parts.pop();
        words.extend(parts.into_iter().filter(|part| is_word(part)).map(str::to_owned));
    }
    words
}

fn is_test(path: &Path) -> bool {
    ["tests", "tests.rs", "properties.rs"].iter().any(|name| path.ends_with(name))
}

fn words_below(path: &Path, words: &mut BTreeSet<String>) {
    if path.is_dir() {
        let paths: Vec<PathBuf> = fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path()).collect();
        for path in paths.iter().filter(|path| !is_test(path)) {
            words_below(path, words);
        }
    } else {
        let code = fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        words.extend(words_of(&code));
    }
}

/// All such strings in [`SOURCES`].
fn words() -> BTreeSet<String> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut words = BTreeSet::new();
    for source in SOURCES {
        words_below(&folder.join(source), &mut words);
    }
    words
}

/// What the tables of the page describe: the words between backticks in their first two columns.
fn described() -> BTreeSet<String> {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/src/reference/conditions.md");
    let text = fs::read_to_string(page).unwrap();
    let mut described = BTreeSet::new();
    for line in text.lines().filter(|line| line.starts_with('|')) {
        let cells = line.split('|').skip(1).take(2);
        let words = cells.flat_map(|cell| cell.split('`').skip(1).step_by(2));
        described.extend(words.map(|word| word.trim_start_matches("tulle.dev/").to_owned()));
    }
    described
}

#[test]
fn every_condition_and_reason_in_the_code_is_described() {
    let described = described();
    let missing: Vec<String> = words()
        .into_iter()
        .filter(|word| !described.contains(word) && !OTHERS.contains(&word.as_str()) && !is_feature(word))
        .collect();
    assert!(
        missing.is_empty(),
        "add these to docs/src/reference/conditions.md, to EventReason, or to OTHERS if they are neither: {missing:?}"
    );
}

#[test]
fn every_condition_and_reason_that_is_described_is_in_the_code() {
    let words = words();
    let phases =
        [Phase::Waiting, Phase::Stable, Phase::Progressing, Phase::Paused, Phase::Promoting, Phase::Failed];
    let phases = phases.map(|phase| format!("{phase:?}"));
    let is_known = |word: &String| {
        words.contains(word) || phases.contains(word) || EventReason::from_name(word).is_some()
    };
    let stale: Vec<String> = described().into_iter().filter(|word| !is_known(word)).collect();
    assert!(stale.is_empty(), "not in the code any more: {stale:?}");
    let unused: Vec<&str> = OTHERS.into_iter().filter(|word| !words.contains(*word)).collect();
    assert!(unused.is_empty(), "not in the code any more: {unused:?}");
}

#[test]
fn reasons_of_events_are_taken_from_their_enum() {
    let is_event = |word: &String| EventReason::from_name(word).is_some();
    let words: Vec<String> = words().into_iter().filter(is_event).collect();
    assert_eq!(words, ALSO_OF_CONDITIONS, "use EventReason");
}

#[test]
fn words_are_found_in_strings_of_code_only() {
    let code = "// \"Comment\"\nlet a = (\"One\", \"two words\", \"Two\"); b(\"lower\", \"UPPER\")\n#[cfg(test)]\nmod tests {\n\"No\"";
    assert_eq!(words_of(code), BTreeSet::from(["One".to_owned(), "Two".to_owned()]));
}
