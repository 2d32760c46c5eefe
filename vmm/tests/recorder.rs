//! The recorder by hand, without a machine: what it writes when much arrives at once, and what it
//! asks of the run loop.

use bytes::Bytes;
use replay_log::batch::MAX_BATCH;
use replay_log::{
    Arrival, Entry, Group, GroupBody, Header, ImageDigest, MarkDigest, Position, Term,
};
use vmm::devices::layout::MAX_FRAME;
use vmm::recorder::{Policy, Recorder};
use vmm::tape::{Command, CpuState, Next, Pending, Query, Sources, Tape};
use vmm::testing::MemoryHost;

/// How far the host's clock moves with each look at it.
const STEP: u64 = 10;

const ALL: Sources = Sources {
    frame: true,
    console: 16,
};

fn header() -> Header {
    Header {
        machine_model: vmm::MACHINE_MODEL,
        image: ImageDigest::default(),
        config: Bytes::new(),
        disks: Vec::new(),
        term: Term(1),
        boot: [0; 16],
    }
}

/// A recorder that has to do nothing by itself.
fn recorder(policy: Policy) -> Recorder<MemoryHost> {
    let policy = Policy {
        mark_age: u64::MAX,
        mark_landmarks: u64::MAX,
        ..policy
    };
    Recorder::start(MemoryHost::new(STEP, &[], 1), policy, header()).expect("starts")
}

/// Lets everything that waits arrive at one landmark.
fn deliver_all(tape: &mut Recorder<MemoryHost>) -> Vec<Arrival> {
    let mut arrivals = Vec::new();
    while let Next::Deliver(delivery) = tape
        .next(Position(1), CpuState::Ready, ALL)
        .expect("the recorder takes everything")
    {
        arrivals.push(delivery.arrival);
    }
    tape.flush().expect("ships");
    arrivals
}

/// The arrivals that the log has.
fn logged(tape: &mut Recorder<MemoryHost>) -> Vec<Arrival> {
    let entries = tape.host().batches.iter().flat_map(|batch| {
        assert!(batch.payload().len() <= MAX_BATCH);
        batch.decode().expect("decodes")
    });
    entries
        .filter_map(|entry| match entry {
            Entry::Group(Group {
                body: GroupBody::Arrival(arrival),
                ..
            }) => Some(arrival),
            _ => None,
        })
        .collect()
}

/// More than a batch can hold may wait for one landmark, whatever the policy says of batches.
#[test]
fn more_than_a_batch_arrives_at_one_landmark() {
    for batch_bytes in [Policy::default().batch_bytes, usize::MAX] {
        let mut tape = recorder(Policy {
            batch_bytes,
            batch_age: u64::MAX,
            ..Policy::default()
        });
        for n in 0..1_500_u32 {
            let frame: Bytes = (0..1_000).map(|i| (i * 7 + n) as u8).collect();
            tape.host().send_frame(frame);
        }
        let delivered = deliver_all(&mut tape);
        assert_eq!(delivered.len(), 1_500);
        assert_eq!(logged(&mut tape), delivered);
    }
}

/// What no guest can take costs the log nothing but a number, so that no gateway can fill it.
#[test]
fn of_frames_that_are_too_long_only_the_number_is_logged() {
    let mut tape = recorder(Policy::default());
    for len in [60, MAX_FRAME + 1, 2_048, MAX_FRAME] {
        tape.host().send_frame(vec![7; len].into());
    }
    let delivered = deliver_all(&mut tape);
    let told: Vec<(u64, usize)> = delivered
        .iter()
        .map(|arrival| match arrival {
            Arrival::Frame { source, bytes } => (source.number.0, bytes.len()),
            other => panic!("{other:?} was not sent"),
        })
        .collect();
    assert_eq!(told, [(1, 60), (2, 0), (3, 0), (4, MAX_FRAME)]);
    assert_eq!(logged(&mut tape), delivered);
    assert_eq!(tape.overlong(), 2);
}

/// Completing an exit's I/O costs an entry into the kernel: only for what can be done then.
#[test]
fn the_machine_is_not_stopped_for_what_it_cannot_take() {
    let mut tape = recorder(Policy::default());
    let full = Sources {
        frame: false,
        console: 0,
    };
    let pending = |tape: &mut Recorder<MemoryHost>, can_take| {
        tape.pending(Position(1), CpuState::Ready, can_take)
            .expect("the recorder stands")
    };
    tape.host().send_frame(vec![7; 60].into());
    tape.host().type_console(Bytes::from_static(b"x"));
    assert_eq!(pending(&mut tape, full), Pending::Nothing);
    assert_eq!(pending(&mut tape, ALL), Pending::Act);
}

/// A batch that is old enough leaves without the machine being stopped for it.
#[test]
fn a_due_batch_leaves_at_once() {
    let mut tape = recorder(Policy::default());
    let shipped = tape.host().batches.len();
    tape.answer(Query::Clock).expect("answers");
    tape.close(Position(1)).expect("closes");
    let pending = |tape: &mut Recorder<MemoryHost>| {
        tape.pending(Position(1), CpuState::Ready, Sources::default())
            .expect("the recorder stands")
    };
    assert_eq!(pending(&mut tape), Pending::Nothing);
    assert_eq!(tape.host().batches.len(), shipped);
    tape.host().advance(Policy::default().batch_age);
    assert_eq!(pending(&mut tape), Pending::Nothing);
    assert_eq!(tape.host().batches.len(), shipped + 1);
}

/// Outputs wait for the log that led to them where somebody may go on from it, and there alone.
#[test]
fn an_output_takes_its_batch_along_under_output_commit_only() {
    for (policy, with_it) in [(Policy::default(), 1), (Policy::recording(), 0)] {
        let mut tape = recorder(policy);
        let shipped = tape.host().batches.len();
        let frame = Command::Frame(Bytes::from_static(b"answer"));
        tape.command(frame).expect("takes it");
        tape.close(Position(1)).expect("closes");
        assert_eq!(tape.host().outputs.len(), 1);
        assert_eq!(tape.host().batches.len(), shipped + with_it);
        tape.host().advance(policy.batch_age);
        let pending = tape.pending(Position(1), CpuState::Ready, ALL);
        assert!(matches!(pending, Ok(Pending::Nothing)));
        assert_eq!(tape.host().batches.len(), shipped + 1);
    }
}

/// The wait of what arrives lasts until the guest is entered with nothing left to tell it of.
#[test]
fn the_longest_wait_is_measured_from_the_host_to_the_guest() {
    let mut tape = recorder(Policy::default());
    let next = |tape: &mut Recorder<MemoryHost>| {
        tape.next(Position(1), CpuState::Ready, ALL)
            .expect("the recorder stands")
    };
    assert_eq!(next(&mut tape), Next::Run);
    tape.entering(false);
    assert_eq!(tape.longest_deferral(), 0, "nothing has come");
    tape.host().advance(1_000_000);
    tape.host().send_frame(vec![7; 60].into());
    // The guest makes no exit for so long, and takes no interrupts for a while after.
    tape.host().advance(5_000_000);
    assert!(matches!(next(&mut tape), Next::Deliver(_)));
    assert_eq!(next(&mut tape), Next::Run);
    tape.entering(true);
    tape.host().advance(3_000_000);
    tape.entering(false);
    let longest = tape.longest_deferral();
    assert!((8_000_000..9_000_000).contains(&longest), "{longest}");
    // What waits for a machine that is held back does not wait for the guest.
    tape.pause(true);
    next(&mut tape);
    tape.host().send_frame(vec![7; 60].into());
    tape.host().advance(50_000_000);
    tape.pause(false);
    while let Next::Mark | Next::Pause = next(&mut tape) {}
    tape.entering(false);
    assert_eq!(tape.longest_deferral(), longest);
}

/// What a guest does between two marks.
#[derive(Clone, Copy)]
enum Guest {
    Runs,
    /// For nothing in particular.
    Waits,
    /// After it has done something.
    WaitsAnew,
}

/// How long after a mark that took so long the recorder asks for the next one.
fn until_the_next_mark(policy: Policy, guest: Guest, took: u64) -> u64 {
    const LOOK: u64 = 400_000;
    let mut tape = Recorder::start(MemoryHost::new(0, &[], 1), policy, header()).expect("starts");
    let mut marked = None;
    for look in 1.. {
        let (at, cpu) = match guest {
            Guest::Runs => (Position(look), CpuState::Ready),
            Guest::Waits => (Position(1), CpuState::Halted),
            Guest::WaitsAnew if marked == Some(look - 1) => (Position(look), CpuState::Ready),
            Guest::WaitsAnew => (Position(marked.unwrap_or_default() + 1), CpuState::Halted),
        };
        if let CpuState::Ready = cpu {
            tape.close(at).expect("closes");
        }
        tape.host().advance(LOOK);
        let next = tape.next(at, cpu, ALL);
        let since = marked.map(|marked| (look - marked) * LOOK);
        match (next.expect("the recorder stands"), since) {
            (Next::Mark, Some(since)) => return since,
            (Next::Mark, None) => {
                tape.host().advance(took);
                let digest = MarkDigest::default();
                tape.mark(at, digest).expect("is written");
                marked = Some(look);
            }
            _ => {}
        }
    }
    unreachable!("positions do not end")
}

/// A host that makes marks slowly makes fewer, down to a bound: a higher one where a replica executes
/// what they have shown it.
#[test]
fn marks_take_a_small_part_of_the_time() {
    let busy = |policy, took| until_the_next_mark(policy, Guest::Runs, took);
    for policy in [Policy::default(), Policy::recording()] {
        assert_eq!(busy(policy, 10_000), 2_000_000);
        assert_eq!(busy(policy, 100_000), 12_800_000);
    }
    assert_eq!(busy(Policy::default(), 100_000_000), 100_000_000);
    assert_eq!(busy(Policy::recording(), 100_000_000), 250_000_000);
}

#[test]
fn marks_of_a_waiting_guest_take_a_small_part_of_the_time() {
    let waiting = |took| until_the_next_mark(Policy::default(), Guest::Waits, took);
    assert_eq!(waiting(100_000), 250_000_000);
    assert_eq!(waiting(5_000_000), 640_000_000);
    assert_eq!(waiting(1_000_000_000), 1_000_000_000);
}

/// Where all is slow, every wait is a long one.
#[test]
fn marks_of_a_guest_that_waits_often_take_a_small_part_of_the_time() {
    let waiting = |took| until_the_next_mark(Policy::default(), Guest::WaitsAnew, took);
    assert_eq!(waiting(100_000), 12_800_000);
    assert_eq!(waiting(500_000), 64_000_000);
    assert_eq!(waiting(100_000_000), 100_000_000);
}
