use std::os::unix::net::UnixStream;
use std::sync::mpsc::channel;

use super::*;

fn host() -> (ProcessHost, std::sync::mpsc::Sender<Stamped>, UnixStream) {
    let (sender, inbox) = channel();
    let (ours, theirs) = UnixStream::pair().expect("a socket");
    theirs.set_nonblocking(true).expect("an option");
    (made(inbox, ours), sender, theirs)
}

fn made(inbox: Receiver<Stamped>, agent: UnixStream) -> ProcessHost {
    let voice = Voice::new(agent);
    let pulse = Pulse::new(voice.clone());
    ProcessHost::new(inbox, voice, Arc::new(pulse))
}

fn flushed(number: u64) -> Stamped {
    stamped(Inbox::Disk(DiskNews::Finished(vec![DiskCompletion {
        number: RequestNumber(number),
        result: Ok(DiskData::Flushed),
    }])))
}

fn output(number: u64) -> Output {
    Output {
        number: replay_log::FrameNumber(number),
        needs: replay_log::LogIndex(number),
        kind: vmm::host::OutputKind::Frame,
        bytes: Bytes::from_static(b"answer"),
    }
}

fn answer(host: &mut ProcessHost, number: u64) {
    host.output(output(number)).expect("taken");
    host.send().expect("sent");
}

/// The numbers of the outputs that have been said.
fn said(theirs: &UnixStream) -> Vec<u64> {
    let number = |message| match message {
        FromVm::Output(output) => output.number.0,
        other => panic!("{other:?}"),
    };
    all_said(theirs).into_iter().map(number).collect()
}

fn all_said(theirs: &UnixStream) -> Vec<FromVm> {
    let mut bytes = Vec::new();
    let end = std::io::Read::read_to_end(&mut &*theirs, &mut bytes);
    assert!(end.is_err(), "nothing more is there, and nobody has left");
    let mut all = Vec::new();
    let mut rest = &bytes[..];
    while let Some((message, used)) = ipc::decode(rest).expect("messages") {
        all.push(message);
        rest = &rest[used..];
    }
    all
}

/// Whoever asks hears of a disk that does nothing, and not of one that takes its time.
#[test]
fn a_ping_is_answered_by_the_thread_and_its_disk() {
    let (mut host, sender, theirs) = host();
    host.holds = true;
    let ping = |host: &mut ProcessHost| {
        let ping = Inbox::Agent(vec![ToVm::Ping { kick: true }]);
        sender.send(stamped(ping)).expect("sent");
        host.wait(None);
        let mut said = all_said(&theirs);
        assert!(said.len() == 1, "{said:?}");
        said.remove(0)
    };
    assert!(matches!(ping(&mut host), FromVm::Pong));
    host.sort(flushed(2));
    host.arrival(Sources::default()).expect("no failure");
    answer(&mut host, 1);
    assert!(matches!(ping(&mut host), FromVm::Pong), "it has just begun");
    assert!(matches!(ping(&mut host), FromVm::Busy));
    host.sort(flushed(4));
    assert!(matches!(ping(&mut host), FromVm::Pong), "it does something");
    assert!(matches!(ping(&mut host), FromVm::Busy));
    host.owed = 1;
    host.held.clear();
    assert!(matches!(ping(&mut host), FromVm::Busy), "a read is owed");
    host.owed = 0;
    assert!(matches!(ping(&mut host), FromVm::Pong));
}

#[test]
fn what_follows_a_flush_leaves_when_it_is_durable() {
    let (mut host, sender, theirs) = host();
    host.holds = true;
    sender.send(flushed(2)).expect("sent");
    answer(&mut host, 1);
    assert_eq!(said(&theirs), [1], "the machine does not know of the flush");
    let told = host.arrival(Sources::default()).expect("no failure");
    assert!(matches!(
        told,
        Some(Came {
            what: FromOutside::Disk(_),
            ..
        })
    ));
    answer(&mut host, 2);
    assert!(said(&theirs).is_empty());
    sender
        .send(stamped(Inbox::Disk(DiskNews::Durable(RequestNumber(2)))))
        .expect("sent");
    host.wait(None);
    assert_eq!(said(&theirs), [2]);
    answer(&mut host, 3);
    assert_eq!(said(&theirs), [3]);
}

#[test]
fn a_guest_with_much_to_say_waits_for_its_disk() {
    let (mut host, sender, theirs) = host();
    host.holds = true;
    sender.send(flushed(2)).expect("sent");
    host.arrival(Sources::default()).expect("no failure");
    host.held_bytes = HELD_MOST;
    // Comes while the machine waits in the middle of its output.
    sender
        .send(stamped(Inbox::Disk(DiskNews::Durable(RequestNumber(2)))))
        .expect("sent");
    answer(&mut host, 1);
    assert_eq!(said(&theirs), [1]);
    sender.send(flushed(4)).expect("sent");
    host.arrival(Sources::default()).expect("no failure");
    sender
        .send(stamped(Inbox::Disk(DiskNews::Finished(vec![
            DiskCompletion {
                number: RequestNumber(4),
                result: Err(vmm::disk::DiskError::NoSuchDisk {
                    number: RequestNumber(4),
                    disk: 0,
                }),
            },
        ]))))
        .expect("sent");
    host.output(output(2)).expect_err("its disk has failed");
    assert!(said(&theirs).is_empty());
}

/// A flush that a replica's log has not shown to be finished is finished by whoever goes live,
/// and nothing more is heard of it.
#[test]
fn no_answer_waits_for_a_flush_from_before_going_live() {
    use vmm::disk::{Base, Durability, Overlay};
    let folder = tempfile::tempdir().expect("a folder");
    let overlay = Overlay::open(folder.path(), Base::empty(1 << 20), Durability::Sync);
    let (mut host, sender, theirs) = host();
    let notify = move |news| drop(sender.send(stamped(Inbox::Disk(news))));
    let disks = vec![overlay.expect("a disk")];
    let worker = DiskWorker::new(disks, Finish::Later, Box::new(notify)).expect("a thread");
    host.set_worker(worker, Finish::Later);
    let flush = DiskRequest {
        number: RequestNumber(7),
        disk: 0,
        op: DiskOp::Flush,
    };
    host.submit(vec![flush]).expect("submitted");
    host.sync_disks().expect("durable");
    let told = host.arrival(Sources::default()).expect("no failure");
    assert!(matches!(
        told,
        Some(Came {
            what: FromOutside::Disk(_),
            ..
        })
    ));
    answer(&mut host, 1);
    assert_eq!(said(&theirs), [1]);
}

/// While the machine asks for arrivals, everything that has come is taken in. An order among it
/// must not wait for something else to come.
#[test]
fn an_order_that_was_found_on_the_way_ends_the_wait() {
    let (sender, inbox) = channel();
    let (ours, _theirs) = UnixStream::pair().expect("a socket");
    let mut host = made(inbox, ours);
    sender
        .send(stamped(Inbox::Agent(vec![ToVm::Pause(true)])))
        .expect("sent");
    let arrival = host.arrival(Sources::default()).expect("no failure");
    assert!(arrival.is_none());
    // Would never end: nothing else comes.
    host.wait(None);
    assert!(matches!(host.control(), Some(ToVm::Pause(true))));
    sender.send(stamped(Inbox::Lost(None))).expect("sent");
    assert!(!host.arrival_waits(Sources::default()));
    host.wait(None);
    assert!(host.lost());
}
