//! Heads as they are met: which are refused, which are repaired, and what is passed on of them.

use bytes::{Bytes, BytesMut};

use super::head::{parse_request, parse_response};
use super::parse::next_request;
use super::scan::Scan;
use super::*;

fn request(text: &str) -> Result<Option<Head>, HeadError> {
    next_request(&mut BytesMut::from(text.as_bytes()), &mut Scan::default(), MAX_HEADERS)
}

fn accepted(text: &str) -> Head {
    request(text).unwrap().unwrap()
}

fn response(text: &[u8], method: &str) -> Result<Head, HeadError> {
    parse_response(&mut BytesMut::from(text), method.as_bytes()).map(Option::unwrap)
}

fn written(head: &Head) -> String {
    let mut out = BytesMut::new();
    head.write(&mut out, false);
    String::from_utf8(out.to_vec()).unwrap()
}

#[test]
fn requests_with_two_readings_are_refused() {
    let post = |lines: &str| format!("POST / HTTP/1.1\r\nHost: a\r\n{lines}\r\n\r\n");
    for lines in [
        "Content-Length: 6\r\nTransfer-Encoding: chunked",
        "Content-Length: 6\r\nContent-Length: 6",
        "Content-Length: 6, 6",
        "Content-Length: +6",
        "Content-Length: -0",
        "Content-Length: 0x6",
        "Content-Length: 6 6",
        "Content-Length:",
        "Content-Length: 18446744073709551616",
        "Content-Length : 6",
        "Transfer-Encoding: xchunked",
        "Transfer-Encoding: \x0bchunked",
        "Transfer-Encoding: chunked;q=1",
        "Transfer-Encoding: ,chunked",
        "Transfer-Encoding: identity",
        "Transfer-Encoding: chunked, chunked",
        "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
        "Transfer-Encoding : chunked",
        "Transfer-Encoding\t: chunked",
        "X : y",
        " X: y",
        ": x",
        "X",
        "X: a\rb",
        "X: a\nY: b",
        "X: a\r\r\nY: b",
        "X: 1\r\n fold",
        "X: a\0b",
        "X y: a",
        "Host: b",
        "Host: a",
        "Connection: content-length",
        "Connection: close, x-forwarded-client-cert",
        "Expect: 100-continue, 200-ok",
        "Expect: x 100-Continue",
        "Expect: 100-continue\r\nExpect: 200-ok",
    ] {
        assert!(request(&post(lines)).is_err(), "{lines:?}");
    }
    for text in [
        "GET / HTTP/1.1\r\n\r\n",
        "GET / HTTP/1.1\nHost: a\n\n",
        "GET / HTTP/2.0\r\nHost: a\r\n\r\n",
        "GET  / HTTP/1.1\r\nHost: a\r\n\r\n",
        "GET /#x HTTP/1.1\r\nHost: a\r\n\r\n",
        "GET x HTTP/1.1\r\nHost: a\r\n\r\n",
        "GET http://b/ HTTP/1.1\r\nHost: a\r\n\r\n",
        "GET http://a/ HTTP/1.1\r\n\r\n",
        "CONNECT / HTTP/1.1\r\nHost: a\r\n\r\n",
        "CONNECT a:1 HTTP/1.1\r\nHost: b:1\r\n\r\n",
        "CONNECT a:1 HTTP/1.1\r\nHost: a:1\r\nContent-Length: 5\r\n\r\n",
        "CONNECT a:1 HTTP/1.1\r\nHost: a:1\r\nTransfer-Encoding: chunked\r\n\r\n",
        "* * HTTP/1.1\r\nHost: a\r\n\r\n",
        "POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n",
    ] {
        assert!(request(text).is_err(), "{text:?}");
    }
}

#[test]
fn responses_with_two_readings_are_refused() {
    for lines in [
        "Content-Length: 5\r\nContent-Length: 6",
        "Content-Length: 5\r\nContent-Length: 05",
        "Content-Length: 5, 5",
        "Content-Length: +5",
        "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
        "Transfer-Encoding: gzip, chunked",
        "Transfer-Encoding: identity, chunked",
        "Content-Length:\r\n 5",
        "Content-Length : 5\r\n\t",
        "Transfer-Encoding: chunked\r\n ,identity",
        "X\r\n : y",
        "X: a\r\n b\0",
        "X: a\r\n b\r\nX y: c",
        "X: a\0b",
        "X: a\nY: b",
        "X: a\rb",
        " X: y",
        ": x",
        " : x",
        "X\x0b: y",
        "X y : z",
        "X",
    ] {
        let text = format!("HTTP/1.1 200 OK\r\n{lines}\r\n\r\n");
        assert!(response(text.as_bytes(), "GET").is_err(), "{lines:?}");
    }
    for text in [
        "HTTP/1.1 200 OK\nContent-Length: 3\n\n",
        "HTTP/1.1 20 OK\r\n\r\n",
        "HTTP/2 200 OK\r\n\r\n",
        "\r\nHTTP/1.1 200 OK\r\n\r\n",
        "HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\n\r\n",
        "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n\r\n",
        "HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: h2c\r\n\r\n",
    ] {
        assert!(response(text.as_bytes(), "GET").is_err(), "{text:?}");
    }
}

#[test]
fn an_answer_that_is_not_http_is_refused_before_it_has_an_empty_line() {
    let begun = |text: &str| parse_response(&mut BytesMut::from(text.as_bytes()), b"GET");
    // vsftpd's greeting, an error of Redis, one of beanstalkd.
    for text in ["220 (vsFTPd 3.0.3)\r\n", "-ERR unknown command\r\n", "UNKNOWN_COMMAND", "HTTP/2"] {
        assert!(begun(text).is_err(), "{text:?}");
    }
    let head = "HTTP/1.1 200 OK\r\nX: y\r\n\r\n";
    for cut in 0..head.len() {
        assert_eq!(begun(&head[..cut]).map(|head| head.is_some()), Ok(false), "{cut}");
    }
}

/// What is sent on of a response that is a little off the standard.
#[test]
fn responses_with_one_reading_are_repaired() {
    let repaired = [
        ("HTTP/1.1 200 OK\r\nExpires : -1\r\n", "HTTP/1.1 200 OK\r\nExpires: -1\r\n"),
        ("HTTP/1.1 200 OK\r\nExpires \t : -1\r\n", "HTTP/1.1 200 OK\r\nExpires: -1\r\n"),
        ("HTTP/1.1 200 OK\r\nContent-Length : 3\r\n", "HTTP/1.1 200 OK\r\nContent-Length: 3\r\n"),
        (
            "HTTP/1.1 200 OK\r\nTransfer-Encoding : chunked\r\n",
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n",
        ),
        (
            "HTTP/1.1 200 OK\r\nContent-Length: 3\r\ncontent-length: 3\r\n",
            "HTTP/1.1 200 OK\r\nContent-Length: 3\r\n",
        ),
        ("HTTP/1.1 200\r\nContent-Length: 3\r\n", "HTTP/1.1 200 \r\nContent-Length: 3\r\n"),
        ("HTTP/1.1 200 \r\nContent-Length: 3\r\n", "HTTP/1.1 200 \r\nContent-Length: 3\r\n"),
        ("HTTP/1.1 200 OK\r\nX:\ty \r\n", "HTTP/1.1 200 OK\r\nX: y\r\n"),
        ("HTTP/1.1 200 OK\r\nX:\r\n", "HTTP/1.1 200 OK\r\nX: \r\n"),
        ("HTTP/1.1 204 No\r\nTransfer-Encoding: chunked\r\n", "HTTP/1.1 204 No\r\n"),
        ("HTTP/1.1 204 No\r\nContent-Length: 3\r\n", "HTTP/1.1 204 No\r\n"),
        ("HTTP/1.1 200 OK\r\nHost: a\r\nHost: b\r\n", "HTTP/1.1 200 OK\r\nHost: a\r\nHost: b\r\n"),
        ("HTTP/1.1 200 OK\r\nExpect: nothing\r\n", "HTTP/1.1 200 OK\r\n"),
        ("HTTP/1.1 200 OK\r\nUpgrade: h2,h2c\r\nConnection: Upgrade\r\n", "HTTP/1.1 200 OK\r\n"),
        (
            "HTTP/1.1 200 OK\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n",
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n",
        ),
        (
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: Identity\r\nContent-Length: 3\r\n",
            "HTTP/1.1 200 OK\r\nContent-Length: 3\r\n",
        ),
        ("HTTP/1.1 200 OK\r\nTransfer-Encoding: identity\r\n", "HTTP/1.1 200 OK\r\n"),
        (
            "HTTP/1.1 200 OK\r\nContent-Type: multipart/mixed;\r\n  boundary=x\r\nX: y\r\n",
            "HTTP/1.1 200 OK\r\nContent-Type: multipart/mixed; boundary=x\r\nX: y\r\n",
        ),
        (
            "HTTP/1.1 200 OK\r\nX:\r\n\ta\r\n \r\n Content-Length: 5\r\nContent-Length: 3\r\n",
            "HTTP/1.1 200 OK\r\nX: a  Content-Length: 5\r\nContent-Length: 3\r\n",
        ),
        ("HTTP/1.0 200 OK\r\nX: y\r\n", "HTTP/1.1 200 OK\r\nX: y\r\n"),
        (
            "HTTP/1.1 426 Upgrade Required\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nContent-Length: 0\r\n",
            "HTTP/1.1 426 Upgrade Required\r\nUpgrade: websocket\r\nContent-Length: 0\r\nConnection: upgrade\r\n",
        ),
    ];
    for (sent, passed_on) in repaired {
        let head = response(format!("{sent}\r\n").as_bytes(), "GET").expect(sent);
        assert_eq!(written(&head), format!("{passed_on}\r\n"));
    }
    let head = response(b"HTTP/1.1 200 OK\r\nX: \xe9t\xe9\r\n\r\n", "GET").unwrap();
    assert_eq!(head.header("x").unwrap(), &b"\xe9t\xe9"[..]);
    let text = b"HTTP/1.1 404 Non trouv\xe9\r\n\r\n";
    let mut out = BytesMut::new();
    response(text, "GET").unwrap().write(&mut out, false);
    assert_eq!(&out[..], text);
}

#[test]
fn what_a_request_expects_is_for_the_server_to_decide() {
    for (lines, passed_on, waits) in [
        ("Expect:\r\n", "", false),
        ("Expect: 200-ok\r\n", "Expect: 200-ok\r\n", false),
        ("expect: a, b=c\r\nExpect: d\r\n", "expect: a, b=c\r\nExpect: d\r\n", false),
        ("Expect: 100-Continue\r\n", "Expect: 100-continue\r\n", true),
        ("Expect:\r\nexpect: 100-continue\r\n", "Expect: 100-continue\r\n", true),
    ] {
        let head = accepted(&format!("GET / HTTP/1.1\r\nHost: a\r\n{lines}\r\n"));
        assert_eq!(head.expects_continue, waits, "{lines:?}");
        let text = written(&head);
        assert_eq!(text, format!("GET / HTTP/1.1\r\nHost: a\r\n{passed_on}\r\n"));
        // Through another sidecar nothing changes.
        let again = parse_request(&mut BytesMut::from(text.as_bytes())).unwrap().unwrap();
        assert_eq!(again, head);
    }
}

#[test]
fn nothing_is_read_behind_a_body_that_cannot_be() {
    for text in [
        "HTTP/1.1 204 No Content\r\nTransfer-Encoding: chunked\r\n\r\n",
        "HTTP/1.1 204 No Content\r\nContent-Length: 3\r\n\r\n",
        "HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nTransfer-Encoding: chunked\r\n\r\n",
        "HTTP/1.1 200 OK\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n",
        "HTTP/1.1 200 OK\r\nContent-Length: 3\r\nTransfer-Encoding: identity\r\n\r\n",
    ] {
        assert!(!response(text.as_bytes(), "GET").unwrap().keep_alive, "{text:?}");
    }
    assert!(response(b"HTTP/1.1 204 No Content\r\nContent-Length: 0\r\n\r\n", "GET").unwrap().keep_alive);
}

#[test]
fn hop_by_hop_and_nominated_fields_do_not_travel() {
    let head = accepted(
        "GET http://a/x HTTP/1.1\r\nHost: a\r\nConnection: X-Mine, keep-alive, Upgrade, HTTP2-Settings\r\nX-Mine: 1\r\nTE: trailers\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\nProxy-Connection: keep-alive\r\nProxy-Authorization: Basic dTpw\r\nX-Other: 2\r\n\r\n",
    );
    let names: Vec<&[u8]> = head.headers.iter().map(|(name, _)| &name[..]).collect();
    assert_eq!(names, [b"Host".as_slice(), b"Proxy-Authorization", b"X-Other"]);
    assert_eq!(head.request_line(), ("GET", "http://a/x"), "as it was sent");
    assert_eq!(head.path(), "/x");
    assert!(!head.upgrade);
}

#[test]
fn every_upgrade_but_that_to_http2_passes() {
    for (value, passed_on) in [
        ("websocket", Some("websocket")),
        ("tcp", Some("tcp")),
        ("SPDY/3.1", Some("SPDY/3.1")),
        ("WebSocket", Some("WebSocket")),
        ("foo/1 , bar", Some("foo/1 , bar")),
        ("h2c, websocket", Some("websocket")),
        ("websocket, H2C,tcp", Some("websocket, tcp")),
        ("h2c", None),
        ("", None),
        (",", None),
    ] {
        for body in ["", "Content-Length: 5\r\n", "Transfer-Encoding: chunked\r\n"] {
            let lines = format!("Host: a\r\nConnection: Upgrade\r\nUpgrade: {value}\r\n{body}");
            let head = accepted(&format!("POST / HTTP/1.1\r\n{lines}\r\n"));
            assert_eq!(head.upgrade, passed_on.is_some(), "{value:?}");
            assert_eq!(head.framing != Framing::None, !body.is_empty(), "its body goes first");
            let line = passed_on.map(|value| format!("Upgrade: {value}\r\n"));
            let text = written(&head);
            assert_eq!(text.contains("Connection: upgrade\r\n"), passed_on.is_some(), "{text}");
            assert!(line.is_none_or(|line| text.contains(&line)), "{text}");
            // Through another sidecar nothing changes.
            let again = parse_request(&mut BytesMut::from(text.as_bytes())).unwrap().unwrap();
            assert_eq!(again, head);
        }
    }
    let two = "GET / HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: a\r\nUpgrade: b\r\n\r\n";
    assert_eq!(accepted(two).header("upgrade").unwrap(), "a, b");
    for text in [
        "GET / HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\n\r\n",
        "GET / HTTP/1.0\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n",
    ] {
        let head = accepted(text);
        assert!(!head.upgrade && head.header("upgrade").is_none(), "{text:?}");
    }
}

#[test]
fn an_upgrade_that_is_given_up_is_an_ordinary_request() {
    let text = "GET / HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: tcp\r\nTransfer-Encoding: chunked\r\n\r\n";
    let head = Head { upgrade: false, ..accepted(text) };
    assert_eq!(written(&head), "GET / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n");
}

#[test]
fn connect_passes_as_sent_and_a_success_makes_it_a_tunnel() {
    for text in [
        "CONNECT httpbin.org:443 HTTP/1.1\r\nHost: httpbin.org:443\r\n\r\n",
        "CONNECT 10.0.0.1:443 HTTP/1.1\r\nHost: 10.0.0.1\r\nProxy-Authorization: Basic dTpw\r\n\r\n",
        "CONNECT a:443 HTTP/1.1\r\n\r\n",
        "CONNECT a:443 HTTP/1.0\r\n\r\n",
    ] {
        let head = accepted(text);
        assert!(head.upgrade && head.is_connect() && head.framing == Framing::None);
        assert_eq!(written(&head), text);
        assert_eq!(head.path(), "");
    }
    let asked = accepted("CONNECT a:443 HTTP/1.1\r\nHost: a:443\r\nContent-Length: 0\r\n\r\n");
    for lines in [
        "",
        "Content-Length: 5\r\n",
        "Transfer-Encoding: chunked\r\n",
        "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n",
    ] {
        let text = format!("HTTP/1.1 200 Connection established\r\n{lines}\r\n");
        let head = response(text.as_bytes(), "CONNECT").unwrap();
        assert_eq!((head.framing, head.keep_alive), (Framing::None, false));
        assert_eq!(head.opens_tunnel(&asked), Ok(true));
        assert_eq!(written(&head), "HTTP/1.1 200 Connection established\r\n\r\n");
    }
    let refused = response(b"HTTP/1.1 407 Who\r\nContent-Length: 3\r\n\r\n", "CONNECT").unwrap();
    assert_eq!((refused.framing, refused.opens_tunnel(&asked)), (Framing::Length(3), Ok(false)));
}

#[test]
fn a_101_opens_a_tunnel_only_where_it_was_asked_for() {
    let text = b"HTTP/1.1 101 UPGRADED\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\r\n";
    let switched = response(text, "POST").unwrap();
    assert_eq!(written(&switched), "HTTP/1.1 101 UPGRADED\r\nUpgrade: tcp\r\nConnection: upgrade\r\n\r\n");
    let asked = accepted("GET / HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: tcp\r\n\r\n");
    assert_eq!(switched.opens_tunnel(&asked), Ok(true));
    for text in ["GET / HTTP/1.1\r\nHost: a\r\n\r\n", "CONNECT a:1 HTTP/1.1\r\nHost: a:1\r\n\r\n"] {
        assert!(switched.opens_tunnel(&accepted(text)).is_err(), "{text:?}");
    }
    let ok = response(b"HTTP/1.1 200 OK\r\n\r\n", "GET").unwrap();
    assert_eq!(ok.opens_tunnel(&asked), Ok(false));
}

#[test]
fn a_head_is_read_only_when_it_is_whole_and_never_beyond_its_limits() {
    assert_eq!(request("GET / HTTP/1.1\r\nHost: a\r\n"), Ok(None));
    let long = format!("GET / HTTP/1.1\r\nHost: a\r\nX: {}", "x".repeat(MAX_HEAD));
    assert_eq!(request(&long), Err(HeadError::TOO_LONG));
    let lines = |count: usize| format!("GET / HTTP/1.1\r\nHost: a\r\n{}\r\n", "X: y\r\n".repeat(count - 1));
    assert!(request(&lines(MAX_HEADERS)).is_ok());
    assert_eq!(request(&lines(MAX_HEADERS + 1)), Err(HeadError::TOO_MANY));
    assert_eq!(request(&lines(MAX_LINES + 1)), Err(HeadError::TOO_MANY));
    assert!(HeadError::TOO_LONG.is_too_large() && HeadError::TOO_MANY.is_too_large());
    assert!(!HeadError("a bare line feed").is_too_large());
}

/// A head at every limit at once, of the kind that grows most when it is written anew.
#[test]
fn the_largest_head_passes_another_sidecar() {
    let mut text = String::from(
        "POST / HTTP/1.1\r\nHost:a\r\nContent-Length:3\r\nConnection:upgrade\r\nUpgrade:tcp\r\n",
    );
    text.push_str(&"X:y\r\n".repeat(MAX_HEADERS - 5));
    let left = MAX_HEAD - text.len() - "Z:\r\n\r\n".len();
    text.push_str(&format!("Z:{}\r\n\r\n", "z".repeat(left)));
    assert_eq!(text.len(), MAX_HEAD);
    let mut head = accepted(&text);
    head.push("tulle-client-id", Bytes::from("s".repeat(255)));
    let text = written(&head);
    assert!(text.len() > MAX_HEAD);
    assert_eq!(
        parse_request(&mut BytesMut::from(text.as_bytes())).unwrap().unwrap().headers.len(),
        head.headers.len()
    );
}

#[test]
fn the_framing_of_answers_follows_method_and_status() {
    let of = |text: &str, method: &str| response(text.as_bytes(), method).unwrap().framing;
    assert_eq!(of("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n", "GET"), Framing::Length(5));
    assert_eq!(of("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n", "HEAD"), Framing::None);
    assert_eq!(of("HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\n", "GET"), Framing::None);
    assert_eq!(of("HTTP/1.1 204 No Content\r\n\r\n", "GET"), Framing::None);
    assert_eq!(of("HTTP/1.0 200 OK\r\n\r\n", "GET"), Framing::UntilClose);
    let head = response(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n", "HEAD").unwrap();
    assert_eq!(head.header("content-length").unwrap(), "5");
    assert!(written(&head).contains("Content-Length: 5\r\n"));
    let both = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n";
    assert!(response(both, "HEAD").unwrap().header("content-length").is_none());
}

#[test]
fn clients_of_http_1_0_are_served_one_request_per_connection() {
    let head = accepted("GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n");
    assert!(head.http10 && !head.keep_alive);
    assert_eq!(written(&head), "GET / HTTP/1.0\r\n\r\n");
    let kept = |lines: &str| {
        let text = format!("HTTP/1.0 200 OK\r\n{lines}Content-Length: 0\r\n\r\n");
        response(text.as_bytes(), "GET").unwrap().keep_alive
    };
    assert!(!kept("") && kept("Connection: keep-alive\r\n"));
    assert!(!kept("Connection: keep-alive, close\r\n"));
}

#[test]
fn a_head_that_is_written_reads_back_the_same() {
    let text = "POST /a?b=c HTTP/1.1\r\nHost: a\r\nX-Case: Kept\r\nContent-Length: 3\r\n\r\n";
    assert_eq!(written(&accepted(text)), text);
    for (number, digits) in [(0, "0"), (10, "10"), (u64::MAX, "18446744073709551615")] {
        let mut out = BytesMut::new();
        model::put_number(&mut out, number, 10);
        assert_eq!(&out[..], digits.as_bytes());
    }
}
