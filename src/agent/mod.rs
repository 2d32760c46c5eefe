//! agent

pub mod frames;
