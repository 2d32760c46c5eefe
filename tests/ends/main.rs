//! How a guest ends, or does not: with a triple fault, halted for good, with its disk full, in a
//! loop without exits; and how hosts that lack something, room on their own disk or the image, keep
//! that from it. Real processes on loopback: a witness and three agents with their VMM processes.
//!
//! Whatever the guest does to itself is part of the log. So every copy comes to the same end at the
//! same position, nobody is promoted because of it, and whoever is promoted later shows it too.

#[path = "../../vmm/tests/common/guest.rs"]
#[allow(dead_code, reason = "these guests use a part of it")]
mod guest;
#[path = "../common/loopback.rs"]
mod loopback;
#[path = "../common/skip.rs"]
mod skip;
mod stage;
#[path = "../../vmm/tests/common/virtio.rs"]
#[allow(dead_code, reason = "these guests use a part of it")]
mod virtio;

use iced_x86::code_asm::*;
use tempfile::TempDir;
use understudy::protocol::RoleName;
use vmm::boot::BootImage;
use vmm::devices::layout;
use vmm::tape::{Ending, GuestEnd, Unrunnable};

use guest::{FREE, Guest, Ring, ok};
use loopback::{host_name, on_kvm, understudy};
use stage::{HOSTS, Lack, Stage, put_image};
use virtio::{Descriptor, NEXT, Queue, WRITE};

/// Said on the console by a guest that is about to compute for ever.
const HANGS: &str = "computing\n";
/// Said by a guest whose disk takes no more.
const FULL: &str = "the disk is full\n";

/// Device addresses with no device.
const DEVICES: u64 = 0xe000_0000;

/// What a guest that fills its disk writes at once.
const CHUNK: u32 = 64 << 10;

// ---- guests ----

fn say(guest: &mut Guest, text: &str) {
    for byte in text.bytes() {
        guest.out8(layout::SERIAL, byte);
    }
}

/// An exception with no table that says who handles it, nor who handles that.
fn triple_fault() -> BootImage {
    let mut guest = Guest::new(Ring::Zero);
    ok(guest.asm.push(0));
    ok(guest.asm.push(0));
    ok(guest.asm.lidt(ptr(rsp)));
    ok(guest.asm.ud2());
    guest.build()
}

/// Waits for an interrupt with interrupts off.
fn dead() -> BootImage {
    let mut guest = Guest::new(Ring::Zero);
    ok(guest.asm.hlt());
    guest.build()
}

/// Executes where there are devices, which no KVM can.
fn unrunnable() -> BootImage {
    let mut guest = Guest::new(Ring::Zero);
    ok(guest.asm.mov(rax, DEVICES));
    ok(guest.asm.jmp(rax));
    guest.build()
}

/// Says so, and computes for ever without an exit. What it says is its last landmark.
fn hang() -> BootImage {
    let mut guest = Guest::new(Ring::Three);
    say(&mut guest, HANGS);
    let mut again = guest.asm.create_label();
    ok(guest.asm.set_label(&mut again));
    ok(guest.asm.inc(rbx));
    ok(guest.asm.jmp(again));
    guest.build()
}

/// When a guest begins.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Begins {
    AtOnce,
    /// When the first frame comes.
    WhenTold,
}

/// Waits for a frame, and leaves it where it is.
fn wait_to_be_told(guest: &mut Guest) {
    const RECEIVE: Queue = Queue {
        device: layout::NET_WINDOW as u64,
        index: 0,
        at: FREE + 0x2_0000,
    };
    let buffer = Descriptor {
        address: FREE + 0x2_1000,
        len: 1536,
        flags: WRITE,
        next: 0,
    };
    RECEIVE.prepare(guest, &[buffer], 1);
    virtio::start(guest, RECEIVE.device, 0, &[RECEIVE]);
    ok(guest.asm.xor(r12d, r12d));
    RECEIVE.wait_for_used(guest, r12d);
}

/// Writes disk 0 from its first sector on until the device refuses; then says so and switches itself
/// off. A refusal at any other place than the disk's end it finds wrong, and asks for a reset.
fn fills_its_disk(begins: Begins) -> BootImage {
    const QUEUE: Queue = Queue {
        device: layout::DISK_WINDOW as u64,
        index: 0,
        at: FREE,
    };
    const HEADER: u64 = FREE + 0x1000;
    const SECTOR: u64 = HEADER + 8;
    const STATUS: u64 = FREE + 0x1100;
    const DATA: u64 = FREE + 0x2000;
    /// How many sectors the disk has: where its configuration begins.
    const CAPACITY: u64 = layout::VIRTIO_BASE + QUEUE.device * layout::VIRTIO_WINDOW + 0x100;
    /// VIRTIO_BLK_T_OUT, then the sector.
    const WRITE_FIRST_SECTOR: [u8; 16] = [1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let mut guest = Guest::new(Ring::Three);
    let part = |address, len, flags, next| Descriptor {
        address,
        len,
        flags,
        next,
    };
    let chain = [
        part(HEADER, 16, NEXT, 1),
        part(DATA, CHUNK, NEXT, 2),
        part(STATUS, 1, WRITE, 0),
    ];
    QUEUE.prepare(&mut guest, &chain, 0);
    guest.data(HEADER, WRITE_FIRST_SECTOR.to_vec());
    guest.data(STATUS, vec![0xaa]);
    guest.data(DATA, vec![0x5a; CHUNK as usize]);
    if begins == Begins::WhenTold {
        wait_to_be_told(&mut guest);
    }
    virtio::start(&mut guest, QUEUE.device, 0, &[QUEUE]);
    ok(guest.asm.xor(r13d, r13d));
    ok(guest.asm.xor(r14d, r14d));
    let mut again = guest.asm.create_label();
    ok(guest.asm.set_label(&mut again));
    ok(guest.asm.xor(ecx, ecx));
    QUEUE.offer(&mut guest, r13d, true);
    QUEUE.wait_for_used(&mut guest, r14d);
    ok(guest.asm.inc(r14d));
    ok(guest
        .asm
        .add(dword_ptr(SECTOR), (CHUNK / 512).cast_signed()));
    ok(guest.asm.cmp(byte_ptr(STATUS), 0));
    ok(guest.asm.je(again));
    // The refused chunk must be the one after the disk's end, which the device tells.
    let mut at_its_end = guest.asm.create_label();
    ok(guest.asm.mov(edx, CAPACITY as u32));
    ok(guest.asm.mov(eax, dword_ptr(rdx)));
    ok(guest.asm.add(eax, (CHUNK / 512).cast_signed()));
    ok(guest.asm.cmp(eax, dword_ptr(SECTOR)));
    ok(guest.asm.je(at_its_end));
    guest.out32(layout::POWER, layout::POWER_RESET);
    ok(guest.asm.set_label(&mut at_its_end));
    say(&mut guest, FULL);
    guest.build()
}

// ---- ends ----

/// The guest ends on three copies; then the primary's host dies, and comes back.
async fn ends_everywhere(guest: &BootImage, disks: &[&str], how: GuestEnd, words: &str) {
    let mut stage = Stage::open(guest, disks).await;
    let ending = stage.all_end(&HOSTS).await;
    assert_eq!(ending.how, how);
    shown(&stage, &HOSTS, ending, words);
    stage.nobody_claims().await;
    // Whoever is promoted has the same machine, and it has ended.
    let old = stage.primary().await;
    stage.kill(&old);
    let new = stage.successor(&old).await;
    let left: Vec<&str> = HOSTS
        .into_iter()
        .filter(|host| *host != old.as_str())
        .collect();
    assert_eq!(stage.all_end(&left).await, ending);
    shown(&stage, &left, ending, words);
    assert!(stage.journal_has(&new, "vm_ended").await);
    // And so has who begins anew.
    stage.start_host(&old);
    stage.copies(HOSTS.len()).await;
    assert_eq!(stage.all_end(&HOSTS).await, ending);
}

/// The table and the JSON of `status` show the end on each of these hosts.
fn shown(stage: &Stage, hosts: &[&str], ending: Ending, words: &str) {
    let expected = format!("the guest has ended: {words} at position {}", ending.at);
    let json = stage.status_json();
    for host in hosts {
        let row = stage.row(host);
        assert!(row.contains(&expected), "{expected} is not in {row}");
        assert!(!row.contains("computes without an exit"), "{row}");
        let ended = &json["hosts"][host]["vms"][0]["guest"]["ended"];
        let expected = serde_json::to_value(ending).expect("plain data");
        assert_eq!(*ended, expected, "{host}");
    }
}

#[test]
fn a_triple_fault() {
    on_kvm(async || {
        ends_everywhere(&triple_fault(), &[], GuestEnd::TripleFault, "triple fault").await;
    });
}

#[test]
fn a_halt_with_interrupts_off() {
    on_kvm(async || {
        let words = "dead (HLT with interrupts off)";
        ends_everywhere(&dead(), &[], GuestEnd::Dead, words).await;
    });
}

/// What no host can run is an end of the guest like any other. Were it a failure of the host, the
/// hosts would take turns at it for ever.
#[test]
fn an_instruction_that_no_kvm_can_emulate() {
    on_kvm(async || {
        let how = GuestEnd::Unrunnable {
            why: Unrunnable::Emulation,
            rip: DEVICES,
        };
        let words = "unrunnable (KVM cannot emulate the instruction at 0xe0000000)";
        ends_everywhere(&unrunnable(), &[], how, words).await;
    });
}

#[test]
fn a_full_disk() {
    on_kvm(async || {
        ends_everywhere(
            &fills_its_disk(Begins::AtOnce),
            &["1 MiB"],
            GuestEnd::PowerOff,
            "power off",
        )
        .await;
    });
}

/// A guest that has said its last word and computes is no dead host: its replicas hear of it, stand
/// where it was last seen and stay replicas.
#[test]
fn a_loop_without_exits() {
    on_kvm(async || {
        let mut stage = Stage::open(&hang(), &[]).await;
        stage.copies(HOSTS.len()).await;
        let primary = stage.primary().await;
        stage.computes(&primary).await;
        stage.nobody_claims().await;
        stage.same_position(&HOSTS).await;
        let said = "computes without an exit for";
        for host in HOSTS {
            let row = stage.row(host);
            assert_eq!(row.contains(said), host == primary.as_str(), "{row}");
            assert!(!row.contains("has ended"), "{row}");
        }
        stage.kill(&primary);
        let new = stage.successor(&primary).await;
        stage.computes(&new).await;
        let row = stage.row(new.as_str());
        assert!(row.contains(said), "{row}");
    });
}

/// The disk of the primary's host is full before the guest's is. The guest is not told: the host
/// abdicates and says why, and on another the guest goes on to its own end.
#[test]
fn a_full_disk_of_the_host() {
    if !nix::unistd::geteuid().is_root() {
        let why = "a small file system can be mounted by root only";
        return skip::skipped("a_full_disk_of_the_host", &why);
    }
    on_kvm(async || {
        let (full, left) = (host_name("a"), ["b", "c"]);
        let guest = fills_its_disk(Begins::WhenTold);
        let mut stage = Stage::open_with(&guest, &["64 MiB"], Some(Lack::Disk(&full, "24m"))).await;
        stage.copies(HOSTS.len()).await;
        let _visitor = stage.knock().await;
        stage.successor(&full).await;
        let ending = stage.all_end(&left).await;
        // It was refused nothing before its own disk's end.
        assert_eq!(ending.how, GuestEnd::PowerOff);
        assert!(stage.journal_has(&full, "abdicated").await);
        stage.says(full.as_str(), "No space left on device").await;
        let new = stage.primary().await;
        assert_eq!(stage.role(&new).await, Some(RoleName::Primary));
        // What the guest said leaves like all output, when enough copies hold it.
        let console = stage.console_file(&new);
        stage
            .until("the guest's last words", async |_| {
                let said = std::fs::read_to_string(&console).ok()?;
                (said == FULL).then_some(())
            })
            .await;
    });
}

/// A host without the guest's image holds the log and could never go on from it: it says so, and is no
/// copy before somebody brings the image.
#[test]
fn a_host_without_the_image() {
    on_kvm(async || {
        let (guest, without) = (hang(), host_name("c"));
        let lack = Some(Lack::Image(&without));
        let mut stage = Stage::open_with(&guest, &[], lack).await;
        let record = stage.copies(2).await;
        assert!(record.member_on(&without).is_none(), "{record:?}");
        stage.says("c", "this host has no image").await;
        stage.nobody_claims().await;
        assert_eq!(stage.record().await.expect("a record").copies(), 2);
        stage.give_image(&without, &guest);
        stage.copies(3).await;
    });
}

/// One host alone: `run` says how the guest has ended, by its exit code, too; and the log that it
/// recorded says the same.
#[test]
fn a_recording_ends_as_its_guest_did() {
    on_kvm(async || {
        for (guest, disks, words, code) in [
            (triple_fault(), vec![], "triple fault", 1),
            (dead(), vec![], "dead (HLT with interrupts off)", 1),
            (
                fills_its_disk(Begins::AtOnce),
                vec!["1 MiB"],
                "power off",
                0,
            ),
        ] {
            let folder = TempDir::with_prefix("understudy-end-").expect("a folder");
            put_image(folder.path(), &guest, &disks);
            let image = folder.path().display().to_string();
            let log = folder.path().join("log").display().to_string();
            let ran = understudy(&["run", &image, "--record", &log]);
            let said = String::from_utf8_lossy(&ran.stderr).into_owned();
            let end = said
                .lines()
                .find_map(|line| line.strip_prefix("the guest has ended: "));
            let end = end.unwrap_or_else(|| panic!("no end in {said}"));
            assert!(end.starts_with(&format!("{words} at position ")), "{end}");
            assert_eq!(ran.status.code(), Some(code), "{said}");
            let crashed = format!(
                "the guest has crashed: see its last entries with 'understudy log inspect {log} --from 0'"
            );
            assert_eq!(said.contains(&crashed), code != 0, "{said}");
            let replayed = understudy(&["replay", &log, "--image", &image]);
            let said = String::from_utf8_lossy(&replayed.stdout).into_owned();
            let expected = format!("the guest had ended: {end}");
            assert!(said.lines().any(|line| line == expected), "{said}");
        }
    });
}
