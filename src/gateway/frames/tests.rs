//! Tests of the messages between gateway and agent.

use proptest::prelude::*;

use super::*;

fn number() -> impl Strategy<Value = FrameNumber> {
    prop_oneof![0..300u64, any::<u64>()].prop_map(FrameNumber)
}

fn frame() -> impl Strategy<Value = (NetworkPort, FrameNumber, Bytes)> {
    let bytes = proptest::collection::vec(any::<u8>(), 0..=MAX_FRAME);
    (any::<u32>(), any::<u32>(), number(), bytes)
        .prop_map(|(vm, index, number, bytes)| (NetworkPort { vm, index }, number, bytes.into()))
}

fn to_agent() -> impl Strategy<Value = ToAgent> {
    prop_oneof![
        ("[a-z][a-z0-9-]{0,30}", any::<u64>(), any::<u64>(), number()).prop_map(
            |(vm, gateway, term, received)| ToAgent::Hello(Hello {
                vm: VmName::new(&vm).expect("a name"),
                gateway: GatewayIncarnation(gateway),
                address: Ipv4Addr::from(gateway as u32),
                term: Term(term),
                received,
            })
        ),
        frame().prop_map(|(port, number, bytes)| ToAgent::Frame {
            port,
            number,
            bytes
        }),
        number().prop_map(|through| ToAgent::Received { through }),
    ]
}

fn to_gateway() -> impl Strategy<Value = ToGateway> {
    prop_oneof![
        (any::<u64>(), any::<[u8; 16]>(), number()).prop_map(|(term, boot, logged)| {
            ToGateway::Welcome {
                term: Term(term),
                boot: Boot(boot),
                logged,
            }
        }),
        (any::<u64>(), 1..=4u8).prop_map(|(term, code)| ToGateway::Refused {
            term: Term(term),
            why: Refusal::from_code(code).expect("1 to 4 are refusals"),
        }),
        frame().prop_map(|(port, number, bytes)| ToGateway::Frame {
            port,
            number,
            bytes
        }),
        number().prop_map(|through| ToGateway::Committed { through }),
    ]
}

/// Writes all messages, then feeds the bytes in pieces and collects what comes out.
fn through_pieces<M: Message>(messages: &[M], piece: usize) -> Vec<M> {
    let mut written = BytesMut::new();
    for message in messages {
        message.encode(&mut written);
    }
    let mut read = BytesMut::new();
    let mut found = Vec::new();
    for part in written.chunks(piece) {
        read.extend_from_slice(part);
        while let Some(message) = M::decode(&mut read).expect("what was encoded decodes") {
            found.push(message);
        }
    }
    assert!(read.is_empty(), "bytes are left over");
    found
}

proptest! {
    #[test]
    fn messages_survive_any_division_of_the_stream(
        up in proptest::collection::vec(to_agent(), 0..6),
        down in proptest::collection::vec(to_gateway(), 0..6),
        piece in 1..3_000usize,
    ) {
        prop_assert_eq!(&through_pieces(&up, piece), &up);
        prop_assert_eq!(&through_pieces(&down, piece), &down);
    }

    #[test]
    fn garbage_is_refused_or_waits_for_more(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let mut up = BytesMut::from(&bytes[..]);
        while let Ok(Some(_)) = ToAgent::decode(&mut up) {}
        let mut down = BytesMut::from(&bytes[..]);
        while let Ok(Some(_)) = ToGateway::decode(&mut down) {}
    }
}

#[test]
fn a_huge_length_is_refused_before_its_bytes_come() {
    let mut bytes = BytesMut::from(&[FRAME, 0, 0, 1, 0x81, 0x10][..]);
    assert_eq!(
        ToAgent::decode(&mut bytes),
        Err(WireError::Length {
            what: "frame",
            length: 2_049,
            most: MAX_FRAME
        })
    );
}
