//! The agent of a host: everything that touches sockets, files and processes around the protocol.

pub mod budget;
pub mod bulk;
pub mod certs;
pub mod clock;
pub mod driver;
pub mod durable;
pub mod frame_streams;
pub mod frames;
pub mod host;
pub mod init;
pub mod introduction;
pub mod journal;
pub mod library;
pub mod limits;
pub mod link;
mod listen;
pub mod lock;
pub mod metrics;
pub mod operator;
pub mod space;
#[cfg(test)]
mod testing;
pub mod thread;
pub mod vm_process;
pub mod witness;
