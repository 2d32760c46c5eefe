//! What a machine consists of: fixed at power-on, carried in the log's header, equal on all copies.

use serde::{Deserialize, Serialize};

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

/// The header's configuration is not one that this version understands.
#[derive(Debug, thiserror::Error)]
#[error("the machine's configuration in the log's header cannot be read: {0}")]
pub struct ConfigError(#[from] postcard::Error);

impl MachineConfig {
    /// The encoding that the log's header carries.
    pub fn to_bytes(&self) -> bytes::Bytes {
        postcard::to_stdvec(self)
            .expect("plain data always encodes")
            .into()
    }

    /// Reads what [`Self::to_bytes`] wrote.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, ConfigError> {
        Ok(postcard::from_bytes(bytes)?)
    }
}
