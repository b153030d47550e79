//! What a stream counts.

use tulle_mesh::wire::CONNECTION_GROWTH;

use super::*;

#[test]
fn a_stream_that_moves_little_for_long_never_carries_bulk() {
    let state = StreamState::shared(false);
    let mut state = state.borrow_mut();
    for second in 0..3_600 {
        assert!(!state.moved(QUIET - 1), "after {second} s");
        assert!(!state.tick(false));
    }
    // What moves more does, until it is quiet again.
    while !state.moved(QUIET) {
        assert!(!state.tick(false));
    }
    assert!(!state.tick(false) && state.tick(false));
}

#[test]
fn a_quiet_stream_gives_its_window_back_as_it_is_read() {
    let state = StreamState::shared(false);
    let mut state = state.borrow_mut();
    let mut growth = CONNECTION_GROWTH;
    while state.window < MAX_STREAM_CREDIT {
        state.grant(STREAM_CREDIT, &mut growth);
    }
    state.tick(false);
    assert_ne!(state.grant(MAX_STREAM_CREDIT / 2, &mut growth), 0, "nobody else needs it");
    state.tick(true);
    assert_eq!(state.grant(STREAM_CREDIT, &mut growth), 0);
    assert_eq!(state.window, MAX_STREAM_CREDIT - STREAM_CREDIT);
    for _ in 0..6 {
        state.grant(STREAM_CREDIT, &mut growth);
    }
    assert_eq!((state.window, growth), (STREAM_CREDIT, CONNECTION_GROWTH));
}

#[test]
fn an_answer_has_begun_when_another_head_is_behind_an_interim_one() {
    let state = StreamState::shared(false);
    let mut state = state.borrow_mut();
    for has_another in [false, true] {
        state.push(Event::Head(Bytes::from_static(b"interim")));
        if has_another {
            state.push(Event::Head(Bytes::from_static(b"final")));
        }
        assert!(state.pop().is_some());
        state.was_interim();
        assert_eq!(state.is_answered(), has_another);
    }
}
