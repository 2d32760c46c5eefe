//! Understudy keeps a virtual machine alive on unreliable hosts.

pub mod agent;
pub mod cli;
pub mod config;
pub mod demo;
pub mod doctor;
pub mod gateway;
pub mod images;
pub mod lab;
pub mod local;
pub mod offline;
pub mod protocol;
mod sentence;
pub mod simulator;
