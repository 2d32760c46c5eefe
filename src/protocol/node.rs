//! Everything one host knows of one VM.

use std::collections::VecDeque;

use super::api::{Action, Input};
use super::config::{Config, Restored};
use super::status::Status;
use super::time::Time;

/// The protocol's state machine for one VM on one host.
#[derive(Debug)]
pub struct Node {
    config: Config,
    restored: Restored,
    now: Time,
    actions: VecDeque<Action>,
}

impl Node {
    /// A node that has just (re)started with what was found on disk.
    pub fn new(config: Config, restored: Restored, now: Time) -> Self {
        Self {
            config,
            restored,
            now,
            actions: VecDeque::new(),
        }
    }

    /// Something happened.
    pub fn handle(&mut self, now: Time, input: Input) {
        self.now = now;
        drop(input);
    }

    /// The moment that [`Node::poll_timeout`] named has come.
    pub fn handle_timeout(&mut self, now: Time) {
        self.now = now;
    }

    /// The next thing to do.
    pub fn poll_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    /// When to call [`Node::handle_timeout`] at the latest.
    pub fn poll_timeout(&self) -> Option<Time> {
        None
    }

    /// What the node knows.
    pub fn status(&self) -> Status {
        unimplemented!("{:?} {:?}", self.config, self.restored)
    }
}
