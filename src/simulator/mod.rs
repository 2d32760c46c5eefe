//! A whole cluster in one thread, from one seed: the production protocol, run loop, recorder and
//! replayer over the model machine, and simulated networks, disks, clocks, a keeper, a gateway and
//! clients; everything fails. See README.md.

mod actions;
mod disks;
mod edges;
mod facts;
mod faults;
mod gateway;
mod gray;
mod guest;
mod host;
mod ids;
mod invariants;
mod judge;
mod lines;
mod network;
mod options;
mod patience;
mod queue;
mod random;
mod seat;
mod setup;
mod storage;
mod streams;
mod trace;
mod vm;
mod watch;
mod witness;
mod world;

pub use options::{Counts, Options, Report, Violation};

use self::world::World;

/// Simulates one seed.
pub fn run(seed: u64, options: Options) -> Report {
    World::new(seed, options).run(seed)
}

/// Simulates seeds one after another, on as many threads as the machine has cores, and stops
/// early when `progress` says so. It gets every report, in no particular order, and says whether
/// to go on.
pub fn run_many(
    seeds: std::ops::Range<u64>,
    options: Options,
    mut progress: impl FnMut(Report) -> bool,
) {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let next = std::sync::atomic::AtomicU64::new(seeds.start);
    let (sender, reports) = std::sync::mpsc::sync_channel(threads);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            let (sender, next, end) = (sender.clone(), &next, seeds.end);
            scope.spawn(move || {
                loop {
                    let seed = next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                    if seed >= end || sender.send(run(seed, options)).is_err() {
                        return;
                    }
                }
            });
        }
        drop(sender);
        for report in reports {
            if !progress(report) {
                return;
            }
        }
    });
}
