//! The disks of a VM on this host: those of the run that is, and those of the last run that recorded
//! here, which are the way back when the log is gone everywhere.
//!
//! ```text
//!                 replay                       goes live
//!   (nothing) ──────────► disks/ replica ─────────────────► disks/ recorded ──┐
//!                              ▲                                              │ replay
//!                              └── disks.recorded/ recorded, until the next ◄─┘
//!                                  one goes live here or boots
//! ```
//!
//! A folder of disks has the header of the log that they run by, so that they can be sealed whatever
//! the log is by then.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::PoisonError;
use std::sync::atomic::Ordering;

use replay_log::{DiskBase, Header, folder};
use vmm::disk::{Base, Durability, Overlay, OverlayError};

use super::super::aside;
use super::{Home, HomeError, SMALL_FILE, io_error};
use crate::agent::durable;
use crate::agent::vm_process::{DiskSetup, DiskSetupError};
use crate::images::Image;

/// Names the state of a folder of disks: a run that replays, so its disks can be made again ...
const REPLICA: &str = "replica";
/// ... or one that records or has recorded.
const RECORDED: &str = "recorded";

impl Home {
    fn disks(&self) -> PathBuf {
        self.dir.join("disks")
    }

    /// The disks of the last run that recorded here, while another runs.
    fn recorded_disks(&self) -> PathBuf {
        self.dir.join("disks.recorded")
    }

    /// Disks for a replay of the log with this header, with nothing written to them. Those of the
    /// last run that recorded here are kept. Blocks.
    pub fn replica_disks(&self, header: &Header) -> Result<Vec<DiskSetup>, HomeError> {
        let _turn = self
            .disks_turn
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        self.finish_recorded()?;
        let (disks, recorded) = (self.disks(), self.recorded_disks());
        if disks.exists() && !disks.join(REPLICA).exists() {
            if !disks.join("header").exists()
                && let Some(header) = self.header()?
            {
                // An earlier version had it beside the disks only.
                keep(&disks.join("header"), &header)?;
            }
            aside::delete(&recorded)?;
            fs::rename(&disks, &recorded).map_err(io_error("rename", &disks))?;
            aside::sync_names(&self.dir).map_err(io_error("sync", &self.dir))?;
        } else {
            aside::delete(&disks)?;
        }
        make(&disks, header, REPLICA)?;
        Ok(self.setups(header))
    }

    /// Disks for a machine that boots with this header, with nothing written to them. `sealed`: what
    /// was here has been made part of their bases; otherwise it is set aside, and `tell` hears where.
    /// Blocks.
    pub fn boot_disks(
        &self,
        header: &Header,
        sealed: bool,
        mut tell: impl FnMut(&Path),
    ) -> Result<Vec<DiskSetup>, HomeError> {
        let _turn = self
            .disks_turn
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        self.finish_recorded()?;
        let (disks, making) = (self.disks(), self.dir.join("disks.new"));
        match fs::remove_dir_all(&making) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(io_error("remove", &making)(error));
            }
            _ => {}
        }
        make(&making, header, RECORDED)?;
        for old in [self.recorded_disks(), disks.clone()] {
            if sealed || old.join(REPLICA).exists() {
                aside::delete(&old)?;
            } else if let Some(folder) = aside::set_aside(&old)? {
                tell(&folder);
            }
        }
        fs::rename(&making, &disks).map_err(io_error("rename", &making))?;
        aside::sync_names(&self.dir).map_err(io_error("sync", &self.dir))?;
        Ok(self.setups(header))
    }

    /// The run that has these disks records from now on, and they are synced. Does not block; what
    /// follows is done by [`Self::keep_recorded`].
    pub fn goes_live(&self) {
        self.live.store(true, Ordering::Release);
    }

    /// Keeps the disks of the run that has gone live instead of those of the one before. Blocks.
    pub fn keep_recorded(&self) -> Result<(), HomeError> {
        let _turn = self
            .disks_turn
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        self.finish_recorded()
    }

    fn finish_recorded(&self) -> Result<(), HomeError> {
        if !self.live.load(Ordering::Acquire) {
            return Ok(());
        }
        let disks = self.disks();
        // A name takes no room that is not there.
        match fs::rename(disks.join(REPLICA), disks.join(RECORDED)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(io_error("rename a file in", &disks)(error));
            }
            _ => {}
        }
        aside::sync_names(&disks).map_err(io_error("sync", &disks))?;
        aside::delete(&self.recorded_disks())?;
        self.live.store(false, Ordering::Release);
        Ok(())
    }

    fn setups(&self, header: &Header) -> Vec<DiskSetup> {
        let setup = |disk: usize| DiskSetup {
            bases: self.bases.to_path_buf(),
            overlay: self.disks().join(disk.to_string()),
            durable: true,
        };
        (0..header.disks.len()).map(setup).collect()
    }

    /// The bases of the image's own disks. Blocks where they have content.
    pub fn image_disks(&self, image: &Image) -> Result<Vec<DiskBase>, HomeError> {
        let sealed = image.disks.iter().map(|disk| disk.seal(&self.bases));
        Ok(sealed.collect::<Result<_, _>>()?)
    }

    /// Makes bases of the disks as the last run that recorded here left them. Blocks, for as long as
    /// the disks are large.
    pub fn seal_disks(&self) -> Result<Vec<DiskBase>, HomeError> {
        let _turn = self
            .disks_turn
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        self.finish_recorded()?;
        let (disks, recorded) = (self.disks(), self.recorded_disks());
        let last = if disks.join(REPLICA).exists() && recorded.exists() {
            recorded
        } else if disks.exists() || !recorded.exists() {
            disks
        } else {
            recorded
        };
        let header = match read_header(&last.join("header"))? {
            Some(header) => header,
            None => self.header()?.ok_or(HomeError::NeverRan)?,
        };
        let seal = |(disk, name): (usize, &DiskBase)| {
            let overlay = last.join(disk.to_string());
            if !overlay.exists() {
                // Nothing was written to it, or what was is part of its base by now.
                return Ok(*name);
            }
            let base = Base::open(&self.bases, *name).map_err(DiskSetupError::Base)?;
            let overlay = match Overlay::open(&overlay, base, Durability::Sync) {
                // An earlier version's process ended after the header had named the sealed base, and
                // before the overlay that was sealed into it was removed.
                Err(OverlayError::OtherBase { .. }) => return Ok(*name),
                opened => opened.map_err(DiskSetupError::Overlay)?,
            };
            let sealed = overlay
                .seal_into_base(&self.bases)
                .map_err(DiskSetupError::Overlay)?;
            Ok(sealed.name())
        };
        header.disks.iter().enumerate().map(seal).collect()
    }
}

fn make(disks: &Path, header: &Header, state: &str) -> Result<(), HomeError> {
    folder::make(disks).map_err(io_error("create", disks))?;
    keep(&disks.join("header"), header)?;
    let state = disks.join(state);
    durable::replace(&state, b"").map_err(io_error("write", &state))
}

/// Keeps a header, if it is not there already.
pub(super) fn keep(path: &Path, header: &Header) -> Result<(), HomeError> {
    let bytes = postcard::to_stdvec(header).expect("plain data always encodes");
    if fs::read(path).is_ok_and(|there| there == bytes) {
        return Ok(());
    }
    durable::replace(path, &bytes).map_err(io_error("write", path))
}

pub(super) fn read_header(path: &Path) -> Result<Option<Header>, HomeError> {
    match durable::read_bounded(path, SMALL_FILE).map_err(io_error("read", path))? {
        None => Ok(None),
        Some(bytes) => postcard::from_bytes(&bytes)
            .map(Some)
            .map_err(|_| HomeError::Garbled {
                path: path.to_owned(),
            }),
    }
}
