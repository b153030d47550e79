//! Peers that may be gone, and may come back.

use super::*;

/// Says something to whoever waits for the answer to a ping.
async fn answer_ping(peer: &mut DuplexStream) {
    let mut answer = BytesMut::new();
    frame::encode(&mut answer, Kind::Ping, frame::ACK, 0, b"tulle/1?");
    peer.write_all(&answer).await.unwrap();
}

/// A client's connection with one stream whose answer has begun, and one that waits for it.
async fn with_two_streams() -> (DuplexStream, Connection, [(Sender, Receiver); 2]) {
    let (mut peer, client, _driver) = raw_peer(Role::Client, 1 << 20);
    let (sender, mut receiver) = client.open(b"opaque", false).unwrap();
    let waiting = client.open(b"request", true).unwrap();
    let mut head = BytesMut::new();
    frame::encode(&mut head, Kind::Head, 0, 1, b"taken");
    peer.write_all(&head).await.unwrap();
    assert_eq!(receiver.next().await, Event::Head(Bytes::from_static(b"taken")));
    (peer, client, [(sender, receiver), waiting])
}

#[test]
fn an_outage_ends_requests_that_wait_and_not_what_has_begun() {
    paused(async {
        let (mut peer, client, [(sender, mut begun), (_sender, mut waiting)]) = with_two_streams().await;
        let since = Instant::now();
        assert_eq!(waiting.next().await, Event::Lost);
        assert!((8..11).contains(&since.elapsed().as_secs()), "{:?}", since.elapsed());
        assert!(!client.takes_streams(), "a new request does not go where the last one was lost");
        sleep(Duration::from_secs(35)).await;
        assert!(!client.is_closed());
        answer_ping(&mut peer).await;
        let mut more = BytesMut::new();
        frame::encode(&mut more, Kind::Data, 0, 1, b"more");
        peer.write_all(&more).await.unwrap();
        assert_eq!(begun.next().await, Event::Data(Bytes::from_static(b"more")));
        sender.data(Bytes::from_static(b"on we go")).await.unwrap();
        assert!(client.takes_streams());
        // The peer is told that nobody waits for the other any more.
        let mut read = BytesMut::new();
        let reset = loop {
            let frame = next_frame(&mut peer, &mut read).await;
            if frame.kind == Kind::Reset {
                break frame;
            }
        };
        assert_eq!((reset.stream, &*reset.payload), (3, &Code::Cancel.to_u32().to_be_bytes()[..]));
    });
}

#[test]
fn what_has_begun_ends_when_the_peer_stays_silent() {
    paused(async {
        let (_peer, client, [(_sender, mut begun), _waiting]) = with_two_streams().await;
        let since = Instant::now();
        assert_eq!(begun.next().await, Event::Lost);
        assert!((60..68).contains(&since.elapsed().as_secs()), "{:?}", since.elapsed());
        assert!(client.is_closed());
    });
}

#[test]
fn a_server_keeps_what_it_has_answered_through_an_outage() {
    paused(async {
        let (mut peer, server, _driver) = raw_peer(Role::Server, 1 << 20);
        let mut open = BytesMut::new();
        frame::encode(&mut open, Kind::Open, 0, 1, b"opaque");
        frame::encode(&mut open, Kind::Open, 0, 3, b"request");
        peer.write_all(&open).await.unwrap();
        let (_, sender, mut begun) = accept(&server).await;
        let (_, _sender, mut waiting) = accept(&server).await;
        sender.head(b"taken", false);
        assert_eq!(waiting.next().await, Event::Lost);
        sleep(Duration::from_secs(30)).await;
        let mut data = BytesMut::new();
        frame::encode(&mut data, Kind::Data, frame::END, 1, b"back");
        // Of a stream that is not there any more: no fault of the peer.
        frame::encode(&mut data, Kind::Data, frame::END, 3, b"late");
        peer.write_all(&data).await.unwrap();
        assert_eq!(begun.next().await, Event::Data(Bytes::from_static(b"back")));
        assert_eq!(begun.next().await, Event::End);
        assert!(!server.is_closed());
    });
}

#[test]
fn a_server_keeps_what_nobody_has_looked_at_through_an_outage() {
    paused(async {
        let (mut peer, server, _driver) = raw_peer(Role::Server, 1 << 20);
        let mut open = BytesMut::new();
        for (flags, stream) in [(0, 1), (0, 3), (frame::MORE, 5)] {
            frame::encode(&mut open, Kind::Open, flags, stream, b"head");
        }
        peer.write_all(&open).await.unwrap();
        let (_, sender, _begun) = accept(&server).await;
        sender.head(b"taken", false);
        sleep(Duration::from_secs(30)).await;
        let mut rest = BytesMut::new();
        frame::encode(&mut rest, Kind::Open, 0, 5, b", whole");
        peer.write_all(&rest).await.unwrap();
        for expected in [&b"head"[..], b"head, whole"] {
            let (head, _sender, mut receiver) = accept(&server).await;
            assert_eq!(&head[..], expected);
            assert!(timeout(Duration::from_millis(100), receiver.next()).await.is_err(), "it is not lost");
        }
        assert!(!server.is_closed());
    });
}

#[test]
fn an_interim_head_is_not_yet_an_answer() {
    paused(async {
        let (mut peer, client, [_begun, (_sender, mut waiting)]) = with_two_streams().await;
        let mut head = BytesMut::new();
        frame::encode(&mut head, Kind::Head, 0, 3, b"interim");
        peer.write_all(&head).await.unwrap();
        assert_eq!(waiting.next().await, Event::Head(Bytes::from_static(b"interim")));
        waiting.was_interim();
        let since = Instant::now();
        assert_eq!(waiting.next().await, Event::Lost);
        assert!((8..11).contains(&since.elapsed().as_secs()), "{:?}", since.elapsed());
        assert!(!client.is_closed());
    });
}
