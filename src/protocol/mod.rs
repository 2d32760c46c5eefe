//! The protocol: who reigns, who holds the log, what may leave. Pure state machines; see README.md.

#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

pub mod api;
pub mod config;
mod controller;
mod core;
mod detector;
pub mod event;
mod feed;
pub mod message;
pub mod mutation;
pub mod name;
pub mod node;
mod primary;
pub mod record;
mod replica;
pub mod status;
pub mod time;
pub mod wire;

pub use api::{Action, Input, Operator, StopReason, Swapped};
pub use config::{Bounds, Config, Durable, Restored, Timing};
pub use event::Event;
pub use message::{Ack, Authority, Claim, Health, Lane, Message, PROTOCOL_VERSION, Refusal};
pub use mutation::Mutation;
pub use name::{DiskId, Epoch, HostName, Incarnation, NameError, VmName, VmRun};
pub use node::Node;
pub use record::{
    Acks, Committed, Lineage, LogFull, Member, OnLoss, Policy, Proof, Record, RecordError, Rule,
    RuleError, Seen, Stumble, Version,
};
pub use status::{FollowerStatus, RoleName, SetBack, Status};
pub use time::{Span, Time};
pub use wire::WireError;

#[cfg(test)]
#[allow(clippy::disallowed_methods, reason = "the tests read the sources")]
mod tests;
