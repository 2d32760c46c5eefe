//! The few file operations that an overlay needs, so that tests can lose what was not synced.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// A file with positions.
pub trait Storage: Send {
    /// Fills `data` from `offset`.
    fn read_exact_at(&self, data: &mut [u8], offset: u64) -> io::Result<()>;

    /// Writes all of `data` at `offset`. It need not survive a power failure yet.
    fn write_all_at(&self, data: &[u8], offset: u64) -> io::Result<()>;

    /// Makes what was written survive a power failure.
    fn sync(&self) -> io::Result<()>;

    /// Cuts off or extends; what is added reads as zeros.
    fn set_len(&self, len: u64) -> io::Result<()>;
}

impl Storage for File {
    fn read_exact_at(&self, data: &mut [u8], offset: u64) -> io::Result<()> {
        FileExt::read_exact_at(self, data, offset)
    }

    fn write_all_at(&self, data: &[u8], offset: u64) -> io::Result<()> {
        FileExt::write_all_at(self, data, offset)
    }

    fn sync(&self) -> io::Result<()> {
        self.sync_data()
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        Self::set_len(self, len)
    }
}
