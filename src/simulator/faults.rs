//! What goes wrong: which faults a seed has, when they come, and how they are repaired.

mod disks;
mod hostile;
mod keeper;
mod orders;

use replay_log::Store;

use super::facts::Fact;
use super::ids::{GatewayId, SeatId};
use super::queue::{MILLI, Moment, SECOND};
use super::random::Random;
use super::world::{Event, World};
use crate::protocol::{HostName, Input, Operator};

/// Something broken, as what has to be repaired.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    Crash(usize),
    Block(usize, usize),
    Isolation(usize),
    Deaf(usize),
    WitnessDown,
    WitnessSlow,
    WitnessRefuses,
    WitnessBlocked(usize),
    /// It does not reach a host.
    GatewayBlocked(GatewayId, usize),
    /// It reaches none.
    GatewayAway(GatewayId),
    SlowDisk(usize),
    Hung(usize),
    Full(usize),
    NoFiles(usize),
    SlowVm(usize),
    Loss(u64),
}

/// The kinds there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Kill,
    PowerLoss,
    KillPrimary,
    Pause,
    PausePrimary,
    Partition,
    OneWay,
    Bridge,
    Isolate,
    WitnessDown,
    WitnessBlocked,
    GatewayBlocked,
    GatewayRestart,
    SlowDisk,
    SlowVm,
    StoreFails,
    NewDisk,
    BadDisk,
    VmFails,
    Loss,
    Switchover,
    HungDisk,
    FullDisks,
    FullDisk,
    NoFiles,
    PutBack,
    LostTail,
    StoresFail,
    Deaf,
    WitnessSlow,
    WitnessRefuses,
    WitnessSetBack,
    WitnessEmptied,
    WitnessDownLong,
    Pair,
    Create,
    Remove,
    AcceptLoss,
    CloseLink,
    Stranger,
    Usurper,
}

/// What every seed may have.
const COMMON: [Kind; 21] = [
    Kind::Kill,
    Kind::PowerLoss,
    Kind::KillPrimary,
    Kind::Pause,
    Kind::PausePrimary,
    Kind::Partition,
    Kind::OneWay,
    Kind::Bridge,
    Kind::Isolate,
    Kind::WitnessDown,
    Kind::WitnessBlocked,
    Kind::GatewayBlocked,
    Kind::GatewayRestart,
    Kind::SlowDisk,
    Kind::SlowVm,
    Kind::StoreFails,
    Kind::NewDisk,
    Kind::BadDisk,
    Kind::VmFails,
    Kind::Loss,
    Kind::Switchover,
];

/// What a seed has or has not as a whole: disks, the keeper, an operator, connections, primaries that
/// hear nothing, and hosts or strangers that mean harm.
const FAMILIES: [&[Kind]; 6] = [
    &[
        Kind::HungDisk,
        Kind::FullDisks,
        Kind::FullDisk,
        Kind::NoFiles,
        Kind::PutBack,
        Kind::LostTail,
        Kind::StoresFail,
    ],
    &[
        Kind::WitnessSlow,
        Kind::WitnessRefuses,
        Kind::WitnessSetBack,
        Kind::WitnessEmptied,
        Kind::WitnessDownLong,
    ],
    &[
        Kind::Pair,
        Kind::Create,
        Kind::Remove,
        Kind::AcceptLoss,
        Kind::Switchover,
    ],
    &[Kind::CloseLink, Kind::OneWay, Kind::Loss],
    &[Kind::Deaf],
    &[Kind::Stranger, Kind::Usurper],
];

/// So long nothing else breaks when a primary hears nothing.
const DEAF_ALONE: Moment = 1_100 * MILLI;

/// The temperament of a seed.
#[derive(Clone, Debug)]
pub(super) struct Faults {
    kinds: Vec<Kind>,
    /// Mean time between two faults.
    gap: Moment,
    /// For how long faults come.
    pub(super) phase: Moment,
    /// One with a certificate whom no record concerns.
    pub(super) stranger: Option<HostName>,
}

impl Faults {
    pub(super) fn choose(random: &mut Random) -> Self {
        let share = random.between(150, 900);
        let mut kinds: Vec<_> = COMMON
            .into_iter()
            .filter(|_| random.chance(share))
            .collect();
        kinds.push(*random.pick(&[
            Kind::KillPrimary,
            Kind::PausePrimary,
            Kind::Partition,
            Kind::Bridge,
        ]));
        for family in FAMILIES {
            if random.chance(300) {
                // One of each for every common one: none of the others is drowned.
                kinds.extend(family.iter().filter(|_| random.chance(share.max(400))));
            }
        }
        let hostile = kinds.contains(&Kind::Stranger);
        // Patient seeds break little at a time, and for long.
        let patient = random.chance(80);
        Self {
            kinds,
            gap: if patient {
                2 * SECOND
            } else {
                *random.pick(&[60, 150, 300, 700]) * MILLI
            },
            phase: if patient {
                random.between(8, 16) * SECOND
            } else {
                random.between(2, 5) * SECOND
            },
            stranger: hostile.then(|| HostName::new("stranger").expect("a name made of letters")),
        }
    }

    /// Among all that goes wrong, folders are put back from backups often.
    pub(super) fn put_folders_back(&mut self) {
        let others = self.kinds.len();
        self.kinds.extend(vec![Kind::PutBack; others.max(4)]);
    }

    fn is_patient(&self) -> bool {
        self.gap >= 2 * SECOND
    }
}

impl World {
    pub(super) fn primary(&self, vm: usize) -> Option<SeatId> {
        let record = self.witness.record(vm)?;
        let host = self.number_of(&record.primary.host)?;
        Some(SeatId { vm, host })
    }

    /// One of several. Where there is only one, nothing is drawn.
    fn any_of(&mut self, several: usize) -> usize {
        if several > 1 {
            self.random.below(several as u64) as usize
        } else {
            0
        }
    }

    pub(super) fn any_vm(&mut self) -> usize {
        self.any_of(self.guests.len())
    }

    fn any_gateway(&mut self, vm: usize) -> GatewayId {
        let number = self.any_of(self.guests[vm].gateways.len());
        GatewayId { vm, number }
    }

    pub(super) fn any_host(&mut self) -> usize {
        let hosts = self.hosts.len() as u64;
        self.random.below(hosts) as usize
    }

    pub(super) fn break_something(&mut self) {
        if self.is_healed() {
            return;
        }
        let gap = self.faults.gap;
        let mut next = self.now + gap / 4 + self.random.below(gap * 3 / 2);
        let kind = *self.random.pick(&self.faults.kinds);
        if kind == Kind::Deaf {
            // What it does wrong it does a second later, and anything else would end it first.
            next += DEAF_ALONE;
        }
        self.queue.plan(next, Event::Break);
        self.counts.faults += 1;
        let host = self.any_host();
        let vm = self.any_vm();
        let mut seat = SeatId { vm, host };
        if matches!(kind, Kind::KillPrimary | Kind::PausePrimary | Kind::Bridge) {
            seat = self.primary(vm).unwrap_or(seat);
        }
        if self.options.trace {
            self.trace.say(self.now, &format!("*** {kind:?} at {seat}"));
        }
        self.disturbed();
        self.inflict(kind, seat);
    }

    /// What goes wrong with a host goes wrong for every VM on it.
    fn inflict(&mut self, kind: Kind, seat: SeatId) {
        let host = seat.host;
        let short = self.random.between(20, 400) * MILLI;
        let most = if self.faults.is_patient() { 12 } else { 2 };
        let long = self.random.between(100, most * 1_000) * MILLI;
        match kind {
            Kind::Kill | Kind::KillPrimary => self.crash(host, false, long),
            Kind::PowerLoss => self.crash(host, true, long),
            Kind::Pause | Kind::PausePrimary => {
                let span = if self.random.chance(400) { long } else { short };
                let until = &mut self.hosts[host].paused_until;
                *until = (*until).max(self.now + span);
            }
            Kind::Partition | Kind::OneWay => {
                let other = self.any_host();
                if other != host {
                    self.block(host, other, long);
                    if kind == Kind::Partition {
                        self.block(other, host, long);
                    }
                }
            }
            Kind::Bridge => self.bridge(host),
            Kind::Isolate => {
                for other in (0..self.hosts.len()).filter(|other| *other != host) {
                    self.network.block(host, other);
                    self.network.block(other, host);
                }
                self.block_gateways(host);
                self.witness_blocks[host] += 1;
                self.repair_after(long, Fault::Isolation(host));
            }
            Kind::WitnessDown => {
                self.witness.down += 1;
                self.repair_after(long, Fault::WitnessDown);
            }
            Kind::WitnessBlocked => {
                self.witness_blocks[host] += 1;
                self.repair_after(long, Fault::WitnessBlocked(host));
            }
            Kind::GatewayBlocked => self.block_gateway(seat, short, long),
            Kind::GatewayRestart => {
                let gateway = self.any_gateway(seat.vm);
                self.gateway(gateway).restart();
            }
            Kind::SlowDisk => {
                self.hosts[host].drive.slow += 1;
                self.repair_after(long, Fault::SlowDisk(host));
            }
            Kind::SlowVm => {
                self.hosts[host].slow_vm += 1;
                self.repair_after(long, Fault::SlowVm(host));
            }
            Kind::StoreFails => {
                if self.can_spare(seat) && self.hosts[host].paused_until <= self.now {
                    let reason = "the simulator broke it".to_owned();
                    self.plan_input(0, seat, Input::StoreFailed { reason });
                }
            }
            Kind::NewDisk => {
                if self.can_spare_all(host) && self.hosts[host].is_up() {
                    self.crash(host, true, long);
                    for vm in 0..self.guests.len() {
                        self.seats[SeatId { vm, host }].wipe();
                        self.facts.push((vm, Fact::Replaced { host }));
                    }
                }
            }
            Kind::BadDisk => {
                if self.can_spare(seat) && self.hosts[host].is_up() {
                    self.crash(host, false, long);
                    let here = &mut self.seats[seat];
                    let at = here.random.below(here.store.bytes() + 1);
                    here.damaged |= here.store.corrupt(at, 0x10);
                }
            }
            Kind::VmFails => {
                if let Some((run, at)) = self.seats[seat].vm.as_ref().map(|vm| (vm.run, vm.at())) {
                    self.stop_vm(seat, run);
                    let reason = "the simulator killed it".to_owned();
                    self.plan_input(0, seat, Input::VmFailed { run, reason, at });
                }
            }
            Kind::Loss => {
                let loss = self.random.between(50, 400);
                self.network.loss += loss;
                self.repair_after(short, Fault::Loss(loss));
            }
            Kind::Switchover => {
                let to = Some(self.hosts[host].name.clone()).filter(|_| self.random.chance(500));
                if let Some(primary) = self.primary(seat.vm) {
                    let wish = Operator::Switchover { to };
                    self.plan_input(0, primary, Input::Operator(wish));
                }
            }
            Kind::HungDisk
            | Kind::FullDisk
            | Kind::FullDisks
            | Kind::NoFiles
            | Kind::PutBack
            | Kind::LostTail
            | Kind::StoresFail => self.break_disk(kind, seat, long),
            Kind::WitnessSlow
            | Kind::WitnessRefuses
            | Kind::WitnessSetBack
            | Kind::WitnessEmptied
            | Kind::WitnessDownLong => self.break_keeper(kind, long),
            Kind::Pair | Kind::Create | Kind::Remove | Kind::AcceptLoss => self.order(kind, seat),
            Kind::CloseLink => {
                let other = self.any_host();
                if other != host {
                    self.network.close(host, other);
                }
            }
            Kind::Deaf => {
                let host = self.primary(seat.vm).unwrap_or(seat).host;
                self.network.deafen(host);
                self.block_gateways(host);
                self.hosts[host].deaf_since.get_or_insert(self.now);
                self.hosts[host].deaf += 1;
                let span = self.random.between(1_200, 3_000) * MILLI;
                self.repair_after(span, Fault::Deaf(host));
            }
            Kind::Stranger | Kind::Usurper => self.forge(kind, seat),
        }
    }

    /// A gateway does not reach a host. Where there is another one, it may reach none, and for long:
    /// that one must not notice.
    fn block_gateway(&mut self, seat: SeatId, short: Moment, long: Moment) {
        let id = self.any_gateway(seat.vm);
        if self.guests[seat.vm].gateways.len() > 1 && self.random.chance(400) {
            for blocks in &mut self.gateway(id).blocks {
                *blocks += 1;
            }
            self.repair_after(long, Fault::GatewayAway(id));
        } else {
            self.gateway(id).blocks[seat.host] += 1;
            self.repair_after(short, Fault::GatewayBlocked(id, seat.host));
        }
    }

    /// A host and all gateways do not hear each other any more.
    fn block_gateways(&mut self, host: usize) {
        for guest in &mut self.guests {
            guest.block_gateways(host);
        }
    }

    fn unblock_gateways(&mut self, host: usize) {
        for guest in &mut self.guests {
            guest.unblock_gateways(host);
        }
    }

    /// A host is cut off; then one other host, and nobody else, hears it again.
    fn bridge(&mut self, host: usize) {
        let pier = self.any_host();
        let short = self.random.between(230, 600) * MILLI;
        let long = short + self.random.between(200, 1_000) * MILLI;
        for other in (0..self.hosts.len()).filter(|other| *other != host) {
            let span = if other == pier { short } else { long };
            self.block(host, other, span);
            self.block(other, host, span);
        }
        self.witness_blocks[host] += 1;
        self.repair_after(long, Fault::WitnessBlocked(host));
    }

    pub(super) fn crash(&mut self, host: usize, power: bool, down: Moment) {
        if self.hosts[host].is_up() {
            self.stop_host(host, power);
            self.repair_after(down, Fault::Crash(host));
        }
    }

    fn block(&mut self, from: usize, to: usize, span: Moment) {
        self.network.block(from, to);
        self.repair_after(span, Fault::Block(from, to));
    }

    pub(super) fn repair_after(&mut self, span: Moment, fault: Fault) {
        self.queue.plan(self.now + span, Event::Repair(fault));
    }

    /// Whether every VM can spare its log on this host.
    fn can_spare_all(&self, host: usize) -> bool {
        (0..self.guests.len()).all(|vm| self.can_spare(SeatId { vm, host }))
    }

    /// Whether the promise holds without this log: what the rule survives may be lost, and not more.
    fn can_spare(&self, seat: SeatId) -> bool {
        let Some(record) = self.witness.record(seat.vm) else {
            return false;
        };
        let seats = self.seats.of_vm(seat.vm);
        let last_live = seats.iter().map(|seat| seat.durable.live).max();
        if last_live == Some(self.seats[seat].durable.live) {
            return false;
        }
        let others = record.all_copies().filter(|copy| {
            seats.iter().enumerate().any(|(number, other)| {
                let view = other.view();
                number != seat.host
                    && view.name == copy.host
                    && view.incarnation == copy.incarnation
                    && view.intact
                    && view.store.tip().index > replay_log::LogIndex::START
            })
        });
        others.count() >= record.seals()
    }

    pub(super) fn repair(&mut self, fault: Fault) {
        if self.is_healed() {
            return;
        }
        self.disturbed();
        match fault {
            Fault::Crash(host) if self.hosts[host].drive.hung > 0 => {
                // What it has to read first does not come.
                self.repair_after(100 * MILLI, fault);
            }
            Fault::Crash(host) => {
                if !self.hosts[host].is_up() {
                    self.start_host(host);
                }
            }
            Fault::Hung(host) => self.hosts[host].drive.hung -= 1,
            Fault::NoFiles(host) => self.hosts[host].drive.refuses -= 1,
            Fault::Full(host) => {
                self.hosts[host].drive.full -= 1;
                self.make_room_on(host);
            }
            Fault::WitnessSlow => self.witness.slow -= 1,
            Fault::WitnessRefuses => self.witness.refuses -= 1,
            Fault::Block(from, to) => self.network.unblock(from, to),
            Fault::Isolation(host) => {
                for other in (0..self.hosts.len()).filter(|other| *other != host) {
                    self.network.unblock(host, other);
                    self.network.unblock(other, host);
                }
                self.unblock_gateways(host);
                self.witness_blocks[host] -= 1;
            }
            Fault::Deaf(host) => {
                self.network.undeafen(host);
                self.unblock_gateways(host);
                self.hosts[host].hears_again();
            }
            Fault::WitnessDown => self.witness.down -= 1,
            Fault::WitnessBlocked(host) => self.witness_blocks[host] -= 1,
            Fault::GatewayBlocked(id, host) => self.gateway(id).blocks[host] -= 1,
            Fault::GatewayAway(id) => {
                for blocks in &mut self.gateway(id).blocks {
                    *blocks -= 1;
                }
            }
            Fault::SlowDisk(host) => self.hosts[host].drive.slow -= 1,
            Fault::SlowVm(host) => self.hosts[host].slow_vm -= 1,
            Fault::Loss(loss) => self.network.loss -= loss,
        }
    }
}
