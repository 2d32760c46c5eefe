//! What a file has on the disk, and not what the kernel remembers of it.

use std::fs::File;
use std::io;

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};

/// Makes whatever is read of this file from now on come from the disk. To be called before anything
/// is believed of a file that another process may have written.
///
/// After a failed sync the kernel holds the pages that it could not write for clean: another process
/// would read in them what the disk does not have, and its own syncs would find nothing to do. So the
/// file is synced, and then the kernel is asked to forget it. It does not promise to: a file system
/// that has no disk has nothing else to read from. Blocks for as long as the disk takes.
pub fn forget_cached(file: &File) -> io::Result<()> {
    file.sync_data()?;
    drop_pages(file);
    Ok(())
}

/// The second half of that, for a file that has just been synced.
pub(crate) fn drop_pages(file: &File) {
    // Whole, whatever its length. A file system that refuses the advice keeps no promise about it
    // either way.
    let _advice = posix_fadvise(file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED);
}
