//! Tests of the entry codec and of batches.

use proptest::collection::vec;
use proptest::prelude::*;

use bytes::Bytes;

use super::*;
use crate::batch::{Batch, BatchBuilder, FrameError, MAX_BATCH, MAX_ENTRIES};
use crate::entry::{
    Answer, Arrival, DiskOutcome, Entry, GatewayIncarnation, GroupBody, GuestTime, Mark,
    MarkDigest, RequestNumber,
};
use crate::position::{Chain, Term};
use crate::testing::{arbitrary_log, entries_of, group};
use crate::varint::put;

fn build(entries: &[Entry]) -> Batch {
    let mut builder = BatchBuilder::new(Term(1), LogIndex::START);
    for entry in entries {
        builder.push(entry).unwrap();
    }
    builder.finish().unwrap()
}

fn raw_frame(first: LogIndex, count: u32, payload: &[u8]) -> Vec<u8> {
    let mut body = Vec::new();
    for number in [1, first.0, u64::from(count)] {
        put(&mut body, number);
    }
    body.extend_from_slice(payload);
    let mut frame = Vec::new();
    put(&mut frame, body.len() as u64);
    frame.extend_from_slice(&crc32fast::hash(&body).to_le_bytes());
    frame.extend_from_slice(&body);
    frame
}

fn raw_batch(first: LogIndex, count: u32, payload: &[u8]) -> Batch {
    let frame = raw_frame(first, count, payload);
    Batch::decode_frame(&frame).unwrap().unwrap().0
}

proptest! {
    #[test]
    fn entries_survive(entries in arbitrary_log(60)) {
        let batch = build(&entries);
        prop_assert_eq!(batch.len() as usize, entries.len());
        prop_assert_eq!(batch.decode().unwrap(), entries);
    }

    #[test]
    fn frames_survive_and_ask_for_more_when_cut(entries in arbitrary_log(20), cut: prop::sample::Index) {
        let batch = build(&entries);
        let mut frame = Vec::new();
        batch.encode_frame(&mut frame);
        prop_assert_eq!(Batch::decode_frame(&frame).unwrap(), Some((batch.clone(), frame.len())));
        prop_assert_eq!(Batch::decode_frame(&frame[..cut.index(frame.len())]), Ok(None));
        let mut buffer = bytes::BytesMut::from(&frame[..]);
        buffer.extend_from_slice(b"more");
        prop_assert_eq!(Batch::take_frame(&mut buffer).unwrap(), Some(batch));
        prop_assert_eq!(&buffer[..], b"more");
    }

    #[test]
    fn a_flipped_bit_never_gives_another_batch(entries in arbitrary_log(8), at: prop::sample::Index, bit in 0..8) {
        let mut frame = Vec::new();
        build(&entries).encode_frame(&mut frame);
        let at = at.index(frame.len());
        frame[at] ^= 1u8 << bit;
        prop_assert!(!matches!(Batch::decode_frame(&frame), Ok(Some(_))));
    }

    #[test]
    fn arbitrary_payloads_decode_to_one_form_or_not_at_all(
        payload in vec(any::<u8>(), 1..300), count in 1u32..40, first in 0u64..2,
    ) {
        prop_assume!(count as usize <= payload.len());
        let batch = raw_batch(LogIndex(first), count, &payload);
        if let Ok(entries) = batch.decode() {
            let mut builder = BatchBuilder::new(Term(1), LogIndex(first));
            for entry in &entries {
                builder.push(entry).unwrap();
            }
            prop_assert_eq!(builder.finish().unwrap(), batch);
        }
    }

    #[test]
    fn mutated_payloads_decode_to_one_form_or_not_at_all(
        entries in arbitrary_log(20), changes in vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
    ) {
        let batch = build(&entries);
        let mut payload = batch.payload().to_vec();
        for (at, value) in changes {
            let at = at.index(payload.len());
            payload[at] = value;
        }
        let mutated = raw_batch(batch.first(), batch.len(), &payload);
        if let Ok(entries) = mutated.decode() {
            prop_assert_eq!(build(&entries), mutated);
        }
    }

    #[test]
    fn arbitrary_bytes_are_no_frame(input in vec(any::<u8>(), 0..200)) {
        // A checksum of four bytes can be hit by chance, but not by this few cases.
        prop_assert!(!matches!(Batch::decode_frame(&input), Ok(Some(_))));
    }
}

#[test]
fn common_groups_take_at_most_four_bytes() {
    let clock = |at, ns| {
        group(
            at,
            GroupBody::Exit {
                answers: vec![Answer::Clock(GuestTime(ns))],
                outputs: 0,
            },
        )
    };
    let output = |at, outputs| {
        group(
            at,
            GroupBody::Exit {
                answers: Vec::new(),
                outputs,
            },
        )
    };
    let written = |at, request| {
        group(
            at,
            GroupBody::Arrival(Arrival::DiskDone {
                request: RequestNumber(request),
                outcome: DiskOutcome::Written,
            }),
        )
    };
    let frame = |at, number| {
        group(
            at,
            GroupBody::Arrival(Arrival::Frame {
                source: FrameSource {
                    gateway: GatewayIncarnation(9),
                    number: FrameNumber(number),
                },
                bytes: Bytes::from_static(&[7; 100]),
            }),
        )
    };
    let first = [
        clock(1_000_000, 5_000_000_000),
        written(1_000_001, 70_000),
        frame(1_000_001, 80_000),
    ];
    let cost = |next: &Entry| {
        let mut builder = BatchBuilder::new(Term(3), LogIndex(1_000_000));
        for entry in &first {
            builder.push(entry).unwrap();
        }
        let before = builder.bytes();
        builder.push(next).unwrap();
        builder.bytes() - before
    };
    assert_eq!(cost(&clock(1_000_030, 5_002_000_000)), 4);
    assert_eq!(cost(&output(1_000_004, 1)), 1);
    assert_eq!(cost(&output(1_000_004, 3)), 2);
    assert_eq!(cost(&written(1_000_020, 70_001)), 2);
    assert_eq!(cost(&written(1_000_020, 69_990)), 2);
    assert_eq!(cost(&frame(1_000_031, 80_001)), 100 + 2);
    let mark = Entry::Mark(Mark {
        at: Position(1_000_900),
        digest: MarkDigest(u64::MAX),
    });
    assert_eq!(cost(&mark), 8 + 3);
}

#[test]
fn what_the_format_cannot_hold_is_refused_and_changes_nothing() {
    let mut builder = BatchBuilder::new(Term(1), LogIndex::START);
    let frame = |at, len| {
        group(
            at,
            GroupBody::Arrival(Arrival::Frame {
                source: FrameSource::default(),
                bytes: vec![0; len].into(),
            }),
        )
    };
    builder.push(&frame(7, 10)).unwrap();
    let before = builder.bytes();
    assert_eq!(
        builder.push(&frame(8, MAX_FRAME + 1)),
        Err(EncodeError::TooLong {
            what: "a frame",
            found: MAX_FRAME + 1,
            max: MAX_FRAME
        })
    );
    assert_eq!(
        builder.push(&frame(6, 10)),
        Err(EncodeError::PositionBack {
            at: Position(6),
            last: Position(7)
        })
    );
    let header = entries_of(0).remove(0);
    assert!(matches!(header, Entry::Header(_)));
    assert!(builder.push(&header).is_err());
    let entropy = Answer::Entropy(vec![1; MAX_ENTROPY].into());
    let huge = group(
        9,
        GroupBody::Exit {
            answers: vec![entropy; 5],
            outputs: 0,
        },
    );
    assert!(matches!(
        builder.push(&huge),
        Err(EncodeError::TooLong { .. })
    ));
    assert_eq!(builder.bytes(), before);
    builder.push(&frame(7, 20)).unwrap();
    let entries = builder.finish().unwrap().decode().unwrap();
    assert_eq!(entries, [frame(7, 10), frame(7, 20)]);
}

#[test]
fn a_full_batch_says_so_and_goes_on_after_finish() {
    let mut builder = BatchBuilder::new(Term(1), LogIndex(5));
    let frame = group(
        3,
        GroupBody::Arrival(Arrival::Console {
            bytes: vec![b'x'; MAX_CONSOLE].into(),
        }),
    );
    let mut pushed = 0;
    let error = loop {
        match builder.push(&frame) {
            Ok(end) => pushed = end.since(LogIndex(5)),
            Err(error) => break error,
        }
    };
    assert_eq!(error, EncodeError::BatchFull);
    assert!(builder.bytes() <= MAX_BATCH);
    let batch = builder.finish().unwrap();
    assert_eq!(u64::from(batch.len()), pushed);
    assert_eq!(batch.decode().unwrap().len() as u64, pushed);
    assert_eq!(builder.finish(), None);
    assert_eq!(builder.push(&frame), Ok(batch.end().plus(1)));
}

#[test]
fn headers_stand_only_at_the_start() {
    let header = build(&entries_of(0)[..1]);
    let moved = raw_batch(LogIndex(1), 1, header.payload());
    assert_eq!(
        moved.decode().unwrap_err().problem,
        EntryProblem::HeaderNotFirst
    );
}

#[test]
fn a_cut_is_refused_by_name() {
    let cut = raw_batch(LogIndex(4), 1, &[SPECIAL << 5 | CUT, 1, 2, 3]);
    let error = cut.decode().unwrap_err();
    assert_eq!(
        error,
        DecodeError {
            index: LogIndex(4),
            offset: 0,
            problem: EntryProblem::Cut
        }
    );
    assert!(error.to_string().contains("newer version"), "{error}");
}

#[test]
fn counts_that_cannot_be_are_refused_before_anything_is_allocated_for_them() {
    let payload = vec![OUTPUT << 5; 70_000];
    let decode = |first, count, payload| {
        let frame = raw_frame(LogIndex(first), count, payload);
        Batch::decode_frame(&frame).map(|read| read.is_some())
    };
    assert_eq!(decode(0, MAX_ENTRIES, &payload), Ok(true));
    for (first, count, payload) in [
        (0, MAX_ENTRIES + 1, &payload[..]),
        (0, 0, &payload),
        (0, 11, &payload[..10]),
        (u64::MAX - 1, 2, &payload[..10]),
    ] {
        let refused = decode(first, count, payload);
        assert!(matches!(refused, Err(FrameError::Entries { .. })));
    }
    let huge = [&[0xff, 0xff, 0xff, 0x7f][..], &[0; 100]].concat();
    let refused = Batch::decode_frame(&huge);
    assert!(matches!(refused, Err(FrameError::Length { .. })));
}

#[test]
fn a_count_that_does_not_fit_the_payload_is_an_error() {
    let batch = build(&entries_of(0));
    let fewer = raw_batch(batch.first(), batch.len() - 1, batch.payload());
    assert!(matches!(
        fewer.decode().unwrap_err().problem,
        EntryProblem::Trailing(_)
    ));
    let more = raw_batch(batch.first(), batch.len() + 1, batch.payload());
    assert_eq!(
        more.decode().unwrap_err().problem,
        EntryProblem::Field(FieldError::Short)
    );
}

#[test]
fn the_chain_depends_on_everything_but_the_past_only_through_the_chain() {
    let batch = |term, first, at| {
        let mut builder = BatchBuilder::new(Term(term), LogIndex(first));
        let mark = Mark {
            at: Position(at),
            digest: MarkDigest(3),
        };
        builder.push(&Entry::Mark(mark)).unwrap();
        builder.finish().unwrap()
    };
    let start = Chain::default();
    let chains = [
        batch(1, 2, 3).chain(start),
        batch(2, 2, 3).chain(start),
        batch(1, 3, 3).chain(start),
        batch(1, 2, 4).chain(start),
        batch(1, 2, 3).chain(Chain([1; 32])),
    ];
    for (i, one) in chains.iter().enumerate() {
        for other in &chains[i + 1..] {
            assert_ne!(one, other);
        }
    }
    assert_eq!(chains[0], batch(1, 2, 3).chain(start));
}
