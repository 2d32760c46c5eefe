//! What a guest starts from, prepared where nothing waits for it: the image, disks, and a process that
//! has been started and is told how to begin. Heartbeats wait for no disk, for the hash of no image,
//! and for no image's copying.

use std::path::Path;
use std::sync::Arc;

use replay_log::{Header, Term};
use vmm::boot::BootImage;

use super::Surroundings;
use super::home::{Home, HomeError, new_header};
use crate::agent::journal::Incident;
use crate::agent::vm_process::{DiskSetup, Spawned, Start, StartAs, begin_with};
use crate::protocol::VmName;
use crate::sentence::sentence;

/// What a guest is started from.
pub struct Parts {
    /// Which machine.
    pub header: Header,
    /// The process, which waits for the word to begin.
    pub process: Spawned,
}

/// What a machine is built from.
struct Machine {
    header: Header,
    image: BootImage,
    disks: Vec<DiskSetup>,
}

/// What a replica starts from: the header of the log and what it names, the disks as they were then.
pub async fn of_replica(
    home: Home,
    env: Arc<Surroundings>,
    header: Header,
) -> Result<Parts, String> {
    let library = Arc::clone(&env);
    let ready = move || {
        let machine = Machine {
            image: library.library.image(header.image)?.boot(),
            disks: home.replica_disks(&header)?,
            header,
        };
        home.keep_header(&machine.header)?;
        Ok(machine)
    };
    spawn(&env, StartAs::Replica, ready).await
}

/// What a machine boots from: the image, and fresh or left-over disks.
pub async fn to_boot(
    home: Home,
    env: Arc<Surroundings>,
    vm: VmName,
    term: Term,
    cold: bool,
) -> Result<Parts, String> {
    let own = Arc::clone(&env);
    let ready = move || {
        let image = home.image(&own.library)?;
        let bases = if cold {
            home.seal_disks()?
        } else {
            home.image_disks(&image)?
        };
        let header = new_header(&image, &bases, term)?;
        home.keep_header(&header)?;
        let tell = |folder: &Path| own.journal.write(Some(&vm), Incident::set_aside(folder));
        Ok(Machine {
            disks: home.boot_disks(&header, cold, tell)?,
            header,
            image: image.boot(),
        })
    };
    spawn(&env, StartAs::Primary, ready).await
}

/// Gets what a machine is built from, on a thread that may wait for a disk, and starts its process.
async fn spawn(
    env: &Surroundings,
    start_as: StartAs,
    ready: impl FnOnce() -> Result<Machine, HomeError> + Send + 'static,
) -> Result<Parts, String> {
    let encoded = move || {
        let machine = ready().map_err(|error| sentence(&error))?;
        let start = Start {
            header: machine.header.clone(),
            image: machine.image,
            disks: machine.disks,
            start_as,
        };
        let start = begin_with(start).map_err(|error| sentence(&error))?;
        Ok::<_, String>((machine.header, start))
    };
    // Only a runtime that ends lets it go.
    let encoded = tokio::task::spawn_blocking(encoded).await;
    let (header, start) = encoded.map_err(|ended| ended.to_string())??;
    let spawned = env.starter.spawn(env.vmm_binary.clone(), start).await;
    let process = spawned.map_err(|error| sentence(&error))?;
    Ok(Parts { header, process })
}
