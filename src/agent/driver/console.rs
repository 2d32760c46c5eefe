//! What the guest says on its console, on its way to `console.log`. One write at a time, on a thread that
//! may wait for the disk. The console is for people: what the disk does not take in time is lost, and
//! the log says where.

use super::home::Home;

/// So many bytes wait for the disk at most.
const WAITING: usize = 1 << 20;

/// The console of one VM.
pub struct Console {
    home: Home,
    waiting: Vec<u8>,
    /// So many bytes are missing behind what waits.
    lost: u64,
    writing: bool,
}

impl Console {
    /// Writes into this folder.
    pub const fn new(home: Home) -> Self {
        Self {
            home,
            waiting: Vec::new(),
            lost: 0,
            writing: false,
        }
    }

    /// The guest has said this.
    pub fn say(&mut self, bytes: &[u8]) {
        let room = WAITING.saturating_sub(self.waiting.len());
        // What comes after something that was lost would look as if it came right behind.
        let taken = if self.lost > 0 {
            0
        } else {
            room.min(bytes.len())
        };
        self.waiting.extend_from_slice(&bytes[..taken]);
        self.lost += (bytes.len() - taken) as u64;
    }

    /// The next thing to be written, on a thread that may wait, and then told by [`Self::written`].
    pub fn next(&mut self) -> Option<impl FnOnce() + Send + 'static> {
        if self.writing || self.waiting.is_empty() {
            return None;
        }
        self.writing = true;
        let mut bytes = std::mem::take(&mut self.waiting);
        if self.lost > 0 {
            let lost = std::mem::take(&mut self.lost);
            let note = format!("\n[{lost} bytes are missing here: the host's disk was busy]\n");
            bytes.extend_from_slice(note.as_bytes());
        }
        let home = self.home.clone();
        Some(move || home.console(&bytes))
    }

    /// What was written last is written.
    pub const fn written(&mut self) {
        self.writing = false;
    }

    /// Whether nothing waits any more.
    pub const fn is_idle(&self) -> bool {
        !self.writing && self.waiting.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::VmName;

    #[test]
    fn a_busy_disk_is_not_waited_for_and_what_is_lost_is_said() {
        let folder = tempfile::tempdir().expect("a folder");
        let vm = VmName::new("books").expect("a name");
        let home = Home::open(folder.path(), &vm).expect("a folder");
        let mut console = Console::new(home);
        assert!(console.next().is_none());
        console.say(b"one\n");
        let write = console.next().expect("something");
        console.say(&vec![b'.'; WAITING - 1]);
        console.say(b"23");
        console.say(b"4");
        assert!(console.next().is_none(), "one write at a time");
        write();
        console.written();
        console.next().expect("the rest")();
        assert!(!console.is_idle());
        console.written();
        assert!(console.is_idle());
        console.say(b"five\n");
        console.next().expect("the end")();
        let path = folder.path().join("vms/books/console.log");
        let text = std::fs::read_to_string(path).expect("a log");
        let (said, missing) = text.split_once('[').expect("a note");
        assert_eq!(said.len(), 4 + WAITING + 1);
        assert!(said.ends_with(".2\n"));
        assert_eq!(
            missing,
            "2 bytes are missing here: the host's disk was busy]\nfive\n"
        );
    }
}
