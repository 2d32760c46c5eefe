//! The records on disk: two files of fixed blocks, of which one is in use.
//!
//! ```text
//! slot-0   header │ all entries, of generation 7 │ change 1 │ change 2 │ …        room
//! slot-1   header │ all entries, of generation 6 │ change 1 │ …
//! ```
//!
//! Changes are appended to the file in use, however many there are at once, with one sync for all.
//! When it is full, or a write to it failed so that nobody knows what it holds, all entries are
//! written into the other file as the next generation, its header last; from then on that one is in
//! use. What of the other file became durable then does not matter any more.
//!
//! The blocks are written when the files are made: where a disk is full, changes are kept all the
//! same.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use replay_log::disk;
use serde::{Deserialize, Serialize};

use crate::agent::certs::Identity;
use crate::agent::durable;
use crate::agent::space::Space;
use crate::protocol::{Record, Seen, VmName};

/// What is written at once, and where every part begins, in bytes.
const BLOCK: u64 = 4096;
/// The room of a file: a header, the entries and three changes of a witness with few VMs.
const SLOT_MIN: u64 = 5 * BLOCK;
/// Its room to begin with where the disk has plenty: some two hundred changes.
const SLOT_GOOD: u64 = 256 * BLOCK;
/// A disk has plenty when so many files of that size fit in.
const PLENTY: u64 = 16;
/// More than any file of ours: nothing longer is read.
const SLOT_MAX: u64 = 1 << 30;
/// What a file begins with; its last digit is the version of the format.
const MAGIC: &[u8; 16] = b"understudy slot1";
/// What a change begins with.
const CHANGE: &[u8; 8] = b"us-chang";
/// The bytes of a header, and of what stands before a change.
const HEADER: usize = 16 + 8 + 8 + 8 + 32 + 32;
const CHANGE_HEADER: usize = 8 + 8 + 8 + 8 + 32;

/// What is kept of one VM.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Entry {
    /// Its record, if there is one.
    pub(super) record: Option<Record>,
    /// That a host has seen this newer state, so that the record is not to be changed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) set_back: Option<Seen>,
    /// Who has brought the name in. Earlier versions did not note it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) named_by: Option<Identity>,
}

impl Entry {
    /// Whom the name counts for.
    pub(super) fn counts_for(&self) -> Option<Identity> {
        let primary = self.record.as_ref().map(|record| &record.primary.host);
        let primary = primary.and_then(|host| host.as_str().parse().ok());
        self.named_by
            .clone()
            .or_else(|| primary.map(|name| Identity::host(&name)))
    }
}

/// Everything that is kept.
pub(super) type Entries = BTreeMap<VmName, Entry>;

/// Why the files cannot be opened.
#[derive(Debug)]
pub(super) enum StoreError {
    /// A file cannot be read or made.
    Io { path: PathBuf, source: io::Error },
    /// A file does not hold what was written to it.
    Damaged { path: PathBuf, what: &'static str },
}

/// The two files.
pub(super) struct Store {
    slots: [File; 2],
    /// The folder they were made in ([`super::folder`]).
    id: u64,
    /// Which is in use.
    active: usize,
    /// The highest generation that anything was written of.
    generation: u64,
    /// The number of the next change, and where it goes.
    number: u64,
    at: u64,
    /// A write failed: what the file in use holds is not known.
    doubtful: bool,
    /// Makes the next writes fail, in tests.
    #[cfg(test)]
    pub(super) broken: Option<Broken>,
}

/// How writes fail in tests.
#[cfg(test)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Broken {
    /// Nothing is written.
    Write,
    /// Everything is written, and the sync fails.
    Sync,
    /// The files do not grow.
    Full,
}

/// What was found in a folder.
pub(super) enum Found {
    /// Files with entries, made in the folder of this identity.
    Whole { store: Store, entries: Entries },
    /// Nothing that was ever finished.
    Nothing,
}

const NAMES: [&str; 2] = ["slot-0", "slot-1"];

impl Store {
    /// Opens the files in a folder.
    pub(super) fn open(folder: &Path) -> Result<Found, StoreError> {
        let mut best: Option<(usize, Slot)> = None;
        for (index, name) in NAMES.iter().enumerate() {
            let path = folder.join(name);
            forget_cached(&path)?;
            let bytes = durable::read_bounded(&path, SLOT_MAX);
            let bytes = bytes.map_err(|source| StoreError::Io { path, source })?;
            let Some(slot) = bytes.as_deref().and_then(Slot::parse) else {
                continue;
            };
            if best
                .as_ref()
                .is_none_or(|(_, other)| other.generation < slot.generation)
            {
                best = Some((index, slot));
            }
        }
        let Some((active, slot)) = best else {
            return Ok(Found::Nothing);
        };
        let Contents {
            entries,
            at,
            number,
        } = slot.contents.map_err(|what| StoreError::Damaged {
            path: folder.join(NAMES[active]),
            what,
        })?;
        let store = Self {
            slots: open_slots(folder)?,
            id: slot.id,
            active,
            generation: slot.generation,
            number,
            at,
            doubtful: false,
            #[cfg(test)]
            broken: None,
        };
        Ok(Found::Whole { store, entries })
    }

    /// Makes the files, with these entries in them.
    pub(super) fn create(folder: &Path, id: u64, entries: &Entries) -> Result<Self, StoreError> {
        let mut store = Self {
            slots: open_slots(folder)?,
            id,
            active: 1,
            generation: 0,
            number: 1,
            at: 0,
            doubtful: true,
            #[cfg(test)]
            broken: None,
        };
        let failed = |source| StoreError::Io {
            path: folder.to_owned(),
            source,
        };
        // What was there was never finished.
        for slot in &store.slots {
            slot.set_len(0).map_err(failed)?;
        }
        store.rewrite(entries, &Entries::new()).map_err(failed)?;
        // Its blocks, too, have to be there when the disk is full.
        store.grow(1, SLOT_MIN).map_err(failed)?;
        let room = Space::of(folder).map_err(|errno| failed(errno.into()))?;
        let good = SLOT_GOOD.min(room.free / PLENTY);
        for slot in [0, 1] {
            store.grow(slot, good).map_err(failed)?;
        }
        let names = File::open(folder).and_then(|folder| folder.sync_all());
        names.map_err(failed)?;
        Ok(store)
    }

    /// The folder the files were made in.
    pub(super) const fn id(&self) -> u64 {
        self.id
    }

    /// Whether a write failed since the last that did not.
    pub(super) const fn is_doubtful(&self) -> bool {
        self.doubtful
    }

    /// Keeps these changes durably, of what `kept` was before. After an error nobody knows whether
    /// they are kept, until the next success without them. Blocks for as long as the disk takes.
    pub(super) fn append(&mut self, kept: &Entries, changes: &Entries) -> io::Result<()> {
        let payload = serde_json::to_vec(changes).map_err(io::Error::other)?;
        let mut bytes = Vec::with_capacity(payload.len() + CHANGE_HEADER);
        bytes.extend_from_slice(CHANGE);
        bytes.extend_from_slice(&self.generation.to_le_bytes());
        bytes.extend_from_slice(&self.number.to_le_bytes());
        bytes.extend_from_slice(&(payload.len() as u64).to_le_bytes());
        bytes.extend_from_slice(change_digest(self.generation, self.number, &payload).as_bytes());
        bytes.extend_from_slice(&payload);
        fill_block(&mut bytes);
        let end = self.at + bytes.len() as u64;
        if self.doubtful || end > self.slots[self.active].metadata()?.len() {
            return self.rewrite(kept, changes);
        }
        let kept = self
            .write(self.active, &bytes, self.at)
            .and_then(|()| self.sync(self.active));
        match kept {
            Ok(()) => {
                self.at = end;
                self.number += 1;
            }
            Err(_) => self.doubtful = true,
        }
        kept
    }

    /// Writes all entries into the file that is not in use, and uses that one from then on.
    pub(super) fn rewrite(&mut self, kept: &Entries, changes: &Entries) -> io::Result<()> {
        // Whatever comes of it: a generation is written once.
        self.generation += 1;
        self.doubtful = true;
        let other = 1 - self.active;
        let all: BTreeMap<_, _> = kept.iter().chain(changes).collect();
        let payload = serde_json::to_vec(&all).map_err(io::Error::other)?;
        let mut header = Vec::with_capacity(BLOCK as usize);
        header.extend_from_slice(MAGIC);
        header.extend_from_slice(&self.id.to_le_bytes());
        header.extend_from_slice(&self.generation.to_le_bytes());
        header.extend_from_slice(&(payload.len() as u64).to_le_bytes());
        header.extend_from_slice(blake3::hash(&payload).as_bytes());
        let sum = blake3::hash(&header);
        header.extend_from_slice(sum.as_bytes());
        fill_block(&mut header);
        let mut body = payload;
        fill_block(&mut body);
        let needed = BLOCK + body.len() as u64;
        if let Err(error) = self.grow(other, (2 * needed).max(SLOT_MIN))
            && self.slots[other].metadata()?.len() < needed
        {
            return Err(error);
        }
        self.write(other, &body, BLOCK)?;
        self.sync(other)?;
        // Last: a header says that what it speaks of is there.
        self.write(other, &header, 0)?;
        self.sync(other)?;
        self.active = other;
        self.at = needed;
        self.number = 1;
        self.doubtful = false;
        Ok(())
    }

    /// The same for a folder with another identity.
    pub(super) fn rewrite_as(
        &mut self,
        id: u64,
        kept: &Entries,
        changes: &Entries,
    ) -> io::Result<()> {
        self.id = id;
        self.rewrite(kept, changes)
    }

    /// Makes a file this long at least, with blocks that are written and not only promised.
    fn grow(&self, slot: usize, length: u64) -> io::Result<()> {
        let mut at = self.slots[slot].metadata()?.len() / BLOCK * BLOCK;
        #[cfg(test)]
        if self.broken == Some(Broken::Full) && at < length {
            return Err(io::ErrorKind::StorageFull.into());
        }
        let zeros = [0; BLOCK as usize];
        while at < length {
            self.slots[slot].write_all_at(&zeros, at)?;
            at += BLOCK;
        }
        self.sync(slot)
    }

    fn write(&self, slot: usize, bytes: &[u8], at: u64) -> io::Result<()> {
        #[cfg(test)]
        if self.broken == Some(Broken::Write) {
            return Err(io::ErrorKind::ReadOnlyFilesystem.into());
        }
        self.slots[slot].write_all_at(bytes, at)
    }

    fn sync(&self, slot: usize) -> io::Result<()> {
        #[cfg(test)]
        if self.broken == Some(Broken::Sync) {
            return Err(io::Error::from_raw_os_error(5));
        }
        // With the length: a file may have grown.
        self.slots[slot].sync_all()
    }
}

/// Sees to it that what is read of a file is what the disk has: records that another process could not
/// make durable are not kept.
fn forget_cached(path: &Path) -> Result<(), StoreError> {
    let forgotten = match File::open(path) {
        Ok(file) => disk::forget_cached(&file),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    };
    forgotten.map_err(|source| StoreError::Io {
        path: path.to_owned(),
        source,
    })
}

fn open_slots(folder: &Path) -> Result<[File; 2], StoreError> {
    let open = |name: &str| {
        let path = folder.join(name);
        let mut options = OpenOptions::new();
        let options = options.read(true).write(true).create(true).truncate(false);
        let opened = options.open(&path);
        opened.map_err(|source| StoreError::Io { path, source })
    };
    Ok([open(NAMES[0])?, open(NAMES[1])?])
}

fn fill_block(bytes: &mut Vec<u8>) {
    bytes.resize(bytes.len().next_multiple_of(BLOCK as usize), 0);
}

fn change_digest(generation: u64, number: u64, payload: &[u8]) -> blake3::Hash {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&generation.to_le_bytes());
    hasher.update(&number.to_le_bytes());
    hasher.update(payload);
    hasher.finalize()
}

/// What was read from one file.
struct Slot {
    id: u64,
    generation: u64,
    contents: Result<Contents, &'static str>,
}

struct Contents {
    entries: Entries,
    /// Where the next change goes, and its number.
    at: u64,
    number: u64,
}

impl Slot {
    /// `None` where no header was ever finished.
    fn parse(bytes: &[u8]) -> Option<Self> {
        let header = bytes.get(..HEADER)?;
        let (fields, sum) = header.split_at(HEADER - 32);
        if !fields.starts_with(MAGIC) || blake3::hash(fields).as_bytes() != sum {
            return None;
        }
        let (id, generation) = (number_at(fields, 16)?, number_at(fields, 24)?);
        let length = number_at(fields, 32)?;
        let digest = fields.get(40..72)?;
        Some(Self {
            id,
            generation,
            contents: Contents::parse(bytes, generation, length, digest),
        })
    }
}

impl Contents {
    fn parse(
        bytes: &[u8],
        generation: u64,
        length: u64,
        digest: &[u8],
    ) -> Result<Self, &'static str> {
        let body = bytes.get(BLOCK as usize..).unwrap_or_default();
        let payload = usize::try_from(length).ok().and_then(|n| body.get(..n));
        let payload = payload.ok_or("it is too short")?;
        if blake3::hash(payload).as_bytes() != digest {
            return Err("its records are not those that were written");
        }
        let entries = serde_json::from_slice(payload);
        let mut contents = Self {
            entries: entries.map_err(|_| "its records are of another version")?,
            at: BLOCK + length.next_multiple_of(BLOCK),
            number: 1,
        };
        loop {
            let rest = bytes.get(contents.at as usize..).unwrap_or_default();
            let Some((number, payload)) = change(rest, generation) else {
                break;
            };
            if number != contents.number {
                return Err("a change is missing");
            }
            let changes: Entries =
                serde_json::from_slice(payload).map_err(|_| "a change is of another version")?;
            contents.entries.extend(changes);
            contents.number += 1;
            contents.at += ((CHANGE_HEADER + payload.len()) as u64).next_multiple_of(BLOCK);
        }
        // A change that was cut off by a crash is the last that was written; one that others follow
        // was there once.
        let rest = bytes.get(contents.at as usize..).unwrap_or_default();
        let follows = rest
            .chunks(BLOCK as usize)
            .enumerate()
            .skip(1)
            .any(|(block, _)| {
                change(&rest[block * BLOCK as usize..], generation)
                    .is_some_and(|(number, _)| number >= contents.number)
            });
        if follows {
            return Err("a change in its middle cannot be read");
        }
        Ok(contents)
    }
}

/// The change that begins here, whole and of this generation, if there is one.
fn change(bytes: &[u8], generation: u64) -> Option<(u64, &[u8])> {
    if !bytes.starts_with(CHANGE) || number_at(bytes, 8)? != generation {
        return None;
    }
    let (number, length) = (number_at(bytes, 16)?, number_at(bytes, 24)?);
    let digest = bytes.get(32..CHANGE_HEADER)?;
    let payload = bytes.get(CHANGE_HEADER..)?;
    let payload = payload.get(..usize::try_from(length).ok()?)?;
    (change_digest(generation, number, payload).as_bytes() == digest).then_some((number, payload))
}

fn number_at(bytes: &[u8], at: usize) -> Option<u64> {
    let bytes = bytes.get(at..)?.first_chunk::<8>()?;
    Some(u64::from_le_bytes(*bytes))
}

#[cfg(test)]
#[path = "store_tests.rs"]
mod tests;
