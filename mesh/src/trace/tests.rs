use proptest::prelude::*;

use super::*;

const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
const SPAN: &str = "b7ad6b7169203331";
const MINE: SpanId = [1, 2, 3, 4, 5, 6, 7, 8];
const MY_SPAN: &str = "0102030405060708";

fn trace_id() -> TraceId {
    hex(TRACE.as_bytes()).unwrap()
}

fn span_id() -> SpanId {
    hex(SPAN.as_bytes()).unwrap()
}

fn read(lines: &[(&str, &str)]) -> Option<TraceContext> {
    Lines::of(lines.iter().map(|(name, value)| (name.as_bytes(), value.as_bytes()))).context()
}

fn never() -> TraceId {
    panic!("no trace begins here")
}

/// What goes on of a request with these lines, whose parent alone decides; `None`: they stay as they are.
fn forwarded(lines: &[(&str, &str)]) -> Option<Rewritten> {
    let recorded = decide(read(lines).as_ref(), Share::NONE, trace_id)?;
    Some(recorded.lines(&MINE))
}

fn set(lines: &[(&'static str, &str)]) -> Vec<(&'static str, String)> {
    lines.iter().map(|(name, value)| (*name, (*value).to_owned())).collect()
}

#[test]
fn a_valid_traceparent_is_read_whatever_follows_it_in_later_versions() {
    for (text, sampled, random) in [
        (format!("00-{TRACE}-{SPAN}-00"), false, false),
        (format!("00-{TRACE}-{SPAN}-01"), true, false),
        (format!("00-{TRACE}-{SPAN}-02"), false, true),
        (format!("00-{TRACE}-{SPAN}-03"), true, true),
        // Flags that nobody knows yet.
        (format!("00-{TRACE}-{SPAN}-ff"), true, true),
        (format!("00-{TRACE}-{SPAN}-fc"), false, false),
        (format!("cc-{TRACE}-{SPAN}-01"), true, false),
        (format!("01-{TRACE}-{SPAN}-01-what-the-future-will-be-like"), true, false),
        (format!("cc-{TRACE}-{SPAN}-00-"), false, false),
    ] {
        let context = parse_traceparent(text.as_bytes()).unwrap_or_else(|| panic!("{text}"));
        assert_eq!(context.ids, Some((trace_id(), span_id())), "{text}");
        assert_eq!((context.sampled, context.random), (Some(sampled), random), "{text}");
        assert_eq!(context.form, Form::W3c);
    }
}

#[test]
fn an_invalid_traceparent_is_none() {
    let upper = TRACE.to_uppercase();
    for text in [
        String::new(),
        "00".to_owned(),
        // The version that does not exist, and versions that are no bytes.
        format!("ff-{TRACE}-{SPAN}-01"),
        format!("0-{TRACE}-{SPAN}-01"),
        format!(".0-{TRACE}-{SPAN}-01"),
        format!("CC-{TRACE}-{SPAN}-01"),
        // 00 has nothing behind its flags.
        format!("00-{TRACE}-{SPAN}-01-"),
        format!("00-{TRACE}-{SPAN}-01-more"),
        format!("00-{TRACE}-{SPAN}-01 "),
        format!("cc-{TRACE}-{SPAN}-01.more"),
        format!("cc-{TRACE}-{SPAN}-011"),
        // Ids that are zero, too short, too long, or not in lower case.
        format!("00-{}-{SPAN}-01", "0".repeat(32)),
        format!("00-{TRACE}-{}-01", "0".repeat(16)),
        format!("00-{}-{SPAN}-01", &TRACE[1..]),
        format!("00-{TRACE}a-{SPAN}-01"),
        format!("00-{TRACE}-{}-01", &SPAN[1..]),
        format!("00-{upper}-{SPAN}-01"),
        format!("00-{}g-{SPAN}-01", &TRACE[1..]),
        // Flags that are no byte.
        format!("00-{TRACE}-{SPAN}-1"),
        format!("00-{TRACE}-{SPAN}-0x"),
        format!("00-{TRACE}-{SPAN}"),
        format!("00_{TRACE}-{SPAN}-01"),
        format!("00-{TRACE}_{SPAN}-01"),
        format!("00-{TRACE}-{SPAN}_01"),
        format!(" 00-{TRACE}-{SPAN}-01"),
    ] {
        assert_eq!(parse_traceparent(text.as_bytes()), None, "{text:?}");
    }
}

#[test]
fn a_traceparent_that_came_twice_is_none_and_its_name_has_no_case() {
    let text = format!("00-{TRACE}-{SPAN}-01");
    assert_eq!(read(&[("traceparent", &text), ("TraceParent", &text)]), None);
    assert!(read(&[("TraceParent", &text), ("host", "shop")]).is_some());
}

#[test]
fn b3_is_read_in_one_line_and_in_many() {
    let ids = Some((trace_id(), span_id()));
    for (text, ids, sampled, debug) in [
        (format!("{TRACE}-{SPAN}-1"), ids, Some(true), false),
        (format!("{TRACE}-{SPAN}-0"), ids, Some(false), false),
        (format!("{TRACE}-{SPAN}-d"), ids, Some(true), true),
        (format!("{TRACE}-{SPAN}"), ids, None, false),
        (format!("{TRACE}-{SPAN}-1-05e3ac9a4f6e3b90"), ids, Some(true), false),
        ("0".to_owned(), None, Some(false), false),
        ("1".to_owned(), None, Some(true), false),
        ("d".to_owned(), None, Some(true), true),
    ] {
        let context = parse_b3(text.as_bytes()).unwrap_or_else(|| panic!("{text}"));
        assert_eq!((context.ids, context.sampled, context.debug), (ids, sampled, debug), "{text}");
    }
    let (trace, span) = (("X-B3-TraceId", TRACE), ("X-B3-SpanId", SPAN));
    for (lines, ids, sampled, debug) in [
        (vec![trace, span, ("X-B3-Sampled", "1")], ids, Some(true), false),
        (vec![trace, span, ("X-B3-Sampled", "0")], ids, Some(false), false),
        (vec![trace, span, ("x-b3-sampled", "true")], ids, Some(true), false),
        (vec![trace, span, ("x-b3-sampled", "false")], ids, Some(false), false),
        (vec![trace, span, ("X-B3-Flags", "1")], ids, Some(true), true),
        (vec![trace, span, ("X-B3-Flags", "0")], ids, None, false),
        (vec![trace, span], ids, None, false),
        (vec![("X-B3-Sampled", "0")], None, Some(false), false),
    ] {
        let context = read(&lines).unwrap_or_else(|| panic!("{lines:?}"));
        assert_eq!((context.ids, context.sampled, context.debug), (ids, sampled, debug), "{lines:?}");
        assert_eq!(context.form, Form::B3Multi);
    }
}

#[test]
fn invalid_b3_is_none() {
    for text in [
        String::new(),
        "2".to_owned(),
        "-".to_owned(),
        TRACE.to_owned(),
        format!("{TRACE}-"),
        format!("{TRACE}-{SPAN}-x"),
        format!("{TRACE}-{SPAN}-"),
        format!("{TRACE}-{SPAN}-1-zz"),
        format!("{TRACE}-{SPAN}-1-{SPAN}-more"),
        format!("{}-{SPAN}-1", "0".repeat(16)),
        format!("{}-{SPAN}-1", &TRACE[1..]),
        format!("{TRACE}-{}-1", "0".repeat(16)),
    ] {
        assert_eq!(parse_b3(text.as_bytes()), None, "{text:?}");
    }
    for lines in [
        vec![("X-B3-TraceId", TRACE), ("X-B3-Sampled", "1")],
        vec![("X-B3-SpanId", SPAN), ("X-B3-Sampled", "1")],
        vec![("X-B3-TraceId", TRACE), ("X-B3-SpanId", "1"), ("X-B3-Sampled", "1")],
        vec![("X-B3-TraceId", TRACE), ("X-B3-SpanId", SPAN), ("X-B3-Sampled", "yes")],
        vec![("X-B3-TraceId", TRACE), ("X-B3-TraceId", TRACE), ("X-B3-SpanId", SPAN)],
        vec![("X-B3-Flags", "0")],
    ] {
        assert_eq!(read(&lines), None, "{lines:?}");
    }
}

#[test]
fn w3c_goes_before_b3_and_an_invalid_one_makes_room_for_the_next() {
    let (w3c, b3) = (format!("00-{TRACE}-{SPAN}-01"), format!("{TRACE}-{SPAN}-1"));
    let multi = [("X-B3-TraceId", TRACE), ("X-B3-SpanId", SPAN)];
    let form = |lines: &[(&str, &str)]| read(&[lines, &multi].concat()).unwrap().form;
    assert_eq!(form(&[("traceparent", &w3c), ("b3", &b3)]), Form::W3c);
    assert_eq!(form(&[("traceparent", "00-zero"), ("b3", &b3)]), Form::B3Single);
    assert_eq!(form(&[("traceparent", "00-zero"), ("b3", "x")]), Form::B3Multi);
}

#[test]
fn what_a_parent_has_decided_holds_at_every_share() {
    for share in [Share::NONE, Share::of_fraction(0.5), Share::ALL] {
        for (flags, recorded) in [("00", false), ("01", true), ("02", false), ("03", true)] {
            let context = parse_traceparent(format!("00-{TRACE}-{SPAN}-{flags}").as_bytes());
            assert_eq!(decide(context.as_ref(), share, never).is_some(), recorded, "{flags}");
        }
        for (state, recorded) in [("0", false), ("1", true), ("d", true)] {
            let context = parse_b3(format!("{TRACE}-{SPAN}-{state}").as_bytes());
            assert_eq!(decide(context.as_ref(), share, never).is_some(), recorded, "{state}");
        }
        assert_eq!(decide(parse_b3(b"0").as_ref(), share, never), None, "a decision without ids is one");
    }
}

#[test]
fn a_decision_that_b3_leaves_open_is_made_by_the_id_and_alike_everywhere() {
    let open = parse_b3(format!("{TRACE}-{SPAN}").as_bytes());
    assert_eq!(decide(open.as_ref(), Share::NONE, never), None);
    let joined = decide(open.as_ref(), Share::ALL, never).unwrap();
    assert_eq!((joined.trace_id, joined.parent_id), (trace_id(), Some(span_id())));
    // Its last seven bytes are 48eb211c80319c, 28 % of all.
    assert_eq!(decide(open.as_ref(), Share::of_fraction(0.7), never), None);
    assert!(decide(open.as_ref(), Share::of_fraction(0.73), never).is_some());
}

#[test]
fn a_request_without_a_parent_begins_a_trace_by_the_last_seven_bytes_of_its_id() {
    let of = |low: u64| u128::from(low).to_be_bytes();
    let threshold = ALL_IDS - Share::of_fraction(0.01).ids();
    let begins = |share, low| decide(None, share, || of(low)).is_some();
    assert!(!begins(Share::of_fraction(0.01), threshold - 1));
    assert!(begins(Share::of_fraction(0.01), threshold));
    assert!(begins(Share::of_fraction(0.01), u64::MAX), "the eighth byte does not count");
    assert!(!begins(Share::of_fraction(0.01), 0xff << 56));
    assert!(begins(Share::ALL, 1));
    assert_eq!(decide(None, Share::NONE, never), None, "not even an id is made");
}

#[test]
fn a_trace_that_begins_here_says_by_which_threshold_and_takes_no_state_over() {
    for (share, threshold) in
        [(Share::ALL, "0"), (Share::of_fraction(0.5), "8"), (Share::of_fraction(0.25), "c")]
    {
        let root = decide(None, share, || [0xff; 16]).unwrap();
        let lines = root.lines(&MINE).set;
        let traceparent = format!("00-{}-{MY_SPAN}-03", "f".repeat(32));
        let tracestate = format!("ot=th:{threshold}");
        assert_eq!(lines, set(&[("traceparent", &traceparent), ("tracestate", &tracestate)]));
    }
}

#[test]
fn a_parent_that_is_not_recorded_goes_on_untouched() {
    let (w3c, b3) = (format!("00-{TRACE}-{SPAN}-02"), format!("{TRACE}-{SPAN}-0"));
    for lines in [
        vec![("traceparent", w3c.as_str()), ("tracestate", "a=1")],
        vec![("traceparent", "nonsense"), ("tracestate", "a=1")],
        vec![("b3", b3.as_str())],
        vec![("b3", "0")],
        vec![("X-B3-Sampled", "0")],
        vec![("host", "shop")],
    ] {
        assert_eq!(forwarded(&lines), None, "{lines:?}");
    }
}

#[test]
fn w3c_goes_on_as_version_00_with_the_random_flag_and_no_other_that_came() {
    for (came, goes) in [("00", "01"), ("cc", "01")] {
        let text = format!("{came}-{TRACE}-{SPAN}-01");
        let rewritten = forwarded(&[("traceparent", &text), ("tracestate", "a=1")]).unwrap();
        let expected = format!("00-{TRACE}-{MY_SPAN}-{goes}");
        assert_eq!(rewritten.set, set(&[("traceparent", &expected)]), "tracestate stays");
        assert!(rewritten.removed.is_empty());
    }
    let text = format!("00-{TRACE}-{SPAN}-ff");
    let expected = format!("00-{TRACE}-{MY_SPAN}-03");
    assert_eq!(forwarded(&[("traceparent", &text)]).unwrap().set, set(&[("traceparent", &expected)]));
}

#[test]
fn b3_goes_on_in_the_form_in_which_it_came() {
    for (state, goes) in [("1", "1"), ("d", "d"), ("1-05e3ac9a4f6e3b90", "1")] {
        let rewritten = forwarded(&[("b3", &format!("{TRACE}-{SPAN}-{state}"))]).unwrap();
        assert_eq!(rewritten.set, set(&[("b3", &format!("{TRACE}-{MY_SPAN}-{goes}"))]));
    }
    let rewritten = forwarded(&[("b3", &format!("{SPAN}-{SPAN}-1"))]).unwrap();
    assert_eq!(rewritten.set, set(&[("b3", &format!("{SPAN}-{MY_SPAN}-1"))]), "64 bits stay 64 bits");
    let rewritten = forwarded(&[("b3", "1")]).unwrap();
    assert_eq!(rewritten.set, set(&[("b3", &format!("{TRACE}-{MY_SPAN}-1"))]), "the trace begins here");

    let ids = [("X-B3-TraceId", TRACE), ("X-B3-SpanId", SPAN), ("X-B3-ParentSpanId", SPAN)];
    let rewritten = forwarded(&[&ids[..], &[("X-B3-Sampled", "true")]].concat()).unwrap();
    let mine = [("x-b3-traceid", TRACE), ("x-b3-spanid", MY_SPAN)];
    assert_eq!(rewritten.set, set(&[&mine[..], &[("x-b3-sampled", "1")]].concat()));
    assert_eq!(rewritten.removed, ["x-b3-parentspanid"]);
    let rewritten = forwarded(&[&ids[..], &[("X-B3-Flags", "1")]].concat()).unwrap();
    assert_eq!(rewritten.set, set(&[&mine[..], &[("x-b3-flags", "1")]].concat()));
    assert_eq!(rewritten.removed, ["x-b3-parentspanid", "x-b3-sampled"]);
}

#[test]
fn a_share_is_a_number_between_none_and_all() {
    assert_eq!(Share::of_fraction(0.0), Share::NONE);
    assert_eq!(Share::of_fraction(1.0), Share::ALL);
    assert_eq!(Share::of_fraction(7.0), Share::ALL);
    assert_eq!(Share::of_fraction(-1.0), Share::NONE);
    assert_eq!(Share::of_fraction(f64::NAN), Share::NONE);
    assert_eq!(Share::new(u64::MAX), Share::ALL);
}

proptest! {
    #[test]
    fn no_bytes_make_the_parsers_panic(
        lines in proptest::collection::vec(
            (
                proptest::sample::select(vec![
                    "traceparent", "b3", "x-b3-traceid", "x-b3-spanid", "x-b3-sampled", "x-b3-flags", "host",
                ]),
                proptest::collection::vec(any::<u8>(), 0..80),
            ),
            0..8,
        ),
        share: u64,
    ) {
        let lines = lines.iter().map(|(name, value)| (name.as_bytes(), value.as_slice()));
        let context = Lines::of(lines).context();
        if let Some(recorded) = decide(context.as_ref(), Share::new(share), || [7; 16]) {
            recorded.lines(&MINE);
        }
    }

    #[test]
    fn what_is_written_is_read_as_the_same(
        trace: [u8; 16], span: [u8; 8], random: bool, debug: bool, short: bool, form in 0..3usize,
    ) {
        prop_assume!(span != [0; 8] && trace[8..] != [0; 8]);
        let form = [Form::W3c, Form::B3Single, Form::B3Multi][form];
        let (debug, short) = (debug && form != Form::W3c, short && form != Form::W3c);
        let mut trace_id = trace;
        if short {
            trace_id[..8].fill(0);
        }
        let random = random && form == Form::W3c;
        let recorded = Recorded { trace_id, parent_id: None, debug, random, short, form, root: None };
        let written = recorded.lines(&span).set;
        let context = Lines::of(written.iter().map(|(name, value)| (name.as_bytes(), value.as_bytes())));
        let expected = TraceContext { ids: Some((trace_id, span)), sampled: Some(true), debug, random, short, form };
        prop_assert_eq!(context.context(), Some(expected));
    }
}
