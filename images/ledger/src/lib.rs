//! The ledger: a key-value service that speaks the Redis protocol and answers a write only when it
//! is on disk.
//!
//! This library is the service without the machine: it has no input or output of its own, so its
//! tests run on any host. `main.rs` puts it on the bare machine.
//!
//! ```text
//!   bytes from a client          changes               commit (writes + flush)
//!  ─────────► Connection ──► Service ──► Keyspace ──► Journal ──────────────► disk
//!  ◄───────── (answers, held back until the commit they depend on is durable) ◄──┘
//! ```

#![cfg_attr(not(test), no_std)]
#![forbid(unsafe_code)]

extern crate alloc;

pub mod command;
pub mod command_line;
pub mod connection;
pub mod journal;
pub mod keyspace;
pub mod limits;
pub mod record;
pub mod reply;
pub mod resp;
pub mod service;
pub mod slot;
