//! What a machine consists of: fixed at power-on, carried in the log's header, equal on all copies.

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::devices::layout::MAX_DISKS;

/// The configuration of a machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineConfig {
    /// Guest memory in bytes, a multiple of 4,096.
    pub memory: u64,
    /// The kernel command line.
    pub command_line: String,
    /// The MAC address of network device 0; `None` leaves the device out.
    pub mac: Option<[u8; 6]>,
    /// The sizes of the disks in bytes, multiples of 512.
    pub disks: Vec<u64>,
}

/// The header's configuration is not one that this version can build a machine from.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// It is not in the encoding of [`MachineConfig::to_bytes`].
    #[error("the machine's configuration in the log's header cannot be read: {0}")]
    Encoding(#[from] postcard::Error),
    /// It asks for what no machine has.
    #[error(transparent)]
    Impossible(#[from] ImpossibleMachine),
}

impl MachineConfig {
    /// The encoding that the log's header carries.
    pub fn to_bytes(&self) -> bytes::Bytes {
        postcard::to_stdvec(self)
            .expect("plain data always encodes")
            .into()
    }

    /// Reads what [`Self::to_bytes`] wrote, and checks it.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, ConfigError> {
        let config: Self = postcard::from_bytes(bytes)?;
        config.check()?;
        Ok(config)
    }

    /// Whether a machine can be built like this. Whoever reads a configuration from outside calls
    /// it before anything is built.
    pub fn check(&self) -> Result<(), ImpossibleMachine> {
        if self.memory == 0 || !self.memory.is_multiple_of(4096) {
            return Err(ImpossibleMachine::Memory { found: self.memory });
        }
        if self.disks.len() > MAX_DISKS {
            return Err(ImpossibleMachine::TooManyDisks {
                found: self.disks.len(),
            });
        }
        let partial = |size: &u64| *size == 0 || !size.is_multiple_of(512);
        match self.disks.iter().position(partial) {
            Some(disk) => Err(ImpossibleMachine::DiskSize {
                disk,
                found: self.disks[disk],
            }),
            None => Ok(()),
        }
    }
}

/// Why no machine can be built from a configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum ImpossibleMachine {
    /// Memory is not whole pages.
    #[error("give the machine memory in multiples of 4096 bytes, not {found}")]
    Memory {
        /// The size asked for.
        found: u64,
    },
    /// There are not that many disk slots.
    #[error("give the machine at most {MAX_DISKS} disks, not {found}")]
    TooManyDisks {
        /// How many were asked for.
        found: usize,
    },
    /// A disk is not whole sectors.
    #[error("give disk {disk} a size in multiples of 512 bytes, not {found}")]
    DiskSize {
        /// Which disk.
        disk: usize,
        /// The size asked for.
        found: u64,
    },
}
