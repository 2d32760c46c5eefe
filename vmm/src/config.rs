//! What a machine consists of: fixed at power-on, carried in the log's header, equal on all copies.

use replay_log::Header;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::devices::layout::MAX_DISKS;

/// The least guest memory: the first MiB belongs to the boot data, the next to the kernel.
pub const MEMORY_MIN: u64 = 2 << 20;
/// The most guest memory: above begin the MMIO windows.
pub const MEMORY_MAX: u64 = 3 << 30;
/// The largest disk. What is told of a disk's size is believed up to here: its zeros are hashed and
/// its map of chunks is kept in memory.
pub const DISK_MAX: u64 = 64 << 30;

/// The configuration of a machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineConfig {
    /// Guest memory in bytes, a multiple of 4,096 from [`MEMORY_MIN`] to [`MEMORY_MAX`].
    pub memory: u64,
    /// The kernel command line.
    pub command_line: String,
    /// The MAC address of network device 0; `None` leaves the device out.
    pub mac: Option<[u8; 6]>,
    /// The sizes of the disks in bytes, multiples of 512 up to [`DISK_MAX`].
    pub disks: Vec<u64>,
    /// Whether ACPI tables tell the kernel of its virtio devices and how to switch off.
    pub acpi: bool,
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
    /// The header names other disks than the configuration.
    #[error("the log's header names {bases} disk bases for a machine with {disks} disks")]
    BaseCount {
        /// How many disks the machine has.
        disks: usize,
        /// How many bases there are.
        bases: usize,
    },
    /// A disk and its base differ in size.
    #[error("the log's header names a base of {base} bytes for disk {disk}, which has {size}")]
    BaseSize {
        /// Which disk.
        disk: usize,
        /// Its size.
        size: u64,
        /// The base's size.
        base: u64,
    },
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

    /// The configuration in a log's header, checked together with the disk bases that it names.
    pub fn of(header: &Header) -> Result<Self, ConfigError> {
        let config = Self::from_bytes(&header.config)?;
        if config.disks.len() != header.disks.len() {
            return Err(ConfigError::BaseCount {
                disks: config.disks.len(),
                bases: header.disks.len(),
            });
        }
        for (disk, (size, base)) in config.disks.iter().zip(&header.disks).enumerate() {
            if *size != base.size {
                return Err(ConfigError::BaseSize {
                    disk,
                    size: *size,
                    base: base.size,
                });
            }
        }
        Ok(config)
    }

    /// Whether a machine can be built like this. Whoever reads a configuration from outside calls
    /// it before anything is built.
    pub fn check(&self) -> Result<(), ImpossibleMachine> {
        let fits = (MEMORY_MIN..=MEMORY_MAX).contains(&self.memory);
        if !fits || !self.memory.is_multiple_of(4096) {
            return Err(ImpossibleMachine::Memory { found: self.memory });
        }
        if self.disks.len() > MAX_DISKS {
            return Err(ImpossibleMachine::TooManyDisks {
                found: self.disks.len(),
            });
        }
        let impossible = |size: &u64| !(1..=DISK_MAX).contains(size) || !size.is_multiple_of(512);
        match self.disks.iter().position(impossible) {
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
    /// Memory is not whole pages, too little or too much.
    #[error(
        "guest memory of {found} bytes is not possible: give a multiple of 4096 between 2 MiB and 3 GiB"
    )]
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
    /// A disk is not whole sectors, has none or too many.
    #[error("disk {disk} cannot have {found} bytes: give it a multiple of 512 up to 64 GiB")]
    DiskSize {
        /// Which disk.
        disk: usize,
        /// The size asked for.
        found: u64,
    },
}

#[cfg(test)]
mod tests {
    use replay_log::{DiskBase, ImageDigest, Term};

    use super::*;

    fn config(memory: u64, disks: &[u64]) -> MachineConfig {
        MachineConfig {
            memory,
            command_line: String::new(),
            mac: None,
            disks: disks.to_vec(),
            acpi: false,
        }
    }

    #[test]
    fn sizes_have_bounds() {
        for good in [
            config(MEMORY_MIN, &[]),
            config(MEMORY_MAX, &[512, DISK_MAX]),
        ] {
            good.check().unwrap();
        }
        for bad in [
            config(0, &[]),
            config(MEMORY_MIN - 4096, &[]),
            config(MEMORY_MIN + 1, &[]),
            config(MEMORY_MAX + 4096, &[]),
            config(MEMORY_MIN, &[0]),
            config(MEMORY_MIN, &[513]),
            config(MEMORY_MIN, &[512, DISK_MAX + 512]),
            config(MEMORY_MIN, &[1 << 60]),
            config(MEMORY_MIN, &[512; MAX_DISKS + 1]),
        ] {
            bad.check().unwrap_err();
            let read = MachineConfig::from_bytes(&bad.to_bytes());
            assert!(matches!(read, Err(ConfigError::Impossible(_))), "{bad:?}");
        }
    }

    #[test]
    fn a_header_names_the_bases_of_the_disks_that_the_machine_has() {
        let of = |disks: &[u64], bases: &[u64]| {
            let base = |size: &u64| DiskBase {
                digest: [0; 32],
                size: *size,
            };
            MachineConfig::of(&Header {
                machine_model: 1,
                image: ImageDigest::default(),
                config: config(MEMORY_MIN, disks).to_bytes(),
                disks: bases.iter().map(base).collect(),
                term: Term(1),
                boot: [0; 16],
            })
        };
        assert_eq!(of(&[512, 1024], &[512, 1024]).unwrap().disks, [512, 1024]);
        for bases in [&[][..], &[512], &[512, 1024, 512]] {
            let refused = of(&[512, 1024], bases);
            assert!(matches!(refused, Err(ConfigError::BaseCount { .. })));
        }
        let refused = of(&[512, 1024], &[512, 1 << 60]);
        assert!(matches!(
            refused,
            Err(ConfigError::BaseSize { disk: 1, .. })
        ));
    }
}
