//! Every bound of the service in one place: what a client, a disk or a key may cost.

/// The longest value, key, or argument of a command, in bytes.
pub const MAX_BULK: usize = 128 * 1024;

/// The longest command, all its arguments and their framing together, in bytes.
pub const MAX_COMMAND: usize = 256 * 1024;

/// The most arguments a command may have.
pub const MAX_ARGUMENTS: usize = 16 * 1024;

/// The longest inline command and the longest length line (Redis's `PROTO_INLINE_MAX_SIZE`).
pub const MAX_LINE: usize = 64 * 1024;

/// The longest single answer, in bytes; a command that would exceed it is refused.
pub const MAX_REPLY: usize = 1024 * 1024;

/// How many bytes of unanswered input every connection may hold; more comes out of
/// [`INPUT_BUDGET`].
pub const INPUT_FREE: usize = 16 * 1024;

/// How many bytes of unanswered input all connections together may hold beyond [`INPUT_FREE`].
pub const INPUT_BUDGET: usize = 8 * 1024 * 1024;

/// A connection that has this many bytes of unsent answers executes nothing more.
pub const OUTPUT_HIGH_WATER: usize = 64 * 1024;

/// How many bytes of unsent answers all connections together may hold before the one that holds
/// most is closed.
pub const OUTPUT_BUDGET: usize = 8 * 1024 * 1024;

/// When this many bytes of changes wait for the disk, nothing more is executed. One command can
/// still go over it by what one command can change.
pub const MAX_PENDING: usize = 256 * 1024;

/// What one command can add to the changes at most: a command's arguments, or one value that it
/// rewrites, with their framing.
pub const MAX_CHANGE: usize = MAX_COMMAND + MAX_BULK + 64 * 1024;

/// While the log is compacted: how much of the data goes into one commit at least.
pub const COMPACTION_STEP: usize = 64 * 1024;

/// What memory a key costs beyond its own bytes and its value's (measured generously: tree node,
/// two allocations).
pub const KEY_OVERHEAD: usize = 128;
