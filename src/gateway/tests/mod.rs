//! Tests of the gateway with real sockets and a guest that speaks TCP.

mod failover;
mod given_up;
mod guest;
mod local;
mod quic;
mod stack;
