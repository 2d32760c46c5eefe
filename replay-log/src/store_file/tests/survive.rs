//! Arbitrary logs, arbitrary use, arbitrary bytes.

use proptest::prelude::*;

use super::*;
use crate::batch::BatchBuilder;
use crate::testing::arbitrary_log;

#[derive(Clone, Debug)]
enum Order {
    Append(usize),
    Truncate(prop::sample::Index),
    Reopen,
    Read(usize),
}

fn order() -> impl Strategy<Value = Order> {
    prop_oneof![
        4 => (1..20usize).prop_map(Order::Append),
        1 => any::<prop::sample::Index>().prop_map(Order::Truncate),
        1 => Just(Order::Reopen),
        3 => (1..40usize).prop_map(Order::Read),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn arbitrary_logs(
        entries in arbitrary_log(60), each in 1..6usize,
        segment_bytes in 100..4000u64, checkpoint_bytes in 1..2000u64, reopen in 1..20usize,
    ) {
        let dir = TempDir::new().unwrap();
        let options = FileOptions { sync: SyncPolicy::Never, segment_bytes, checkpoint_bytes };
        let mut builder = BatchBuilder::new(Term(1), LogIndex::START);
        let mut store = FileStore::open(dir.path(), options).unwrap();
        for (i, some) in entries.chunks(each).enumerate() {
            for entry in some {
                builder.push(entry).unwrap();
            }
            store.append(&builder.finish().unwrap()).unwrap();
            if i % reopen == 0 {
                drop(store);
                store = FileStore::open(dir.path(), options).unwrap();
            }
        }
        let read: Vec<_> = read_all(&store).unwrap().iter().flat_map(|b| b.decode().unwrap()).collect();
        prop_assert_eq!(read, entries);
    }

    /// Whatever is done in whatever order, a log in files is the list of batches it stands
    /// for, and its readers see nothing else.
    #[test]
    fn arbitrary_use(orders in prop::collection::vec(order(), 1..60)) {
        let dir = TempDir::new().unwrap();
        let mut store = FileStore::open(dir.path(), UNSYNCED).unwrap();
        let mut reader = store.read_from(LogIndex::START).unwrap();
        let (mut model, mut read) = (Vec::<Batch>::new(), Vec::<Batch>::new());
        for (turn, order) in orders.into_iter().enumerate() {
            match order {
                Order::Append(count) => {
                    let term = store.tip().term.next();
                    let more = sample_batches(turn as u64, term, store.tip().index, count);
                    for batch in &more {
                        store.append(batch).unwrap();
                    }
                    model.extend(more);
                }
                Order::Truncate(keep) => {
                    model.truncate(keep.index(model.len() + 1));
                    let end = model.last().map_or(LogIndex::START, Batch::end);
                    prop_assert_eq!(store.truncate(end).unwrap().index, end);
                }
                Order::Reopen => {
                    drop(store);
                    store = FileStore::open(dir.path(), UNSYNCED).unwrap();
                    reader = store.read_from(LogIndex::START).unwrap();
                    read.clear();
                }
                Order::Read(count) => match reader.next_batches(count * 50) {
                    Ok(batches) => read.extend(batches),
                    Err(ReadError::Truncated { to }) => {
                        prop_assert!(to < reader.position());
                        read.retain(|batch| batch.end() <= to);
                        reader = store.read_from(to).unwrap();
                    }
                    Err(error) => panic!("{error}"),
                },
            }
            let end = model.last().map_or(LogIndex::START, Batch::end);
            prop_assert_eq!(store.tip().index, end);
            prop_assert!(read.len() <= model.len() || reader.next_batch().is_err());
        }
        prop_assert_eq!(read_all(&store).unwrap(), &model[..]);
        prop_assert_eq!(inspect_all(dir.path()).0, &model[..]);
        let rest = std::iter::from_fn(|| reader.next_batch().transpose());
        if let Ok(rest) = rest.collect::<Result<Vec<_>, _>>() {
            read.extend(rest);
            prop_assert_eq!(read, model);
        }
    }

    #[test]
    fn arbitrary_bytes_are_refused(tail in prop::collection::vec(any::<u8>(), 0..300), header: bool) {
        let dir = TempDir::new().unwrap();
        let mut bytes = if header { format::header(LogTip::default()) } else { Vec::new() };
        bytes.extend(&tail);
        let path = dir.path().join(format!("{:020}.seg", 0));
        fs::write(&path, bytes).unwrap();
        prop_assert!(FileStore::open(dir.path(), SMALL).is_err());
        prop_assert_eq!(inspect_all(dir.path()).0, []);
    }
}
