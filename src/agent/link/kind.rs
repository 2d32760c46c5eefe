//! What streams are for.

/// What a stream is for: its first byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum StreamKind {
    /// The control lane between two hosts.
    Control,
    /// The log lane between two hosts.
    Log,
    /// Numbered frames between a gateway and a host.
    Frames,
    /// An operator's request to a host.
    Operator,
    /// A request to the keeper of the records.
    Witness,
    /// Bulk between hosts: disk bases.
    Bulk,
}

impl StreamKind {
    const ALL: [Self; 6] = [
        Self::Control,
        Self::Log,
        Self::Frames,
        Self::Operator,
        Self::Witness,
        Self::Bulk,
    ];

    /// The byte on the wire. Never reuse one.
    pub const fn byte(self) -> u8 {
        match self {
            Self::Control => 1,
            Self::Log => 2,
            Self::Frames => 3,
            Self::Operator => 4,
            Self::Witness => 5,
            Self::Bulk => 6,
        }
    }

    /// The kind with this byte.
    pub fn from_byte(byte: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.byte() == byte)
    }

    /// Which stream goes first when the network is the limit; higher first.
    pub const fn priority(self) -> i32 {
        match self {
            Self::Control | Self::Witness => 3,
            Self::Log | Self::Frames => 2,
            Self::Operator => 1,
            Self::Bulk => 0,
        }
    }
}
