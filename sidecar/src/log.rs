//! Which lines this sidecar logs: the levels that `TULLE_LOG` names, `info` without it.
//!
//! Not the filter of `tracing-subscriber` that also looks at spans and at values of fields: it brings an engine for
//! regular expressions, and there is nothing here for it to look at.

use std::env;

use tracing_subscriber::filter::{LevelFilter, ParseError, Targets};
use tracing_subscriber::fmt;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;

/// Levels, separated by commas: `warn,access=info`.
const VARIABLE: &str = "TULLE_LOG";

/// Logs to stdout from here on, a line of JSON for each event. To be called once.
pub fn init() {
    let levels = env::var(VARIABLE).ok().and_then(|text| parse(&text).ok());
    let levels = levels.unwrap_or_else(|| Targets::new().with_default(LevelFilter::INFO));
    tracing_subscriber::registry().with(levels).with(fmt::layer().json().flatten_event(true)).init();
}

/// Reads levels: `LEVEL` of all lines, and `TARGET=LEVEL` or `TARGET` (all levels) of those whose target begins so.
fn parse(text: &str) -> Result<Targets, ParseError> {
    // An empty one would be read as `error`, and take the place of a level before it.
    let levels: Vec<&str> = text.split(',').map(str::trim).filter(|level| !level.is_empty()).collect();
    levels.join(",").parse()
}

#[cfg(test)]
mod tests {
    use tracing::Level;

    use super::*;

    #[test]
    fn lines_are_logged_by_level_and_by_target() {
        for (text, target, logged, left_out) in [
            ("info", "access", Level::INFO, Some(Level::DEBUG)),
            ("DEBUG", "tulle_sidecar::run", Level::DEBUG, Some(Level::TRACE)),
            ("trace", "h2", Level::TRACE, None),
            ("warn,access=info", "access", Level::INFO, Some(Level::DEBUG)),
            ("warn,access=info", "tulle_sidecar::run", Level::WARN, Some(Level::INFO)),
            ("access=info, warn,", "tulle_sidecar::run", Level::WARN, Some(Level::INFO)),
            ("warn,tulle_sidecar::backend", "tulle_sidecar::backend::breaker", Level::TRACE, None),
            ("", "tulle_sidecar::run", Level::ERROR, Some(Level::WARN)),
        ] {
            let levels = parse(text).unwrap();
            assert!(levels.would_enable(target, &logged), "{text}: {target} {logged}");
            let is_limited = left_out.is_none_or(|level| !levels.would_enable(target, &level));
            assert!(is_limited, "{text}: {target} {left_out:?}");
        }
        let off = parse("off").unwrap();
        assert!(!off.would_enable("access", &Level::ERROR));
        assert!(parse("access=loud").is_err());
    }
}
