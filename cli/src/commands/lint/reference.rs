//! The page of the documentation that lists what `tulle lint` finds.

use super::rules::{Level, RULES};
use crate::reference::compare;

const INTRODUCTION: &str = "\
# Lint

What `tulle lint` finds in manifests, by the ids that it prints; `tulle lint --rules` lists them too. They are numbered by
themselves: [checks](checks.md) have ids of their own. T19xx need `--with-cluster`. Findings at or above `--fail-on` make the
[exit code](exit-codes.md) 3. Generated from [rules.rs](../../../cli/src/commands/lint/rules.rs):
`TULLE_UPDATE=1 cargo test -p tulle-cli reference`.

| id | level | |
|---|---|---|
";

#[test]
fn the_page_of_lint_has_all_rules() {
    let row = |rule: &super::rules::Rule| {
        let level = match rule.level {
            Level::Warning => "warning",
            Level::Error => "error",
        };
        format!("| {} | {level} | {} |\n", rule.id, rule.about)
    };
    let rows: String = RULES.iter().map(row).collect();
    compare("lint.md", &(INTRODUCTION.to_owned() + &rows));
}
