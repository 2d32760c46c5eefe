//! The keeper without the network: its batches, and disks that fail.

use std::fs;
use std::sync::atomic::Ordering;

use super::*;
use crate::agent::witness::store::Broken;
use crate::agent::witness::testing::{record, signer, version, vm};
use crate::protocol::Version;

fn open(folder: &Path) -> FileKeeper {
    FileKeeper::open(folder, signer()).expect("records")
}

fn host(name: &str) -> Identity {
    Identity::host(&name.parse().expect("a name"))
}

fn change(vm: VmName, expect: Option<Version>, new: Record) -> Change {
    let by = host(new.primary.host.as_str());
    Change {
        vm,
        expect,
        new,
        seen: None,
        by,
    }
}

async fn kept(keeper: &FileKeeper) -> Option<Record> {
    let kept = keeper.read(&vm()).await.expect("an answer");
    kept.committed.map(|committed| committed.record)
}

#[tokio::test]
async fn records_that_are_damaged_keep_the_witness_from_starting() {
    let folder = tempfile::tempdir().expect("a folder");
    let keeper = open(folder.path());
    for epoch in 1..=3 {
        let expect = version(1, epoch - 1).filter(|_| epoch > 1);
        let new = record(1, epoch, "a", &["b"]);
        keeper.swap(change(vm(), expect, new)).await.expect("kept");
    }
    drop(keeper);
    let file = folder.path().join("slot-0");
    let mut bytes = fs::read(&file).expect("readable");
    let at = bytes
        .windows(3)
        .position(|bytes| bytes == b"\"b\"")
        .expect("a change");
    bytes[at + 1] = b'a';
    fs::write(&file, bytes).expect("written");
    assert!(matches!(
        FileKeeper::open(folder.path(), signer()),
        Err(OpenError::Damaged { path, .. }) if path == file
    ));
}

#[tokio::test]
async fn a_keeper_whose_disk_fails_promises_nothing_and_goes_on_when_it_is_well() {
    for broken in [Broken::Write, Broken::Sync] {
        let folder = tempfile::tempdir().expect("a folder");
        let keeper = open(folder.path());
        let first = record(1, 1, "a", &["b"]);
        let second = record(1, 2, "a", &[]);
        let swap = keeper.swap(change(vm(), None, first.clone())).await;
        assert!(matches!(swap, Ok(Swap::Done(_))));
        *lock(&keeper.disk().broken) = Some(broken);
        for _ in 0..2 {
            let failed = keeper
                .swap(change(vm(), version(1, 1), second.clone()))
                .await;
            assert!(matches!(failed, Err(KeeperError::Disk { .. })));
            assert!(keeper.health().refuses_writes.is_some());
        }
        assert_eq!(kept(&keeper).await, Some(first));
        *lock(&keeper.disk().broken) = None;
        let swap = keeper
            .swap(change(vm(), version(1, 1), second.clone()))
            .await;
        assert!(matches!(swap, Ok(Swap::Done(_))), "{swap:?}");
        assert_eq!(keeper.health(), KeeperHealth::default());
        drop(keeper);
        assert_eq!(kept(&open(folder.path())).await, Some(second));
    }
}

#[tokio::test]
async fn a_keeper_whose_disk_fails_tries_again_though_nobody_asks() {
    let folder = tempfile::tempdir().expect("a folder");
    let keeper = open(folder.path());
    *lock(&keeper.disk().broken) = Some(Broken::Write);
    let failed = keeper
        .swap(change(vm(), None, record(1, 1, "a", &[])))
        .await;
    assert!(failed.is_err());
    *lock(&keeper.disk().broken) = None;
    let until = std::time::Instant::now() + TRY_AGAIN * 5;
    while keeper.health().refuses_writes.is_some() {
        assert!(std::time::Instant::now() < until, "it does not try");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn changes_of_many_vms_share_a_write_and_reads_wait_for_none() {
    const VMS: usize = 200;
    let folder = tempfile::tempdir().expect("a folder");
    let keeper = Arc::new(open(folder.path()));
    let (opener, gate) = channel();
    *lock(&keeper.disk().gate) = Some(gate);
    let mut asked = tokio::task::JoinSet::new();
    for number in 0..VMS {
        let vm = VmName::new(&format!("vm{number}")).expect("a name");
        let asking = Arc::clone(&keeper);
        asked.spawn(async move {
            asking
                .swap(change(vm, None, record(1, 1, "a", &["b"])))
                .await
        });
    }
    // Everybody has asked when nobody can go on.
    for _ in 0..2 * VMS {
        tokio::task::yield_now().await;
    }
    assert_eq!(kept(&keeper).await, None, "and reading goes on");
    drop(opener);
    while let Some(swap) = asked.join_next().await {
        assert!(matches!(swap.expect("no panic"), Ok(Swap::Done(_))));
    }
    // The first alone, perhaps, and all others.
    let writes = keeper.disk().writes.load(Ordering::SeqCst);
    assert!(writes <= 2, "{writes} writes");
    assert_eq!(keeper.list().await.expect("an answer").len(), VMS);
}

#[tokio::test]
async fn of_two_that_expect_the_same_in_one_batch_one_is_done() {
    let folder = tempfile::tempdir().expect("a folder");
    let keeper = open(folder.path());
    let (one, other) = (record(1, 1, "a", &[]), record(1, 1, "b", &[]));
    let (first, second, again) = tokio::join!(
        keeper.swap(change(vm(), None, one.clone())),
        keeper.swap(change(vm(), None, other)),
        keeper.swap(change(vm(), None, one.clone())),
    );
    assert!(matches!(first, Ok(Swap::Done(done)) if done.record == one));
    assert!(matches!(second, Ok(Swap::Conflict(Some(found))) if found.record == one));
    assert!(matches!(again, Ok(Swap::Done(done)) if done.record == one));
}

fn numbered(number: usize) -> VmName {
    VmName::new(&format!("vm{number}")).expect("a name")
}

/// A host that makes up names, by new records or by what it says it has seen, takes the room of nobody
/// else, and goes on with the names that it has.
#[tokio::test]
async fn one_host_cannot_take_the_names_of_all() {
    let folder = tempfile::tempdir().expect("a folder");
    let keeper = Arc::new(open(folder.path()));
    let mut asked = tokio::task::JoinSet::new();
    for number in 0..VMS_OF_A_HOST + 10 {
        let keeper = Arc::clone(&keeper);
        asked.spawn(async move {
            let new = record(1, 1, "a", &["b"]);
            if number % 2 == 0 {
                let swap = keeper.swap(change(numbered(number), None, new)).await;
                swap.map(drop)
            } else {
                let noted = keeper.set_back(numbered(number), new.seen(), host("a"));
                noted.await
            }
        });
    }
    let (mut taken, mut refused) = (0, 0);
    while let Some(answer) = asked.join_next().await {
        match answer.expect("no panic") {
            Ok(()) => taken += 1,
            Err(KeeperError::TooManyOfOne { by }) if by == host("a") => refused += 1,
            Err(other) => panic!("{other}"),
        }
    }
    assert_eq!((taken, refused), (VMS_OF_A_HOST, 10));
    let keeper = Arc::try_unwrap(keeper).ok().expect("the only one");
    drop(keeper);
    // It is remembered, and is about that host alone.
    let keeper = open(folder.path());
    let swap = async |change| keeper.swap(change).await;
    let another = change(vm(), None, record(1, 1, "a", &[]));
    let refusal = swap(another).await.expect_err("too many");
    assert!(refusal.to_string().contains("another host"), "{refusal}");
    let elsewhere = swap(change(vm(), None, record(1, 1, "b", &["a"]))).await;
    assert!(matches!(elsewhere, Ok(Swap::Done(_))), "{elsewhere:?}");
    let known = keeper.list().await.expect("an answer");
    let (of_a, kept) = known
        .iter()
        .find(|(_, kept)| kept.committed.is_some())
        .expect("half of them");
    assert!(kept.set_back.is_none());
    let goes_on = swap(change(of_a.clone(), version(1, 1), record(1, 2, "a", &[])));
    assert!(matches!(goes_on.await, Ok(Swap::Done(_))));
}
