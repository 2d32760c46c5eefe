use proptest::prelude::*;

use super::super::testing::{Fuse, Volatile};
use super::*;

const SECTOR: usize = 512;
/// Two groups of chunks and a part of a third one, the last chunk not whole.
const SECTORS: usize = 33 * 128 + 3;
const SIZE: usize = SECTORS * SECTOR;

fn content() -> Vec<u8> {
    (0..SIZE).map(|n| (n / SECTOR % 251) as u8 + 1).collect()
}

fn patterned(folder: &Path) -> Base {
    Base::seal(folder, &mut content().as_slice()).unwrap()
}

fn everything<F: Storage>(overlay: &Overlay<F>) -> Vec<u8> {
    overlay.read(0, SIZE as u32).unwrap().to_vec()
}

fn covered(touched: &[Range<u64>], sector: usize) -> bool {
    let offset = (sector * SECTOR) as u64;
    touched.iter().any(|range| range.contains(&offset))
}

#[derive(Clone, Debug)]
enum Step {
    Write(usize, usize, u8),
    Flush,
    Discard,
    Durability(Durability),
    /// Another process opens it.
    Reopen,
}

fn write() -> impl Strategy<Value = Step> {
    let place = prop_oneof![0..8_usize, 120..136_usize, SECTORS - 8..SECTORS, 0..SECTORS];
    let count = prop_oneof![4 => 1..4_usize, 1 => 1..300_usize];
    (place, count, any::<u8>())
        .prop_map(|(at, count, fill)| Step::Write(at, count.min(SECTORS - at), fill))
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        12 => write(),
        3 => Just(Step::Flush),
        1 => Just(Step::Discard),
        1 => Just(Step::Durability(Durability::PageCache)),
        1 => Just(Step::Durability(Durability::Sync)),
        1 => Just(Step::Reopen),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// On real files: what was written is read, whatever happens in between short of a crash.
    #[test]
    fn a_disk_holds_what_was_written(
        empty in any::<bool>(),
        steps in prop::collection::vec(step(), 1..40),
    ) {
        let folder = tempfile::tempdir().unwrap();
        let base = if empty { Base::empty(SIZE as u64) } else { patterned(folder.path()) };
        let clean = if empty { vec![0; SIZE] } else { content() };
        let mut model = clean.clone();
        let place = folder.path().join("disk");
        let mut durability = Durability::Sync;
        let mut overlay = Overlay::open(&place, base.clone(), durability).unwrap();
        for step in steps {
            match step {
                Step::Write(at, count, fill) => {
                    let range = at * SECTOR..(at + count) * SECTOR;
                    model[range.clone()].fill(fill);
                    overlay.write(range.start as u64, &model[range.clone()]).unwrap();
                    // With the sectors before and after.
                    let around = range.start.saturating_sub(SECTOR)..(range.end + SECTOR).min(SIZE);
                    let len = around.len() as u32;
                    let got = overlay.read(around.start as u64, len).unwrap();
                    prop_assert!(got == model[around]);
                }
                Step::Flush => overlay.flush().unwrap(),
                Step::Discard => {
                    overlay.discard_all().unwrap();
                    prop_assert!(overlay.touched().is_empty());
                    model.clone_from(&clean);
                }
                Step::Durability(wanted) => {
                    durability = wanted;
                    overlay.set_durability(durability);
                }
                Step::Reopen => {
                    // Without a flush, a process that ends loses what a power failure would.
                    overlay.flush().unwrap();
                    drop(overlay);
                    overlay = Overlay::open(&place, base.clone(), durability).unwrap();
                    prop_assert!(everything(&overlay) == model);
                }
            }
        }
        prop_assert!(everything(&overlay) == model);
        let touched = overlay.touched();
        for sector in 0..SECTORS {
            let range = sector * SECTOR..(sector + 1) * SECTOR;
            prop_assert!(model[range.clone()] == clean[range] || covered(&touched, sector));
        }
        let sealed = overlay.seal_into_base(folder.path()).unwrap();
        prop_assert_eq!(sealed.name().digest, *blake3::hash(&model).as_bytes());
        sealed.verify().unwrap();
    }

    /// Power fails at any point, in the middle of anything: each sector holds what the last flush
    /// covered or what was written to it since; and what differs from the base is known.
    #[test]
    fn a_power_failure_keeps_what_was_flushed(
        empty in any::<bool>(),
        lives in prop::collection::vec(life(), 1..5),
    ) {
        let folder = tempfile::tempdir().unwrap();
        let base = if empty { Base::empty(SIZE as u64) } else { patterned(folder.path()) };
        let start = if empty { vec![0; SIZE] } else { content() };
        let mut allowed: Allowed = start.chunks(SECTOR).map(|bytes| vec![bytes[0]]).collect();
        let fuse = Fuse::default();
        let (mut data, mut map) = (Volatile::on(&fuse), Volatile::on(&fuse));
        let mut overlay =
            Overlay::create(data.clone(), map.clone(), base.clone(), Durability::Sync).unwrap();
        for Life { steps, last, last_operations, mut seed } in lives {
            for step in steps {
                perform(&step, &mut overlay, &mut allowed, &start).unwrap();
            }
            fuse.set(last_operations);
            let _ = perform(&last, &mut overlay, &mut allowed, &start);
            fuse.set(u64::MAX);
            // A small generator decides which sectors survive.
            let mut survives = || {
                seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                seed >> 63 == 1
            };
            let next = (data.crash(&mut survives), map.crash(&mut survives));
            (data, map) = next;
            overlay = Overlay::assemble(
                data.clone(), map.clone(), base.clone(), Durability::Sync,
            ).unwrap();
            let now = everything(&overlay);
            let touched = overlay.touched();
            for (sector, (bytes, values)) in now.chunks(SECTOR).zip(&mut allowed).enumerate() {
                let first = bytes[0];
                prop_assert!(bytes.iter().all(|byte| *byte == first), "a torn sector");
                prop_assert!(
                    values.contains(&first),
                    "sector {} holds {} and not one of {:?}", sector, first, values
                );
                prop_assert!(first == start[sector * SECTOR] || covered(&touched, sector));
                *values = vec![first];
            }
        }
    }
}

/// What each sector may hold after a power failure, the last value being the one it holds without.
/// All bytes of a sector are equal.
type Allowed = Vec<Vec<u8>>;

/// What a host does before its power fails, which happens after some operations of the last step.
#[derive(Clone, Debug)]
struct Life {
    steps: Vec<Step>,
    last: Step,
    last_operations: u64,
    seed: u64,
}

fn life() -> impl Strategy<Value = Life> {
    let steps = prop::collection::vec(prop_oneof![8 => write(), 1 => Just(Step::Flush)], 1..8);
    let last = prop_oneof![2 => write(), 3 => Just(Step::Flush), 2 => Just(Step::Discard)];
    (steps, last, 0..8_u64, any::<u64>()).prop_map(|(steps, last, last_operations, seed)| Life {
        steps,
        last,
        last_operations,
        seed,
    })
}

fn perform(
    step: &Step,
    overlay: &mut Overlay<Volatile>,
    allowed: &mut Allowed,
    start: &[u8],
) -> Result<(), OverlayError> {
    match *step {
        Step::Write(at, count, fill) => {
            for values in &mut allowed[at..at + count] {
                values.push(fill);
            }
            overlay.write((at * SECTOR) as u64, &vec![fill; count * SECTOR])
        }
        Step::Discard => {
            for (values, bytes) in allowed.iter_mut().zip(start.chunks(SECTOR)) {
                values.push(bytes[0]);
            }
            overlay.discard_all()
        }
        _ => {
            overlay.flush()?;
            let now = everything(overlay);
            for (values, bytes) in allowed.iter_mut().zip(now.chunks(SECTOR)) {
                assert_eq!(values.last(), Some(&bytes[0]));
                *values = vec![bytes[0]];
            }
            Ok(())
        }
    }
}

#[test]
fn nothing_beyond_the_disk_is_read_or_written() {
    let base = Base::empty(SIZE as u64);
    let (data, map) = (Volatile::default(), Volatile::default());
    let mut overlay = Overlay::create(data, map, base, Durability::Sync).unwrap();
    for offset in [SIZE as u64 - 511, SIZE as u64, u64::MAX] {
        assert!(matches!(
            overlay.read(offset, 512),
            Err(OverlayError::OutOfRange { .. })
        ));
        assert!(matches!(
            overlay.write(offset, &[0; 512]),
            Err(OverlayError::OutOfRange { .. })
        ));
    }
    assert!(overlay.read(SIZE as u64, 0).unwrap().is_empty());
}

#[test]
fn a_failed_sync_is_never_taken_back() {
    let base = Base::empty(SIZE as u64);
    let (data, map) = (Volatile::default(), Volatile::default());
    let mut overlay = Overlay::create(data.clone(), map, base, Durability::Sync).unwrap();
    overlay.write(0, &[1; 512]).unwrap();
    data.fail(true);
    assert!(matches!(overlay.flush(), Err(OverlayError::Io { .. })));
    data.fail(false);
    assert!(matches!(overlay.flush(), Err(OverlayError::Failed)));
    assert!(matches!(overlay.read(0, 512), Err(OverlayError::Failed)));
    assert!(matches!(
        overlay.write(0, &[1; 512]),
        Err(OverlayError::Failed)
    ));
}

#[test]
fn a_discard_cut_short_leaves_a_disk_that_can_be_used() {
    for operations in 0..8 {
        let base = Base::empty(SIZE as u64);
        let fuse = Fuse::default();
        let (data, map) = (Volatile::on(&fuse), Volatile::on(&fuse));
        let (d, m) = (data.clone(), map.clone());
        let mut overlay = Overlay::create(d, m, base.clone(), Durability::Sync).unwrap();
        overlay.write(0, &[1; 512]).unwrap();
        overlay.flush().unwrap();
        fuse.set(operations);
        let _ = overlay.discard_all();
        fuse.set(u64::MAX);
        let (data, map) = (data.crash(|| true), map.crash(|| true));
        let mut overlay = Overlay::assemble(data, map, base, Durability::Sync).unwrap();
        // In the middle of a chunk: the rest of it is read from the file.
        overlay.write(4219 * 512, &[2; 512]).unwrap();
        let now = everything(&overlay);
        assert!(now[..512] == [0; 512] || now[..512] == [1; 512]);
        assert_eq!(now[4219 * 512..4220 * 512], [2; 512]);
    }
}

#[test]
fn a_write_that_failed_half_way_leaves_the_chunk_as_its_base() {
    let folder = tempfile::tempdir().unwrap();
    let base = patterned(folder.path());
    let (data, map) = (Volatile::default(), Volatile::default());
    let mut overlay = Overlay::create(data.clone(), map, base, Durability::Sync).unwrap();
    data.fail(true);
    assert!(overlay.write(512, &[9; 512]).is_err());
    data.fail(false);
    assert!(everything(&overlay) == content());
    overlay.write(512, &[9; 512]).unwrap();
    let mut expected = content();
    expected[512..1024].fill(9);
    assert!(everything(&overlay) == expected);
}

#[test]
fn a_flush_without_writes_and_one_in_the_page_cache_sync_nothing() {
    let base = Base::empty(SIZE as u64);
    let (data, map) = (Volatile::default(), Volatile::default());
    let mut overlay =
        Overlay::create(data.clone(), map.clone(), base, Durability::PageCache).unwrap();
    let syncs = (data.syncs(), map.syncs());
    overlay.write(0, &[1; 512]).unwrap();
    overlay.flush().unwrap();
    assert_eq!((data.syncs(), map.syncs()), syncs);
    // A copy that becomes primary: its first flush covers what earlier ones did not.
    overlay.set_durability(Durability::Sync);
    overlay.flush().unwrap();
    assert_eq!((data.syncs(), map.syncs()), (syncs.0 + 1, syncs.1 + 1));
    overlay.flush().unwrap();
    assert_eq!((data.syncs(), map.syncs()), (syncs.0 + 1, syncs.1 + 1));
}

#[test]
fn an_overlay_knows_its_base_and_its_user() {
    let folder = tempfile::tempdir().unwrap();
    let place = folder.path().join("disk");
    let base = patterned(folder.path());
    let overlay = Overlay::open(&place, base.clone(), Durability::Sync).unwrap();
    let second = Overlay::open(&place, base.clone(), Durability::Sync);
    assert!(matches!(second, Err(OverlayError::InUse { .. })));
    drop(overlay);
    let other = Overlay::open(&place, Base::empty(SIZE as u64), Durability::Sync);
    assert!(matches!(other, Err(OverlayError::OtherBase { found, .. }) if found == base.name()));
    fs::write(place.join("map"), vec![0xee; 8192]).unwrap();
    let corrupt = Overlay::open(&place, base.clone(), Durability::Sync);
    assert!(matches!(corrupt, Err(OverlayError::UnknownMap)));
    fs::write(place.join("map"), [0xee; 3]).unwrap();
    let short = Overlay::open(&place, base, Durability::Sync);
    assert!(matches!(short, Err(OverlayError::Io { .. })));
}
