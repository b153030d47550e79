//! The style sheet and the script, compiled in. Both are cached by the hash of their content.

use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse as _, Response};

const CSS: &str = include_str!("assets/page.css");
const JS: &str = include_str!("assets/page.js");

/// `/assets/page.css`.
pub async fn css(headers: HeaderMap) -> Response {
    answer(&headers, CSS, "text/css; charset=utf-8")
}

/// `/assets/page.js`.
pub async fn js(headers: HeaderMap) -> Response {
    answer(&headers, JS, "text/javascript; charset=utf-8")
}

fn answer(headers: &HeaderMap, content: &'static str, kind: &'static str) -> Response {
    let tag = tag(content);
    let known = headers.get_all(header::IF_NONE_MATCH).iter().filter_map(|value| value.to_str().ok());
    let mut response = match known.flat_map(|value| value.split(',')).any(|known| known.trim() == tag) {
        true => StatusCode::NOT_MODIFIED.into_response(),
        false => ([(header::CONTENT_TYPE, kind)], content).into_response(),
    };
    if let Ok(tag) = HeaderValue::from_str(&tag) {
        response.headers_mut().insert(header::ETAG, tag);
    }
    response.headers_mut().insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    response
}

/// FNV-1a over the content: it must differ between builds, not resist anybody.
fn tag(content: &str) -> String {
    let hash = content.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    format!("\"{hash:016x}\"")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_browser_that_has_the_content_gets_no_second_copy() {
        let first = answer(&HeaderMap::new(), CSS, "text/css");
        assert_eq!(first.status(), StatusCode::OK);
        let tag = first.headers().get(header::ETAG).unwrap().clone();
        let again = answer(&HeaderMap::from_iter([(header::IF_NONE_MATCH, tag.clone())]), CSS, "text/css");
        assert_eq!(again.status(), StatusCode::NOT_MODIFIED);
        let other = answer(&HeaderMap::from_iter([(header::IF_NONE_MATCH, tag)]), JS, "text/javascript");
        assert_eq!(other.status(), StatusCode::OK);
    }

    #[test]
    fn nothing_is_loaded_from_elsewhere_and_motion_can_be_turned_off() {
        for content in [CSS, JS] {
            assert!(!content.contains("http://") && !content.contains("https://"));
        }
        for needed in ["prefers-color-scheme: dark", "prefers-reduced-motion", ":focus-visible"] {
            assert!(CSS.contains(needed), "{needed}");
        }
        assert!(!JS.contains("innerHTML") && !JS.contains("eval("), "markup comes from the server only");
    }
}
