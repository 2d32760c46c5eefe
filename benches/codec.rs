//! What the log costs: bytes per group and time per entry, for the load of a small Redis.
//!
//! `cargo bench --bench codec` prints the figures. The load is made up but shaped as measured:
//! 20 connections that each send a request and wait for its answer. A round of the guest takes
//! one or two frames of about 100 bytes (real headers: the fields that change do change), reads
//! the clock, submits a write and a flush, sends answers, and is shipped as one batch; there is
//! a mark every 2 ms.

#![allow(
    clippy::cast_precision_loss,
    reason = "figures are printed with two decimals"
)]

use std::hint::black_box;
use std::time::{Duration, Instant};

use bytes::Bytes;
use replay_log::{
    Answer, Arrival, Batch, BatchBuilder, Chain, DiskOutcome, Entry, FileOptions, FileStore,
    FrameNumber, FrameSource, GatewayIncarnation, Group, GroupBody, GuestTime, LogIndex, Mark,
    MarkDigest, Position, RequestNumber, Store, StreamDecoder, StreamEncoder, SyncPolicy, Term,
};

const CONNECTIONS: usize = 20;
const ROUNDS: usize = 50_000;
const ROUND_NS: u64 = 180_000;
const MARK_NS: u64 = 2_000_000;
const REPEATS: usize = 5;

/// SplitMix64: the same load each time.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }
}

/// One client's side of a TCP connection.
#[derive(Clone, Copy)]
struct Connection {
    port: u16,
    sequence: u32,
    acknowledged: u32,
    ip_id: u16,
}

/// An Ethernet frame with an `INCR` in it.
fn request(connection: &mut Connection, random: &mut Random) -> Bytes {
    let key = random.below(100_000);
    let body = format!("*2\r\n$4\r\nINCR\r\n$20\r\ncounter:{key:012}\r\n");
    let mut frame = Vec::with_capacity(54 + body.len());
    frame.extend([0x02, 0, 0, 0, 0, 1, 0x02, 0, 0, 0, 0, 2, 0x08, 0x00]);
    let length = (40 + body.len()) as u16;
    frame.extend([0x45, 0]);
    frame.extend(length.to_be_bytes());
    frame.extend(connection.ip_id.to_be_bytes());
    frame.extend([0x40, 0, 64, 6]);
    frame.extend((random.next() as u16).to_be_bytes());
    frame.extend([10, 0, 2, 2, 10, 0, 2, 15]);
    frame.extend(connection.port.to_be_bytes());
    frame.extend(6379u16.to_be_bytes());
    frame.extend(connection.sequence.to_be_bytes());
    frame.extend(connection.acknowledged.to_be_bytes());
    frame.extend([0x50, 0x18, 0xff, 0xff]);
    frame.extend((random.next() as u16).to_be_bytes());
    frame.extend([0, 0]);
    frame.extend(body.as_bytes());
    connection.ip_id = connection.ip_id.wrapping_add(1);
    connection.sequence = connection.sequence.wrapping_add(body.len() as u32);
    connection.acknowledged = connection.acknowledged.wrapping_add(5 + (key % 3) as u32);
    frame.into()
}

/// The load, one list of entries per batch, and how many bytes of frames are in it.
struct Load {
    batches: Vec<Vec<Entry>>,
    frame_bytes: u64,
    groups: u64,
    entries: u64,
}

fn load() -> Load {
    let mut random = Random(42);
    let mut connections: Vec<_> = (0..CONNECTIONS)
        .map(|i| Connection {
            port: 40_000 + 7 * i as u16,
            sequence: random.next() as u32,
            acknowledged: random.next() as u32,
            ip_id: random.next() as u16,
        })
        .collect();
    let (mut at, mut time, mut marked) = (3_000_000, 60_000_000_000, 0);
    let (mut frames, mut requests) = (500_000, 250_000);
    let mut load = Load {
        batches: Vec::with_capacity(ROUNDS),
        frame_bytes: 0,
        groups: 0,
        entries: 0,
    };
    for round in 0..ROUNDS {
        let mut entries = Vec::new();
        let mut group = |at, body| {
            entries.push(Entry::Group(Group {
                at: Position(at),
                body,
            }));
        };
        for _ in 0..=random.below(2) {
            frames += 1;
            let connection = random.below(CONNECTIONS as u64) as usize;
            let bytes = request(&mut connections[connection], &mut random);
            load.frame_bytes += bytes.len() as u64;
            let source = FrameSource {
                gateway: GatewayIncarnation(0x5eed_0fa9_a7e3_11c4),
                number: FrameNumber(frames),
            };
            group(at, GroupBody::Arrival(Arrival::Frame { source, bytes }));
        }
        for _ in 0..=1 + random.below(2) {
            at += 1 + random.below(5);
            time += ROUND_NS / 6 + random.below(ROUND_NS / 6);
            let answers = vec![Answer::Clock(GuestTime(time))];
            let outputs = 0;
            group(at, GroupBody::Exit { answers, outputs });
        }
        for outcome in [DiskOutcome::Written, DiskOutcome::Flushed] {
            requests += 1;
            at += random.below(4);
            let request = RequestNumber(requests);
            group(
                at,
                GroupBody::Arrival(Arrival::DiskDone { request, outcome }),
            );
        }
        for _ in 0..=random.below(2) {
            at += 1 + random.below(5);
            let answers = Vec::new();
            group(
                at,
                GroupBody::Exit {
                    answers,
                    outputs: 1,
                },
            );
        }
        load.groups += entries.len() as u64;
        let mark = round as u64 * ROUND_NS / MARK_NS;
        if mark > marked {
            marked = mark;
            entries.push(Entry::Mark(Mark {
                at: Position(at),
                digest: MarkDigest(random.next()),
            }));
        }
        load.entries += entries.len() as u64;
        load.batches.push(entries);
    }
    load
}

/// The median time of a few runs.
fn median(mut run: impl FnMut()) -> Duration {
    let mut times: Vec<_> = (0..REPEATS)
        .map(|_| {
            let start = Instant::now();
            run();
            start.elapsed()
        })
        .collect();
    times.sort();
    times[REPEATS / 2]
}

fn per(time: Duration, count: u64) -> f64 {
    time.as_nanos() as f64 / count as f64
}

fn encode(load: &Load) -> Vec<Batch> {
    let mut builder = BatchBuilder::new(Term(3), LogIndex(9_000_000));
    let finish = |entries: &Vec<Entry>| {
        for entry in entries {
            builder.push(entry).expect("the load is within the bounds");
        }
        builder.finish().expect("a round has entries")
    };
    load.batches.iter().map(finish).collect()
}

fn report_sizes(load: &Load, batches: &[Batch], stream: &StreamEncoder) {
    let payload: u64 = batches.iter().map(|b| b.payload().len() as u64).sum();
    let (raw, sent) = (stream.bytes().raw, stream.bytes().compressed);
    let groups = load.groups as f64;
    let each = |bytes: u64| bytes as f64 / groups;
    let without = |bytes: u64| (bytes - load.frame_bytes) as f64 / groups;
    println!(
        "load: {} batches, {} groups, {} entries, frames of {} bytes",
        batches.len(),
        load.groups,
        load.entries,
        load.frame_bytes
    );
    println!("bytes a group, all        {:6.2}", each(payload));
    println!("  without frames' bytes   {:6.2}", without(payload));
    println!("  with framing            {:6.2}", without(raw));
    println!("  compressed, all         {:6.2}", each(sent));
    println!("zstd ratio                {:6.2}", raw as f64 / sent as f64);
    let bound = 1.2 * load.frame_bytes as f64 + 4.0 * groups;
    println!(
        "stream, of the bound of 1.2 frame bytes + 4 a group: {:.2}",
        sent as f64 / bound
    );
    let seconds = ROUNDS as f64 * ROUND_NS as f64 / 1e9;
    println!(
        "stream, of such a guest   {:6.0} kB/s",
        sent as f64 / seconds / 1e3
    );
}

fn main() {
    let load = load();
    let batches = encode(&load);
    let mut stream = StreamEncoder::new();
    let sent: Vec<_> = batches.iter().map(|batch| stream.push(batch)).collect();
    report_sizes(&load, &batches, &stream);

    let time = median(|| {
        black_box(encode(&load));
    });
    println!(
        "encode                    {:6.0} ns an entry",
        per(time, load.entries)
    );
    let time = median(|| {
        for batch in &batches {
            black_box(batch.decode().expect("it was encoded"));
        }
    });
    println!(
        "decode                    {:6.0} ns an entry",
        per(time, load.entries)
    );
    let time = median(|| {
        let chain = |chain, batch: &Batch| batch.chain(chain);
        black_box(batches.iter().fold(Chain::default(), chain));
    });
    let count = batches.len() as u64;
    println!(
        "hash chain                {:6.2} µs a batch",
        per(time, count) / 1e3
    );

    let raw_mb = stream.bytes().raw as f64 / 1e6;
    let time = median(|| {
        let mut stream = StreamEncoder::new();
        for batch in &batches {
            black_box(stream.push(batch));
        }
    });
    let per_mb = time.as_secs_f64() * 1e3 / raw_mb;
    println!(
        "frame, compress, flush    {:6.2} µs a batch, {per_mb:.1} ms a raw MB",
        per(time, count) / 1e3
    );
    let time = median(|| {
        let mut stream = StreamDecoder::new();
        for bytes in &sent {
            stream.feed(bytes);
            black_box(stream.poll().expect("it was sent"));
        }
    });
    let per_mb = time.as_secs_f64() * 1e3 / raw_mb;
    println!(
        "decompress, check         {:6.2} µs a batch, {per_mb:.1} ms a raw MB",
        per(time, count) / 1e3
    );

    let append_all = || {
        let dir = tempfile::tempdir().expect("a folder for the log");
        let options = FileOptions {
            sync: SyncPolicy::Never,
            ..FileOptions::default()
        };
        let mut store = FileStore::open(dir.path(), options).expect("a new log");
        // A log begins at its start, so the batches are counted anew.
        let mut builder = BatchBuilder::new(Term(3), LogIndex::START);
        let start = Instant::now();
        for entries in &load.batches {
            for entry in entries {
                builder.push(entry).expect("the load is within the bounds");
            }
            let batch = builder.finish().expect("a round has entries");
            store.append(&batch).expect("the disk has room");
        }
        let appended = start.elapsed();
        let start = Instant::now();
        let mut reader = store.read_from(LogIndex::START).expect("it is kept");
        while let Some(batch) = reader.next_batch().expect("it was written") {
            black_box(batch);
        }
        (appended, start.elapsed(), store.bytes())
    };
    let (appended, read, bytes) = append_all();
    println!(
        "encode, append to a file  {:6.2} µs a batch, {:.2} bytes a group",
        per(appended, count) / 1e3,
        bytes as f64 / load.groups as f64
    );
    println!(
        "read from the file        {:6.2} µs a batch",
        per(read, count) / 1e3
    );
}
