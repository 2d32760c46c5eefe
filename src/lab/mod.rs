//! The lab: real hosts on a machine that has no VMX or SVM. Each is a QEMU process that emulates a
//! CPU with SVM, boots Debian's own kernel and has a real `/dev/kvm`; a network namespace connects
//! them. README.md in this folder says how the parts fit.
//!
//! ```no_run
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use understudy::lab::{Config, Lab};
//!
//! let program = std::env::current_exe()?;
//! let lab = Lab::up(&Config::new(&program), &mut |_| {})?;
//! let h1 = lab.host("h1".parse()?)?;
//! let said = h1.run(&["understudy", "doctor"])?;
//! h1.kill()?;
//! # Ok(()) }
//! ```

mod client;
pub mod exec;
pub mod host;
mod image;
pub mod keeper;
mod machine;
pub mod needs;
mod program;
mod start;
mod state;
pub mod wire;

pub use client::{Ended, Host, Lab, LabError, Output};
pub use image::ImageError;
pub use needs::Missing;
pub use start::{Config, Event, StartError};
pub use state::{
    Delay, End, HostId, HostStatus, LabFolder, LabStatus, LinkDelay, LinkName, NoSuchName, Power,
};
pub use wire::Detached;
