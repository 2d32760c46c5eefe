//! Messages as bytes.

use replay_log::{LogTip, Position};

use super::super::wire::{MAX_DATAGRAM, MAX_MESSAGE};
use super::*;

#[test]
fn every_message_survives_the_wire() {
    let claim = Claim {
        term: Term(4),
        claimant: name("b"),
        base: Version {
            term: Term(3),
            epoch: Epoch(9),
        },
    };
    let ack = Ack {
        term: Term(3),
        incarnation: Incarnation(1),
        held: LogIndex(77),
        run: VmRun(2),
        executed: LogIndex(70),
        position: Position(5_000),
        known: claim.base,
        health: Health::Full,
    };
    let tip = LogTip {
        term: Term(3),
        index: LogIndex(77),
        ..LogTip::default()
    };
    let mut trio = Trio::paired(START);
    let mut record = trio.record().clone();
    record.failed = Some(Stumble {
        at: Position(3),
        reigns: 1,
        reason: "a bug".to_owned(),
    });
    let record = Committed {
        record,
        proof: Proof(vec![1, 2, 3].into()),
    };
    let batch = trio.host("a").batches[0].clone();
    let authority = Authority::Claim(claim.clone());
    let messages = [
        Message::Record(record.clone()),
        Message::Inquire { base: claim.base },
        Message::Seal {
            claim: claim.clone(),
            consent: true,
        },
        Message::Refused {
            term: Term(4),
            why: Refusal::Sealed,
            promise: Some(claim.clone()),
            record: Some(record.clone()),
        },
        Message::Consent {
            claim: claim.clone(),
        },
        Message::Renounced {
            claim: claim.clone(),
        },
        Message::Abdicated {
            version: claim.base,
            failed: record.record.failed.clone(),
        },
        Message::Heard {
            base: claim.base,
            alive: true,
            incarnation: Incarnation(5),
        },
        Message::Stream {
            authority,
            after: tip,
        },
        Message::Log {
            term: Term(3),
            batch,
        },
        Message::Ack(ack),
        Message::Report(ack),
    ];
    for message in messages {
        let bytes = message.encode();
        assert!(bytes.len() <= MAX_MESSAGE);
        assert_eq!(Message::decode(&bytes).expect("the message"), message);
        if message.lane() == Lane::Datagram {
            assert!(bytes.len() <= MAX_DATAGRAM);
        }
        for cut in 0..bytes.len() {
            assert!(
                Message::decode(&bytes[..cut]).is_err(),
                "cut at {cut}: {message:?}"
            );
        }
        let longer = [bytes.as_slice(), &[0]].concat();
        assert!(matches!(
            Message::decode(&longer),
            Err(WireError::Trailing { extra: 1 })
        ));
    }
}

#[test]
fn flipped_bits_in_a_batch_are_refused() {
    let mut trio = Trio::paired(START);
    let batch = trio.host("a").batches[0].clone();
    let term = Term(1);
    let bytes = Message::Log { term, batch }.encode();
    // The first bytes are the message's own; the batch has a checksum over the rest.
    for at in 4..bytes.len() {
        let mut flipped = bytes.clone();
        flipped[at] ^= 0x40;
        assert!(Message::decode(&flipped).is_err(), "byte {at}");
    }
}
