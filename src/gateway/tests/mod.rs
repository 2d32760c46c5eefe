//! Tests of the gateway with real sockets and a guest that speaks TCP.

mod failover;
mod guest;
mod local;
mod quic;
mod stack;
