//! `understudy demo`: a whole cluster on this machine, a primary that is killed under load, and
//! the account of what its clients saw of it.

pub mod cluster;
pub mod load;
pub mod play;
pub mod report;
pub mod timeline;
