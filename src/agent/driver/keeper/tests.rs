//! Logs on disks that hang, are full, fail, and come back.

mod theatre;

use replay_log::conformance::sample_batches;
use replay_log::{BatchBuilder, Entry, Mark, MarkDigest, MemoryStore, Position, Store as _, Term};
use tempfile::TempDir;
use tokio::sync::mpsc::unbounded_channel;

use super::*;
use crate::agent::testing::{SmallDisk, skipped};
use theatre::{Disk, Theatre};

/// Only keeps a broken keeper from hanging.
const PATIENCE: Duration = Duration::from_secs(20);
/// So long waits a store of these tests before it tries again what was refused.
const PAUSE: Duration = Duration::from_millis(5);

const ANY: u64 = u64::MAX;

fn keeping(sync: SyncPolicy, budget: u64) -> Keeping {
    Keeping {
        files: FileOptions {
            sync,
            ..FileOptions::default()
        },
        budget,
    }
}

fn batch(after: LogTip, digest: u64) -> Batch {
    let mut builder = BatchBuilder::new(Term(1), after.index);
    let mark = Mark {
        at: Position(1),
        digest: MarkDigest(digest),
    };
    builder.push(&Entry::Mark(mark)).expect("room");
    builder.finish().expect("an entry")
}

/// A batch of about 600 kB that does not compress.
fn large(after: LogTip, seed: u64) -> Batch {
    let mut builder = BatchBuilder::new(Term(1), after.index);
    let mut digest = seed;
    for at in 0..60_000 {
        digest = digest.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(23) ^ 0x55;
        let mark = Mark {
            at: Position(at),
            digest: MarkDigest(digest),
        };
        builder.push(&Entry::Mark(mark)).expect("room");
    }
    builder.finish().expect("entries")
}

fn is_full(one: &LogNews) -> bool {
    matches!(one, LogNews::Full(_))
}

fn is_room(one: &LogNews) -> bool {
    matches!(one, LogNews::Room)
}

/// A log that is given up while its store waits for the disk: nothing that it reports counts, and
/// nothing of it is found in the next.
#[tokio::test]
async fn a_log_is_dropped_when_its_store_is_back() {
    let folder = TempDir::new().expect("a folder");
    let (dir, disk) = (folder.path().join("log"), Arc::new(Disk::default()));
    let mut here = Theatre::on(&disk, &dir, keeping(SyncPolicy::Explicit, ANY));
    disk.hang(true);
    here.append(batch(here.log.tip(), 1));
    here.sync();
    here.log.drop_log(Incarnation(2), false);
    let second = batch(LogTip::default(), 2);
    here.append(second.clone());
    here.sync();
    assert_eq!(
        here.read_all(LogIndex::START).await,
        std::slice::from_ref(&second)
    );
    disk.hang(false);
    let tip = second.tip(LogTip::default().chain);
    let news = here.until(|one| matches!(one, LogNews::Synced(..))).await;
    let told = |one: &LogNews| match one {
        LogNews::Stored(incarnation, at) | LogNews::Synced(incarnation, at) => {
            *incarnation == Incarnation(2) && *at == tip
        }
        _ => false,
    };
    assert!(news.iter().all(told), "{news:?}");
    here.log.close(PATIENCE).await;
    let store = FileStore::open(&dir, FileOptions::default()).expect("a log");
    assert_eq!(store.tip(), tip);
    assert!(!folder.path().join("log.aside-1").exists());
}

/// Each log that is set aside keeps a number of its own, over restarts, with all that it had.
#[tokio::test]
async fn logs_that_are_set_aside_are_never_replaced() {
    let folder = TempDir::new().expect("a folder");
    let dir = folder.path().join("log");
    let mut kept = Vec::new();
    for turn in 1..=3 {
        let mut here = Theatre::files(&dir, keeping(SyncPolicy::Never, ANY));
        let first = batch(LogTip::default(), turn);
        here.append(first.clone());
        here.log.drop_log(Incarnation(turn), true);
        kept.push(first);
        here.append(batch(LogTip::default(), 100));
        here.log.drop_log(Incarnation(turn + 10), false);
        here.log.close(PATIENCE).await;
    }
    for (turn, first) in kept.into_iter().enumerate() {
        let aside = folder.path().join(format!("log.aside-{}", turn + 1));
        let store = FileStore::open(&aside, FileOptions::default()).expect("the evidence");
        let read = store
            .read_from(LogIndex::START)
            .expect("readable")
            .next_batch();
        assert_eq!(read.expect("readable"), Some(first));
    }
}

/// A log that could not begin is begun when it can be.
#[tokio::test]
async fn a_log_that_cannot_begin_is_tried_again() {
    let folder = TempDir::new().expect("a folder");
    let (parent, hidden) = (folder.path().join("vm"), folder.path().join("hidden"));
    let dir = parent.join("log");
    let mut here = Theatre::files(&dir, keeping(SyncPolicy::EveryBatch, ANY));
    std::fs::rename(&parent, &hidden).expect("moved");
    std::fs::write(&parent, b"in the way").expect("written");
    here.log.drop_log(Incarnation(2), false);
    here.until(is_full).await;
    let first = batch(here.log.tip(), 1);
    here.append(first.clone());
    std::fs::remove_file(&parent).expect("removed");
    std::fs::rename(&hidden, &parent).expect("moved back");
    let news = here.until(is_room).await;
    let tip = first.tip(LogTip::default().chain);
    assert!(
        matches!(&news[..], [LogNews::Stored(Incarnation(2), at), LogNews::Room] if *at == tip),
        "{news:?}"
    );
}

/// A second log is ordered while the first cannot begin: the reason stays what the system said.
#[tokio::test]
async fn what_keeps_one_log_from_beginning_is_the_reason_of_the_next() {
    let folder = TempDir::new().expect("a folder");
    let (parent, hidden) = (folder.path().join("vm"), folder.path().join("hidden"));
    let mut here = Theatre::files(&parent.join("log"), keeping(SyncPolicy::EveryBatch, ANY));
    here.append(batch(LogTip::default(), 1));
    here.stored_through(here.log.tip()).await;
    std::fs::rename(&parent, &hidden).expect("moved");
    std::fs::write(&parent, b"in the way").expect("written");
    here.log.drop_log(Incarnation(2), true);
    here.until(is_full).await;
    let reason = here.log.full().map(str::to_owned);
    here.log.drop_log(Incarnation(3), false);
    // Of reports, which come at each attempt, the last is surely from after the order.
    for _ in 0..3 {
        here.hear().await;
    }
    let late = now().plus(Span::from_millis(4_000));
    here.log.watch(late, &mut here.news);
    assert_eq!(here.log.full(), reason.as_deref());
}

#[tokio::test]
async fn damaged_logs_are_set_aside() {
    let folder = TempDir::new().expect("a folder");
    let dir = folder.path().join("log");
    for turn in 1..=2 {
        let mut store = FileStore::open(&dir, FileOptions::default()).expect("a log");
        store.append(&batch(store.tip(), turn)).expect("appended");
        drop(store);
        let segment = std::fs::read_dir(&dir).expect("listed").flatten();
        let mut segments =
            segment.filter(|file| file.path().extension().is_some_and(|e| e == "open"));
        let segment = segments.next().expect("a segment").path();
        let mut bytes = std::fs::read(&segment).expect("read");
        bytes[20] ^= 1;
        std::fs::write(&segment, &bytes).expect("written");
        let policy = keeping(SyncPolicy::Never, ANY);
        let (returns, _) = unbounded_channel();
        let opened = LogKeeper::open(&dir, policy, Incarnation(1), returns.clone());
        assert!(matches!(opened, Err(OpenError::Damaged(_))));
        let anew = LogKeeper::open_anew(&dir, policy, Incarnation(1), returns);
        let (mut anew, aside) = anew.expect("an empty log");
        let kept = folder.path().join(format!("log.aside-{turn}"));
        assert_eq!(aside.as_ref(), Some(&kept));
        assert_eq!(anew.tip(), LogTip::default());
        anew.close(PATIENCE).await;
        let kept = kept.join(segment.file_name().expect("a name"));
        assert_eq!(std::fs::read(kept).expect("the evidence"), bytes);
    }
}

/// What was acknowledged from memory stays true, nothing more is acknowledged, and all of it is
/// written in order when there is room.
#[tokio::test]
async fn a_full_disk_acknowledges_nothing_more_and_loses_nothing() {
    let store = MemoryStore::new();
    let batches = sample_batches(1, Term(1), LogIndex::START, 30);
    let mut here = Theatre::memory(&store, keeping(SyncPolicy::Never, ANY));
    for one in &batches[..10] {
        here.append(one.clone());
    }
    let held = here.log.tip();
    here.stored_through(held).await;
    store.limit(Some(0));
    here.append(batches[10].clone());
    let held = here.log.tip();
    assert!(
        matches!(here.news.pop(), Some(LogNews::Stored(_, at)) if at == held),
        "held in memory is held"
    );
    let news = here.until(is_full).await;
    assert_eq!(news.len(), 1, "{news:?}");
    for one in &batches[11..] {
        here.append(one.clone());
    }
    for _ in 0..3 {
        // Tried again and again.
        here.hear().await;
    }
    assert!(
        here.news.is_empty(),
        "nothing is acknowledged: {:?}",
        here.news
    );
    assert!(here.log.full().is_some_and(|why| why.contains("make room")));
    assert_eq!(here.read_all(LogIndex::START).await, batches);
    store.limit(None);
    let news = here.until(is_room).await;
    let told: Vec<_> = news.iter().filter(|one| is_full(one)).collect();
    assert!(told.is_empty(), "{news:?}");
    let end = here.log.tip();
    assert!(
        news.iter()
            .any(|one| matches!(one, LogNews::Stored(_, at) if *at == end)),
        "{news:?}"
    );
    assert_eq!(store.tip(), end);
    assert!(here.log.full().is_none());
}

/// With acknowledgements from disk what was stored before the disk was full is made sure all the same.
#[tokio::test]
async fn what_a_full_disk_took_before_is_synced() {
    let store = MemoryStore::new();
    let batches = sample_batches(1, Term(1), LogIndex::START, 3);
    let mut here = Theatre::memory(&store, keeping(SyncPolicy::Explicit, ANY));
    here.append(batches[0].clone());
    let before = here.log.tip();
    here.stored_through(before).await;
    store.limit(Some(store.bytes()));
    here.append(batches[1].clone());
    here.sync();
    let synced = |through: LogTip| move |one: &LogNews| matches!(one, LogNews::Synced(_, at) if *at == through);
    let mut news = here.until(synced(before)).await;
    let oldest = here.log.oldest_sync(now());
    assert!(oldest.is_some(), "the sync that was asked for is not done");
    store.limit(None);
    let end = here.log.tip();
    news.extend(here.until(synced(end)).await);
    assert!(news.iter().any(is_full), "{news:?}");
    assert!(here.log.oldest_sync(now()).is_none());
}

/// The keeper itself never waits, says that the store does not come back, and goes on when it does.
#[tokio::test]
async fn a_hung_disk_is_full_after_a_while() {
    let folder = TempDir::new().expect("a folder");
    let (dir, disk) = (folder.path().join("log"), Arc::new(Disk::default()));
    for sync in [SyncPolicy::Never, SyncPolicy::Explicit] {
        let mut here = Theatre::on(&disk, &dir, keeping(sync, ANY));
        disk.hang(true);
        here.append(batch(here.log.tip(), 1));
        here.sync();
        here.log
            .watch(now().plus(Span::from_millis(1_000)), &mut here.news);
        assert!(!here.news.iter().any(is_full), "{:?}", here.news);
        let late = now().plus(Span::from_millis(4_000));
        assert!(here.log.oldest_sync(late) >= Some(Span::from_millis(3_900)));
        here.news.clear();
        here.log.watch(late, &mut here.news);
        here.log.watch(late, &mut here.news);
        let told = std::mem::take(&mut here.news);
        assert!(
            matches!(&told[..], [LogNews::Full(why)] if why.contains("not come back")),
            "{told:?}"
        );
        here.append(batch(here.log.tip(), 2));
        assert!(here.news.is_empty(), "{:?}", here.news);
        disk.hang(false);
        let news = here.until(is_room).await;
        let end = here.log.tip();
        let held = |one: &LogNews| matches!(one, LogNews::Stored(_, at) if *at == end);
        assert!(news.iter().any(held), "{news:?}");
        here.log.close(PATIENCE).await;
    }
}

/// Memory has a bound: beyond the first the store is full, beyond the second nothing more is taken. Who
/// appends is told where the log ends, and it goes on from there when there is room.
#[tokio::test]
async fn a_queue_has_an_end() {
    let folder = TempDir::new().expect("a folder");
    let (dir, disk) = (folder.path().join("log"), Arc::new(Disk::default()));
    let mut here = Theatre::on(&disk, &dir, keeping(SyncPolicy::Never, ANY));
    disk.hang(true);
    let (mut seed, mut taken) = (0, Vec::new());
    loop {
        seed += 1;
        let one = large(here.log.tip(), seed);
        here.append(one.clone());
        if here.log.tip().index != one.end() {
            let short = here.news.pop();
            let end = here.log.tip();
            assert!(
                matches!(short, Some(LogNews::Short(Incarnation(1), at)) if at == end),
                "{short:?}"
            );
            break;
        }
        let full = here.log.waiting_bytes() >= QUEUE_BYTES;
        // A slow machine may come to the bound in time first.
        assert!(!full || here.log.full().is_some());
        taken.push(one);
        assert!(seed < 1_000, "there is no end");
    }
    assert!(here.log.waiting_bytes() <= QUEUE_MAX);
    assert_eq!(here.news.iter().filter(|one| is_full(one)).count(), 1);
    // What comes after something that was not taken is not taken either.
    let tip = here.log.tip();
    here.append(batch(
        LogTip {
            index: tip.index.plus(5),
            ..tip
        },
        1,
    ));
    assert_eq!(here.log.tip(), tip);
    let short = |one: &LogNews| matches!(one, LogNews::Short(..));
    assert!(!here.news.iter().any(short), "it was told where to go on");
    disk.hang(false);
    here.until(is_room).await;
    // Room for the newest only.
    assert!(here.log.recent_bytes <= RECENT_BYTES);
    assert_eq!(here.read_all(LogIndex::START).await, taken);
    here.append(batch(tip, 1));
    here.stored_through(here.log.tip()).await;
}

/// A failed sync is told once, nothing more is taken, and the log is there as evidence.
#[tokio::test]
async fn a_failed_sync_ends_a_log_and_is_no_full_disk() {
    let folder = TempDir::new().expect("a folder");
    let (dir, disk) = (folder.path().join("log"), Arc::new(Disk::default()));
    let mut here = Theatre::on(&disk, &dir, keeping(SyncPolicy::Explicit, ANY));
    let first = batch(LogTip::default(), 1);
    here.append(first.clone());
    *disk.fails_syncs.lock().expect("no panic") = true;
    here.sync();
    let news = here.until(|one| matches!(one, LogNews::Failed(_))).await;
    assert!(
        !news
            .iter()
            .any(|one| matches!(one, LogNews::Synced(..)) || is_full(one))
    );
    let tip = here.log.tip();
    here.append(batch(tip, 2));
    here.sync();
    assert_eq!(here.log.tip(), tip);
    assert!(here.news.is_empty(), "{:?}", here.news);
    *disk.fails_syncs.lock().expect("no panic") = false;
    here.log.drop_log(Incarnation(2), true);
    here.append(first.clone());
    here.sync();
    let synced = here.until(|one| matches!(one, LogNews::Synced(..))).await;
    let kept = folder.path().join("log.aside-1");
    let where_it_is = |one: &LogNews| matches!(one, LogNews::SetAside(at) if *at == kept);
    assert_eq!(
        synced.iter().filter(|one| where_it_is(one)).count(),
        1,
        "{synced:?}"
    );
    assert!(matches!(synced.last(), Some(LogNews::Synced(Incarnation(2), at)) if *at == tip));
    here.log.close(PATIENCE).await;
    let store = FileStore::open(&folder.path().join("log.aside-1"), FileOptions::default());
    assert_eq!(store.expect("the evidence").tip(), tip);
}

/// Nobody who asks for old parts of the log waits for the disk, and all get them.
#[tokio::test]
async fn old_parts_are_read_elsewhere() {
    let folder = TempDir::new().expect("a folder");
    let (dir, disk) = (folder.path().join("log"), Arc::new(Disk::default()));
    let batches = sample_batches(1, Term(1), LogIndex::START, 40);
    let mut store = FileStore::open(&dir, FileOptions::default()).expect("a log");
    for one in &batches {
        store.append(one).expect("room");
    }
    drop(store);
    let mut here = Theatre::on(&disk, &dir, keeping(SyncPolicy::Never, ANY));
    disk.hang(true);
    let mut cursor = Cursor::new(LogIndex::START);
    assert!(here.log.read(&mut cursor).expect("readable").is_none());
    let peer = HostName::new("b").expect("a name");
    here.log
        .look_up(peer.clone(), batches[7].end(), &mut here.news);
    here.log.look_up(
        peer.clone(),
        LogIndex(batches[7].end().0 - 1),
        &mut here.news,
    );
    assert!(here.log.read(&mut cursor).expect("readable").is_none());
    assert!(here.news.is_empty());
    // What is in memory goes on meanwhile.
    let tip = here.log.tip();
    here.append(batch(tip, 1));
    let mut near = Cursor::new(tip.index);
    assert!(here.log.read(&mut near).expect("readable").is_some());
    here.log.look_up(peer, here.log.tip().index, &mut here.news);
    let end = here.log.tip();
    let found = |one: &LogNews| matches!(one, LogNews::TipAt(_, _, tip) if *tip == Some(end));
    assert!(here.news.iter().any(found), "{:?}", here.news);
    here.news.clear();
    disk.hang(false);
    let chain = batches[..=7]
        .iter()
        .fold(LogTip::default(), |tip, one| one.tip(tip.chain));
    let answer = |one: &LogNews| matches!(one, LogNews::TipAt(_, at, _) if *at == chain.index);
    let there = here.until(answer).await;
    assert!(
        there
            .iter()
            .any(|one| matches!(one, LogNews::TipAt(_, _, tip) if *tip == Some(chain)))
    );
    while cursor.next() < tip.index {
        match here.log.read(&mut cursor).expect("readable") {
            Some(one) => assert!(batches.contains(&one)),
            None => here.hear().await,
        }
    }
}

/// A log comes to its budget: told long before, then it takes nothing more, and nothing is deleted.
#[tokio::test]
async fn a_budget_is_a_limit_that_is_told() {
    let folder = TempDir::new().expect("a folder");
    let dir = folder.path().join("log");
    let policy = keeping(SyncPolicy::Never, 8 << 20);
    let mut here = Theatre::files(&dir, policy);
    let mut taken = Vec::new();
    while here.log.full().is_none() {
        let one = large(here.log.tip(), taken.len() as u64 + 1);
        here.append(one.clone());
        taken.push(one);
        here.hear().await;
        assert!(taken.len() < 100, "there is no limit");
    }
    let told = here.news.iter().filter_map(|one| match one {
        LogNews::Filling { percent, .. } => Some(*percent),
        _ => None,
    });
    assert_eq!(told.collect::<Vec<_>>(), LEVELS);
    assert!(here.log.over_budget());
    assert!(
        here.log
            .full()
            .is_some_and(|why| why.contains("budget of 8 MiB"))
    );
    assert_eq!(here.read_all(LogIndex::START).await, taken);
    here.log.close(PATIENCE).await;
    // A larger budget after a restart, and it goes on.
    let mut here = Theatre::files(&dir, keeping(SyncPolicy::Never, 1 << 30));
    assert!(!here.log.over_budget());
    here.append(batch(here.log.tip(), 1));
    here.stored_through(here.log.tip()).await;
}

/// A log whose beginning is gone, or is none, says so instead of looking empty.
#[tokio::test]
async fn a_log_that_cannot_be_replayed_says_why() {
    let folder = TempDir::new().expect("a folder");
    let dir = folder.path().join("log");
    let mut here = Theatre::files(&dir, keeping(SyncPolicy::Never, ANY));
    assert!(matches!(here.log.header(), Ok(None)));
    here.append(batch(LogTip::default(), 1));
    assert!(matches!(here.log.header(), Err(HeaderError::None)));
    here.log.drop_log(Incarnation(2), false);
    assert!(matches!(here.log.header(), Ok(None)));
    here.log.close(PATIENCE).await;
    let options = FileOptions {
        segment_bytes: 1 << 10,
        ..FileOptions::default()
    };
    let mut store = FileStore::open(&dir, options).expect("a log");
    for one in sample_batches(1, Term(1), LogIndex::START, 100) {
        store.append(&one).expect("room");
    }
    drop(store);
    let files = std::fs::read_dir(&dir).expect("listed").flatten();
    let oldest = files.map(|file| file.path()).min().expect("segments");
    std::fs::remove_file(oldest).expect("removed");
    let here = Theatre::files(&dir, keeping(SyncPolicy::Never, ANY));
    let gone = here.log.header();
    assert!(
        matches!(gone, Err(HeaderError::Read(ReadError::Dropped { .. }))),
        "{gone:?}"
    );
}

/// The same with a real file system that is full.
#[tokio::test]
async fn a_real_full_disk_acknowledges_nothing_more_and_loses_nothing() {
    let disk = match SmallDisk::mount("size=64m") {
        Ok(disk) => disk,
        Err(why) => {
            return skipped(
                "a_real_full_disk_acknowledges_nothing_more_and_loses_nothing",
                &why,
            );
        }
    };
    let ballast = disk.path().join("ballast");
    for sync in [SyncPolicy::Never, SyncPolicy::Explicit] {
        let dir = disk.path().join("log");
        std::fs::write(&ballast, vec![1; 61 << 20]).expect("room");
        let mut here = Theatre::files(&dir, keeping(sync, ANY));
        let mut taken = Vec::new();
        while here.log.full().is_none() {
            let one = large(here.log.tip(), taken.len() as u64 + 1);
            here.append(one.clone());
            here.sync();
            taken.push(one);
            here.hear().await;
            assert!(taken.len() < 100, "there is no limit");
        }
        let why = here.log.full().expect("it is").to_owned();
        assert!(why.contains("No space left"), "{why}");
        here.news.clear();
        let more = large(here.log.tip(), 1_000);
        here.append(more.clone());
        taken.push(more);
        here.hear().await;
        let acknowledged = |one: &LogNews| matches!(one, LogNews::Stored(_, at) if at.index == here.log.tip().index);
        assert!(!here.news.iter().any(acknowledged), "{:?}", here.news);
        assert_eq!(here.read_all(LogIndex::START).await, taken);
        std::fs::remove_file(&ballast).expect("removed");
        here.until(is_room).await;
        here.log.close(PATIENCE).await;
        let mut here = Theatre::files(&dir, keeping(sync, ANY));
        assert_eq!(here.read_all(LogIndex::START).await, taken);
        here.log.close(PATIENCE).await;
        std::fs::remove_dir_all(&dir).expect("removed");
    }
}

/// Where the owner chose to go on, the budget is no limit for the primary.
#[tokio::test]
async fn a_log_may_grow_beyond_its_budget_where_that_was_chosen() {
    let folder = TempDir::new().expect("a folder");
    let dir = folder.path().join("log");
    let mut here = Theatre::files(&dir, keeping(SyncPolicy::Explicit, 8 << 20));
    let mut number = 0;
    while here.log.full().is_none() {
        number += 1;
        assert!(number < 100, "there is no limit");
        let one = large(here.log.tip(), number);
        here.append(one);
        here.hear().await;
    }
    here.log.set_unlimited(true);
    here.until(|one| matches!(one, LogNews::Room)).await;
    assert!(here.log.over_budget(), "and it is said");
    let one = large(here.log.tip(), 1);
    here.append(one);
    here.stored_through(here.log.tip()).await;
}

/// What acknowledging means is agreed upon before the log has its first entry, and the store is opened
/// anew for it: what is read later is read of that store.
#[tokio::test]
async fn a_log_that_is_kept_otherwise_from_the_beginning_is_read_from_its_files() {
    let folder = TempDir::new().expect("a folder");
    let dir = folder.path().join("log");
    let mut here = Theatre::files(&dir, keeping(SyncPolicy::Never, ANY));
    here.log.set_options(keeping(SyncPolicy::Explicit, ANY));
    let mut taken = Vec::new();
    // More than is kept in memory.
    for number in 1..=20 {
        let one = large(here.log.tip(), number);
        here.append(one.clone());
        taken.push(one);
    }
    here.stored_through(here.log.tip()).await;
    assert_eq!(here.read_all(LogIndex::START).await, taken);
}
