use std::sync::mpsc::{self, Receiver};

use bytes::Bytes;

use super::super::testing::Volatile;
use super::super::{Base, Durability, Overlay};
use super::*;

const SIZE: u64 = 4 << 20;

struct Bench {
    worker: DiskWorker<Volatile>,
    completions: Receiver<DiskCompletion>,
    files: Vec<(Volatile, Volatile)>,
    /// While this is locked, the worker cannot finish a request.
    gate: Arc<Mutex<()>>,
}

fn bench(disks: usize, finish: Finish) -> Bench {
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
    let notify = move |news: DiskNews| {
        drop(theirs.lock());
        if let DiskNews::Finished(completions) = news {
            for completion in completions {
                let _ = sender.send(completion);
            }
        }
    };
    let worker = DiskWorker::new(overlays, finish, Box::new(notify)).unwrap();
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
    let bench = bench(2, Finish::Done);
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
        bench.worker.submit(vec![request]).unwrap();
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
    let bench = bench(1, Finish::Done);
    let syncs = bench.files[0].0.syncs();
    let held = bench.gate.lock().unwrap();
    // The worker takes this one and waits at the gate while the others are submitted.
    bench.worker.submit(vec![write(1, 0, 0, 1, 512)]).unwrap();
    while !bench.worker.shared.lock().tasks.is_empty() {
        thread::yield_now();
    }
    for round in 0..10 {
        bench
            .worker
            .submit(vec![write(2 + round * 2, 0, round * 512, 1, 512)])
            .unwrap();
        bench
            .worker
            .submit(vec![request(3 + round * 2, 0, DiskOp::Flush)])
            .unwrap();
    }
    drop(held);
    bench.worker.stop().unwrap();
    assert!(bench.completions.iter().all(|done| done.result.is_ok()));
    assert_eq!(bench.files[0].0.syncs(), syncs + 1);
}

#[test]
fn failures_are_told_and_nothing_is_claimed_after_a_failed_sync() {
    let bench = bench(1, Finish::Done);
    bench
        .worker
        .submit(vec![request(1, 7, DiskOp::Flush)])
        .unwrap();
    let done = bench.completions.recv().unwrap();
    assert!(matches!(
        done.result,
        Err(DiskError::NoSuchDisk { disk: 7, .. })
    ));
    bench
        .worker
        .submit(vec![write(2, 0, SIZE, 0, 512)])
        .unwrap();
    let done = bench.completions.recv().unwrap();
    assert!(matches!(done.result, Err(DiskError::Overlay { .. })));
    bench.worker.submit(vec![write(3, 0, 0, 0, 512)]).unwrap();
    assert!(bench.completions.recv().unwrap().result.is_ok());
    bench.files[0].0.fail(true);
    bench
        .worker
        .submit(vec![request(4, 0, DiskOp::Flush)])
        .unwrap();
    assert!(bench.completions.recv().unwrap().result.is_err());
    bench.files[0].0.fail(false);
    bench
        .worker
        .submit(vec![request(5, 0, DiskOp::Flush)])
        .unwrap();
    assert!(bench.completions.recv().unwrap().result.is_err());
}

#[test]
fn a_full_queue_makes_the_submitter_wait() {
    let bench = bench(1, Finish::Done);
    let held = bench.gate.lock().unwrap();
    let (worker, submitted) = (&bench.worker, &std::sync::atomic::AtomicU64::new(0));
    thread::scope(|scope| {
        scope.spawn(|| {
            for number in 1..=20 {
                worker
                    .submit(vec![write(number, 0, 0, 1, 1 << 20)])
                    .unwrap();
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
    let worker = DiskWorker::new(
        vec![overlay],
        Finish::Done,
        Box::new(|_| panic!("expected")),
    )
    .unwrap();
    let result =
        (1..).find_map(|number| worker.submit(vec![write(number, 0, 0, 1, 1 << 20)]).err());
    assert_eq!(result, Some(WorkerGone));
    assert!(worker.stop().is_err());
}

/// So many requests that the worker has told of.
fn told(bench: &Bench, count: usize) -> Vec<DiskCompletion> {
    bench.completions.iter().take(count).collect()
}

fn written_and_flushed(number: u64, offset: u64) -> Vec<DiskRequest> {
    vec![
        write(number, 0, offset, 7, 512),
        request(number + 1, 0, DiskOp::Flush),
    ]
}

fn all_ok(completions: &[DiskCompletion], count: usize) -> bool {
    completions.len() == count && completions.iter().all(|done| done.result.is_ok())
}

/// A worker over one disk whose news are seen, one after the other, by `see`.
fn watched(
    finish: Finish,
    see: impl Fn(DiskNews, &Volatile) + Send + 'static,
) -> (DiskWorker<Volatile>, Volatile, Volatile) {
    let (data, map) = (Volatile::default(), Volatile::default());
    let base = Base::empty(SIZE);
    let overlay = Overlay::create(data.clone(), map.clone(), base, Durability::Sync).unwrap();
    let seen = data.clone();
    let notify = move |news| see(news, &seen);
    let worker = DiskWorker::new(vec![overlay], finish, Box::new(notify)).unwrap();
    (worker, data, map)
}

/// The first byte of what a power failure leaves, none of what is not synced.
fn survivor(data: &Volatile, map: &Volatile) -> u8 {
    let (data, map) = (data.crash(|| false), map.crash(|| false));
    let overlay = Overlay::assemble(data, map, Base::empty(SIZE), Durability::Sync);
    overlay.unwrap().read(0, 1).unwrap()[0]
}

#[test]
fn what_is_submitted_together_is_told_together() {
    let (sender, told) = mpsc::channel();
    let (worker, _, _) = watched(Finish::Done, move |news, _| {
        if let DiskNews::Finished(completions) = news {
            let numbers: Vec<u64> = completions.iter().map(|done| done.number.0).collect();
            sender.send(numbers).unwrap();
        }
    });
    let writes = vec![write(1, 0, 0, 1, 512), write(2, 0, 512, 1, 512)];
    assert!(worker.submit(writes).unwrap().is_empty());
    worker.submit(written_and_flushed(3, 0)).unwrap();
    worker.stop().unwrap();
    assert_eq!(told.iter().collect::<Vec<_>>(), [[1, 2], [3, 4]]);
}

/// What a replica's disk does: flushes cost nothing, and are made good before it goes live.
#[test]
fn late_flushes_are_synced_when_asked_for_and_soon_without() {
    let (worker, data, map) = watched(Finish::Later, |news, _| panic!("{news:?}"));
    let syncs = data.syncs();
    assert!(all_ok(
        &worker.submit(written_and_flushed(1, 0)).unwrap(),
        2
    ));
    worker.nudge();
    worker.sync_at_once(Finish::Later).unwrap();
    assert_eq!(data.syncs(), syncs + 1);
    assert_eq!(survivor(&data, &map), 7);
    assert!(all_ok(
        &worker.submit(written_and_flushed(3, 0)).unwrap(),
        2
    ));
    worker.nudge();
    // Only keeps a worker that never syncs from hanging.
    let patience = Instant::now() + Duration::from_secs(20);
    while data.syncs() == syncs + 1 && Instant::now() < patience {
        thread::yield_now();
    }
    assert_eq!(data.syncs(), syncs + 2);
}

#[test]
fn who_goes_live_waits_for_its_flushes_from_then_on() {
    let bench = bench(1, Finish::Later);
    let worker = &bench.worker;
    assert!(all_ok(
        &worker.submit(written_and_flushed(1, 0)).unwrap(),
        2
    ));
    worker.sync_at_once(Finish::Done).unwrap();
    let syncs = bench.files[0].0.syncs();
    assert!(worker.submit(written_and_flushed(3, 0)).unwrap().is_empty());
    assert!(all_ok(&told(&bench, 2), 2));
    assert_eq!(bench.files[0].0.syncs(), syncs + 1);
}

#[test]
fn a_late_sync_that_fails_is_told_to_the_next_flush_and_to_whoever_goes_live() {
    let bench = bench(1, Finish::Later);
    bench.worker.submit(written_and_flushed(1, 0)).unwrap();
    bench.files[0].0.fail(true);
    assert!(matches!(
        bench.worker.sync_at_once(Finish::Later),
        Err(SyncError::Disk(DiskError::Sync { disk: 0, .. }))
    ));
    bench.files[0].0.fail(false);
    let flush = vec![request(3, 0, DiskOp::Flush)];
    assert!(all_ok(&bench.worker.submit(flush).unwrap(), 1));
    bench.worker.nudge();
    assert!(told(&bench, 1)[0].result.is_err());
    assert!(bench.worker.sync_at_once(Finish::Done).is_err());
}

/// A flush that is finished early is durable when it is told to be.
#[test]
fn a_flush_ahead_is_told_of_once_it_is_durable() {
    let (sender, news) = mpsc::channel();
    let (worker, data, map) = watched(Finish::Ahead, move |news, data| {
        sender.send((news, data.syncs())).unwrap();
    });
    let syncs = data.syncs();
    assert!(all_ok(
        &worker.submit(written_and_flushed(1, 0)).unwrap(),
        2
    ));
    let (durable, at) = news.recv().unwrap();
    assert!(matches!(durable, DiskNews::Durable(RequestNumber(2))));
    assert_eq!(at, syncs + 1);
    assert_eq!(survivor(&data, &map), 7);
    // A sync that fails takes the word back, and nothing is called durable.
    data.fail(true);
    while worker.shared.lock().busy {
        thread::yield_now();
    }
    assert!(all_ok(
        &worker.submit(written_and_flushed(3, 0)).unwrap(),
        2
    ));
    worker.stop().unwrap();
    let rest: Vec<DiskNews> = news.iter().map(|(news, _)| news).collect();
    assert!(!rest.is_empty());
    for news in rest {
        let DiskNews::Finished(failed) = news else {
            panic!("{news:?}");
        };
        assert!(failed.iter().all(|done| done.result.is_err()));
    }
}

/// What a flush was to make durable is not there: the flush itself succeeding means nothing.
#[test]
fn nothing_is_called_durable_after_a_write_that_failed() {
    let (sender, news) = mpsc::channel();
    let (worker, ..) = watched(Finish::Ahead, move |news, _| sender.send(news).unwrap());
    let flush = |number| request(number, 0, DiskOp::Flush);
    let beyond = vec![write(1, 0, SIZE, 7, 512), flush(2)];
    assert!(all_ok(&worker.submit(beyond).unwrap(), 2));
    worker.submit(vec![flush(3)]).unwrap();
    worker.stop().unwrap();
    let news: Vec<_> = news.iter().collect();
    assert!(matches!(
        &news[0],
        DiskNews::Finished(failed) if failed[0].result.is_err()
    ));
    let durable = |one: &DiskNews| matches!(one, DiskNews::Durable(_));
    assert!(!news.iter().any(durable), "{news:?}");
}

/// A power failure must not leave what was written after a flush without what was before it.
#[test]
fn nothing_is_written_past_a_flush_ahead_before_it_is_durable() {
    let (sender, news) = mpsc::channel();
    let (worker, ..) = watched(Finish::Ahead, move |news, data| {
        if let DiskNews::Durable(flush) = news {
            // Everything survives that was written by now.
            let written = data.crash(|| true);
            let mut later = [0];
            written.read_exact_at(&mut later, 512).unwrap();
            sender.send((flush.0, later[0])).unwrap();
        }
    });
    // As if the second had come before the worker woke up for the first.
    let mut queue = worker.shared.lock();
    for (requests, finished) in [
        (written_and_flushed(1, 0), true),
        (written_and_flushed(3, 512), false),
    ] {
        queue.bytes += requests.iter().map(weight).sum::<usize>();
        queue.tasks.push_back(Task::Requests { requests, finished });
    }
    drop(queue);
    worker.shared.changed.notify_all();
    assert_eq!(news.recv().unwrap(), (2, 0));
    assert_eq!(news.recv().unwrap(), (4, 7));
}

/// Flushes that come while one is under way wait for it, so that they pile up and share a sync.
#[test]
fn one_flush_at_a_time_runs_ahead() {
    let gate = Arc::new(Mutex::new(()));
    let theirs = Arc::clone(&gate);
    let (worker, data, _) = watched(Finish::Ahead, move |_, _| drop(theirs.lock()));
    // Opens before the worker is dropped, which waits for its thread.
    let held = gate.lock().unwrap();
    let syncs = data.syncs();
    assert!(all_ok(
        &worker.submit(written_and_flushed(1, 0)).unwrap(),
        2
    ));
    // The worker comes to the gate with the first, or is on its way.
    for number in 2..10 {
        let again = worker.submit(written_and_flushed(number * 2, 512 * number));
        assert!(again.unwrap().is_empty());
    }
    drop(held);
    worker.stop().unwrap();
    assert!(data.syncs() <= syncs + 3, "{} syncs", data.syncs() - syncs);
}
