use std::sync::mpsc::{self, Receiver};

use bytes::Bytes;

use super::super::testing::Volatile;
use super::super::{Base, Overlay};
use super::*;

const SIZE: u64 = 4 << 20;

struct Bench {
    worker: DiskWorker<Volatile>,
    completions: Receiver<DiskCompletion>,
    files: Vec<(Volatile, Volatile)>,
    /// While this is locked, the worker cannot finish a request.
    gate: Arc<Mutex<()>>,
}

fn bench(disks: usize) -> Bench {
    let files: Vec<_> = (0..disks)
        .map(|_| (Volatile::default(), Volatile::default()))
        .collect();
    let overlays = files
        .iter()
        .map(|(data, map)| {
            let base = Base::empty(SIZE);
            Overlay::create(data.clone(), map.clone(), base, Durability::Sync).unwrap()
        })
        .collect();
    let (sender, completions) = mpsc::channel();
    let gate = Arc::new(Mutex::new(()));
    let theirs = Arc::clone(&gate);
    let notify = move |completion| {
        drop(theirs.lock());
        let _ = sender.send(completion);
    };
    let worker = DiskWorker::new(overlays, Box::new(notify)).unwrap();
    Bench {
        worker,
        completions,
        files,
        gate,
    }
}

fn request(number: u64, disk: u8, op: DiskOp) -> DiskRequest {
    let number = RequestNumber(number);
    DiskRequest { number, disk, op }
}

fn write(number: u64, disk: u8, offset: u64, fill: u8, len: usize) -> DiskRequest {
    let data = Bytes::from(vec![fill; len]);
    request(number, disk, DiskOp::Write { offset, data })
}

#[test]
fn requests_run_in_order_and_flushes_cover_what_came_before() {
    let bench = bench(2);
    let read = DiskOp::Read {
        offset: 0,
        len: 512,
    };
    for request in [
        write(1, 0, 0, 1, 512),
        write(2, 0, 0, 2, 512),
        request(3, 0, read.clone()),
        request(4, 0, DiskOp::Flush),
        write(5, 1, 0, 3, 512),
        request(6, 1, read),
    ] {
        bench.worker.submit(request).unwrap();
    }
    bench.worker.stop().unwrap();
    let mut results: Vec<_> = bench
        .completions
        .iter()
        .map(|done| (done.number.0, done.result.unwrap()))
        .collect();
    results.sort_by_key(|(number, _)| *number);
    let expected = [
        (1, DiskData::Written),
        (2, DiskData::Written),
        (3, DiskData::Read(vec![2; 512].into())),
        (4, DiskData::Flushed),
        (5, DiskData::Written),
        (6, DiskData::Read(vec![3; 512].into())),
    ];
    assert_eq!(results, expected);
    // Power fails now: disk 0 was flushed, disk 1 was not.
    let survivors: Vec<_> = bench
        .files
        .iter()
        .map(|(data, map)| {
            let (data, map) = (data.crash(|| false), map.crash(|| false));
            Overlay::assemble(data, map, Base::empty(SIZE), Durability::Sync).unwrap()
        })
        .map(|overlay| overlay.read(0, 1).unwrap()[0])
        .collect();
    assert_eq!(survivors, [2, 0]);
}

#[test]
fn flushes_that_pile_up_share_one_sync() {
    let bench = bench(1);
    let syncs = bench.files[0].0.syncs();
    let held = bench.gate.lock().unwrap();
    // The worker takes this one and waits at the gate while the others are submitted.
    bench.worker.submit(write(1, 0, 0, 1, 512)).unwrap();
    while !bench.worker.shared.lock().tasks.is_empty() {
        thread::yield_now();
    }
    for round in 0..10 {
        bench
            .worker
            .submit(write(2 + round * 2, 0, round * 512, 1, 512))
            .unwrap();
        bench
            .worker
            .submit(request(3 + round * 2, 0, DiskOp::Flush))
            .unwrap();
    }
    drop(held);
    bench.worker.stop().unwrap();
    assert!(bench.completions.iter().all(|done| done.result.is_ok()));
    assert_eq!(bench.files[0].0.syncs(), syncs + 1);
}

#[test]
fn failures_are_told_and_nothing_is_claimed_after_a_failed_sync() {
    let bench = bench(1);
    bench.worker.submit(request(1, 7, DiskOp::Flush)).unwrap();
    let done = bench.completions.recv().unwrap();
    assert!(matches!(
        done.result,
        Err(DiskError::NoSuchDisk { disk: 7, .. })
    ));
    bench.worker.submit(write(2, 0, SIZE, 0, 512)).unwrap();
    let done = bench.completions.recv().unwrap();
    assert!(matches!(done.result, Err(DiskError::Overlay { .. })));
    bench.worker.submit(write(3, 0, 0, 0, 512)).unwrap();
    assert!(bench.completions.recv().unwrap().result.is_ok());
    bench.files[0].0.fail(true);
    bench.worker.submit(request(4, 0, DiskOp::Flush)).unwrap();
    assert!(bench.completions.recv().unwrap().result.is_err());
    bench.files[0].0.fail(false);
    bench.worker.submit(request(5, 0, DiskOp::Flush)).unwrap();
    assert!(bench.completions.recv().unwrap().result.is_err());
}

#[test]
fn a_full_queue_makes_the_submitter_wait() {
    let bench = bench(1);
    let held = bench.gate.lock().unwrap();
    let (worker, submitted) = (&bench.worker, &std::sync::atomic::AtomicU64::new(0));
    thread::scope(|scope| {
        scope.spawn(|| {
            for number in 1..=20 {
                worker.submit(write(number, 0, 0, 1, 1 << 20)).unwrap();
                submitted.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
            }
        });
        // It gets as far as the queue has room: seven requests of a MiB and a bit.
        while worker.shared.lock().bytes + (1 << 20) + REQUEST_BYTES <= QUEUE_BYTES {
            thread::yield_now();
        }
        assert!(worker.shared.lock().bytes <= QUEUE_BYTES);
        assert!(submitted.load(std::sync::atomic::Ordering::SeqCst) < 20);
        drop(held);
    });
    bench.worker.stop().unwrap();
    assert_eq!(bench.completions.iter().count(), 20);
}

#[test]
fn a_worker_that_dies_lets_nobody_wait() {
    let (data, map) = (Volatile::default(), Volatile::default());
    let overlay = Overlay::create(data, map, Base::empty(SIZE), Durability::Sync).unwrap();
    let worker = DiskWorker::new(vec![overlay], Box::new(|_| panic!("expected"))).unwrap();
    let result = (1..).find_map(|number| worker.submit(write(number, 0, 0, 1, 1 << 20)).err());
    assert_eq!(result, Some(WorkerGone));
    assert!(worker.stop().is_err());
}

#[test]
fn durability_changes_where_it_was_submitted() {
    let bench = bench(1);
    let worker = &bench.worker;
    worker.set_durability(Durability::PageCache).unwrap();
    let syncs = bench.files[0].0.syncs();
    worker.submit(write(1, 0, 0, 1, 512)).unwrap();
    worker.submit(request(2, 0, DiskOp::Flush)).unwrap();
    worker.set_durability(Durability::Sync).unwrap();
    worker.submit(request(3, 0, DiskOp::Flush)).unwrap();
    bench.worker.stop().unwrap();
    assert_eq!(bench.files[0].0.syncs(), syncs + 1);
}
