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
