//! What the tests of this crate share: strategies for arbitrary logs, and one log by hand.

use bytes::Bytes;
use proptest::collection::vec;
use proptest::prelude::*;

use crate::entry::{
    Answer, Arrival, DiskBase, DiskOutcome, Entry, FrameNumber, FrameSource, GatewayIncarnation,
    Group, GroupBody, GuestTime, Header, ImageDigest, Mark, MarkDigest, RequestNumber, TermChange,
    TimerId,
};
use crate::position::{Position, Term};

/// A group at a position.
pub fn group(at: u64, body: GroupBody) -> Entry {
    Entry::Group(Group {
        at: Position(at),
        body,
    })
}

fn bytes(max: usize) -> impl Strategy<Value = Bytes> {
    vec(any::<u8>(), 0..max).prop_map(Bytes::from)
}

fn number() -> impl Strategy<Value = u64> {
    prop_oneof![0..40u64, 0..100_000u64, any::<u64>()]
}

fn answer() -> impl Strategy<Value = Answer> {
    prop_oneof![
        number().prop_map(|ns| Answer::Clock(GuestTime(ns))),
        bytes(40).prop_map(Answer::Entropy),
    ]
}

fn arrival() -> impl Strategy<Value = Arrival> {
    let source = (0..3u64, number()).prop_map(|(gateway, number)| FrameSource {
        gateway: GatewayIncarnation(gateway),
        number: FrameNumber(number),
    });
    let outcome = prop_oneof![
        Just(DiskOutcome::Written),
        Just(DiskOutcome::Flushed),
        any::<u64>().prop_map(|hash| DiskOutcome::Read { hash }),
    ];
    prop_oneof![
        (source, bytes(200)).prop_map(|(source, bytes)| Arrival::Frame { source, bytes }),
        (number(), outcome).prop_map(|(request, outcome)| Arrival::DiskDone {
            request: RequestNumber(request),
            outcome
        }),
        any::<u8>().prop_map(|timer| Arrival::TimerDue {
            timer: TimerId(timer)
        }),
        bytes(20).prop_map(|bytes| Arrival::Console { bytes }),
    ]
}

fn body() -> impl Strategy<Value = GroupBody> {
    let outputs = prop_oneof![0..10u32, any::<u32>()];
    prop_oneof![
        (vec(answer(), 0..3), outputs)
            .prop_map(|(answers, outputs)| GroupBody::Exit { answers, outputs }),
        (vec(answer(), 28..36), 0..2u32)
            .prop_map(|(answers, outputs)| GroupBody::Exit { answers, outputs }),
        arrival().prop_map(GroupBody::Arrival),
        arrival().prop_map(GroupBody::Arrival),
    ]
}

fn header() -> impl Strategy<Value = Entry> {
    let disk =
        (any::<[u8; 32]>(), any::<u64>()).prop_map(|(digest, size)| DiskBase { digest, size });
    (
        any::<u32>(),
        any::<[u8; 32]>(),
        bytes(50),
        vec(disk, 0..3),
        number(),
        any::<[u8; 16]>(),
    )
        .prop_map(|(machine_model, image, config, disks, term, boot)| {
            Entry::Header(Header {
                machine_model,
                image: ImageDigest(image),
                config,
                disks,
                term: Term(term),
                boot,
            })
        })
}

/// Entry at a position, made of what it is to be.
fn entry_at(at: u64) -> impl Strategy<Value = Entry> {
    let at = Position(at);
    prop_oneof![
        8 => body().prop_map(move |body| Entry::Group(Group { at, body })),
        2 => any::<u64>().prop_map(move |digest| Entry::Mark(Mark { at, digest: MarkDigest(digest) })),
        1 => number().prop_map(move |term| Entry::Term(TermChange { at, term: Term(term) })),
    ]
}

/// A whole log of at least one entry, with a header or without.
pub fn arbitrary_log(max: usize) -> impl Strategy<Value = Vec<Entry>> {
    let steps = vec(
        prop_oneof![5 => 0..4u64, 2 => 20..40u64, 1 => 0..1u64 << 50],
        1..max,
    );
    let entries = steps.prop_flat_map(|steps| {
        let mut at = 0;
        steps
            .into_iter()
            .map(|step| {
                at += step;
                entry_at(at)
            })
            .collect::<Vec<_>>()
    });
    (prop::option::of(header()), entries)
        .prop_map(|(header, entries)| header.into_iter().chain(entries).collect())
}

/// A log with at least one entry of every kind and shape; `seed` varies its numbers.
pub fn entries_of(seed: u64) -> Vec<Entry> {
    let exit = |at, answers, outputs| group(at, GroupBody::Exit { answers, outputs });
    let arrives = |at, arrival| group(at, GroupBody::Arrival(arrival));
    let clock = |ns| Answer::Clock(GuestTime(seed + ns));
    let frame = |gateway, number, text: &'static str| Arrival::Frame {
        source: FrameSource {
            gateway: GatewayIncarnation(gateway),
            number: FrameNumber(number),
        },
        bytes: Bytes::from_static(text.as_bytes()),
    };
    let disk = |request, outcome| Arrival::DiskDone {
        request: RequestNumber(request),
        outcome,
    };
    vec![
        Entry::Header(Header {
            machine_model: 1,
            image: ImageDigest([0x11; 32]),
            config: Bytes::from_static(b"memory = 64"),
            disks: vec![DiskBase {
                digest: [0x22; 32],
                size: 1 << 20,
            }],
            term: Term(1),
            boot: *b"sixteen byte key",
        }),
        exit(1, vec![clock(12_345)], 0),
        exit(2, vec![], 1),
        exit(40, vec![], 12),
        exit(
            71,
            vec![clock(20_000), Answer::Entropy(Bytes::from_static(b"dice"))],
            2,
        ),
        exit(72, vec![clock(20_001); 40], 0),
        arrives(72, frame(7 + seed, 1, "first frame")),
        arrives(72, frame(7 + seed, 2, "next frame")),
        arrives(73, frame(7 + seed, 9, "after a gap")),
        arrives(73, frame(8 + seed, 1, "another gateway")),
        arrives(
            80,
            disk(
                1,
                DiskOutcome::Read {
                    hash: 0x0123_4567_89ab_cdef,
                },
            ),
        ),
        arrives(80, disk(3, DiskOutcome::Written)),
        arrives(81, disk(2, DiskOutcome::Flushed)),
        arrives(81, disk(5_000 + seed, DiskOutcome::Written)),
        arrives(90, Arrival::TimerDue { timer: TimerId(1) }),
        arrives(
            90,
            Arrival::Console {
                bytes: Bytes::from_static(b"reboot\n"),
            },
        ),
        Entry::Mark(Mark {
            at: Position(5_000),
            digest: MarkDigest(0xfeed_face_cafe_beef),
        }),
        Entry::Term(TermChange {
            at: Position(5_000),
            term: Term(2 + seed),
        }),
    ]
}
