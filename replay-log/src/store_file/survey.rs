//! Looks at a folder of segments without changing anything: what is there, and is it whole?

use std::fs;
use std::path::{Path, PathBuf};

use super::format::{HEADER_LEN, TRAILER_LEN};
use super::index::{Index, Segment};
use super::scan::{Checkpoint, Found, Scanner};
use crate::position::{LogIndex, LogTip};
use crate::store::{Damage, DamageReason, IoFailure, OpenError, ReadError};

/// The ending of a segment that is complete.
pub(super) const SEALED: &str = "seg";
/// The ending of the segment that is written to.
pub(super) const OPEN: &str = "open";
/// The ending of a segment that is being made; of no meaning before it is renamed.
pub(super) const MAKING: &str = "tmp";

/// A segment's file.
#[derive(Clone, Debug)]
pub(super) struct Listed {
    pub(super) path: PathBuf,
    pub(super) first: LogIndex,
    pub(super) sealed: bool,
}

/// What has to be done before the log can be written on.
#[derive(Debug, Default)]
pub(super) struct Repairs {
    /// Files that were being made.
    pub(super) remove: Vec<PathBuf>,
    /// The last segment's end was torn: cut the file to this length.
    pub(super) cut: Option<u64>,
}

#[derive(Debug)]
pub(super) struct Survey {
    pub(super) index: Index,
    pub(super) repairs: Repairs,
}

impl From<ReadError> for OpenError {
    fn from(error: ReadError) -> Self {
        match error {
            ReadError::Damaged(damage) => Self::Damaged(damage),
            ReadError::Io(failure) => Self::Io(failure),
            ReadError::Dropped { .. } | ReadError::Beyond { .. } | ReadError::Truncated { .. } => {
                unreachable!("a scanner of one file knows nothing of the log's bounds")
            }
        }
    }
}

/// The segments of a folder in the log's order, and the leftovers of making one.
pub(super) fn list(dir: &Path) -> Result<(Vec<Listed>, Vec<PathBuf>), OpenError> {
    let (mut segments, mut leftovers) = (Vec::new(), Vec::new());
    let listing = || IoFailure::new("list", dir);
    for file in fs::read_dir(dir).map_err(listing())? {
        let path = file.map_err(listing())?.path();
        let ending = path.extension().and_then(|ending| ending.to_str());
        let Some(ending @ (SEALED | OPEN | MAKING)) = ending else {
            continue;
        };
        let sealed = ending == SEALED;
        let stem = path.file_stem().and_then(|stem| stem.to_str());
        let first = stem
            .filter(|stem| stem.len() == 20)
            .and_then(|stem| stem.parse().ok());
        match first {
            Some(_) if ending == MAKING => leftovers.push(path),
            Some(first) => segments.push(Listed {
                path,
                first: LogIndex(first),
                sealed,
            }),
            None if ending == MAKING => {}
            None => return Err(OpenError::StrangeFile { path }),
        }
    }
    segments.sort_by_key(|segment| segment.first);
    Ok((segments, leftovers))
}

/// Whether a segment begins where its name says and where the log before it ends.
pub(super) fn check_place(
    scanner: &Scanner,
    listed: &Listed,
    before: Option<LogTip>,
) -> Result<(), Damage> {
    let (base, found) = (scanner.base(), scanner.base().index);
    let expected = before.map_or(listed.first, |tip| tip.index);
    if found != expected || found != listed.first {
        return Err(scanner.damage(0, DamageReason::Misplaced { expected, found }));
    }
    if before.is_some_and(|tip| tip != base) {
        return Err(scanner.damage(0, DamageReason::Chain));
    }
    Ok(())
}

/// Looks at every segment: those before the last by header and trailer, the last one wholly.
///
/// Where nothing is ever synced, a host that lost power may have kept the name of the newest sealed
/// segment and not all of its bytes: `unsynced` lets the log end there, as in an open segment.
pub(super) fn survey(dir: &Path, unsynced: bool) -> Result<Survey, OpenError> {
    let (listed, leftovers) = list(dir)?;
    let mut index = Index::default();
    let mut repairs = Repairs {
        remove: leftovers,
        ..Repairs::default()
    };
    let newest_sealed = listed.iter().rposition(|segment| segment.sealed);
    let mut before = None;
    for (i, segment) in listed.iter().enumerate() {
        let last = i + 1 == listed.len();
        let may_be_torn = if segment.sealed {
            unsynced && newest_sealed == Some(i)
        } else {
            last
        };
        let mut scanner = match Scanner::open(&segment.path) {
            Ok(scanner) => scanner,
            Err(ReadError::Damaged(damage)) if may_be_torn && is_unborn(&damage) => {
                repairs.remove.extend(paths(&listed[i..]));
                break;
            }
            Err(error) => return Err(error.into()),
        };
        check_place(&scanner, segment, before)?;
        let start = scanner.here();
        let seen = match (!last).then(|| by_trailer(&mut scanner)) {
            Some(Ok(seen)) => seen,
            Some(Err(error)) if !may_be_torn => return Err(error),
            Some(Err(_)) | None => {
                scanner.seek(start);
                scan_last(&mut scanner, may_be_torn, &mut repairs)?
            }
        };
        before = Some(seen.tip);
        let ends = !seen.sealed;
        index.segments.push(seen);
        if ends {
            // Nothing can follow what was lost.
            repairs.remove.extend(paths(&listed[i + 1..]));
            break;
        }
    }
    Ok(Survey { index, repairs })
}

fn paths(segments: &[Listed]) -> impl Iterator<Item = PathBuf> {
    segments.iter().map(|segment| segment.path.clone())
}

/// A segment that ends within its header holds nothing that could be lost.
pub(super) fn is_unborn(damage: &Damage) -> bool {
    matches!(damage.reason, DamageReason::CutOff)
}

/// Believes a segment's trailer; what is before it is checked when it is read.
fn by_trailer(scanner: &mut Scanner) -> Result<Segment, OpenError> {
    let (base, end) = (scanner.base(), scanner.end());
    let at = end.saturating_sub(TRAILER_LEN as u64);
    let tip = if at < HEADER_LEN as u64 {
        None
    } else {
        scanner.trailer_at(at)?
    };
    let tip = tip.ok_or_else(|| scanner.damage(at, DamageReason::NoTrailer))?;
    Ok(Segment {
        path: scanner.path().to_owned(),
        base,
        tip,
        len: end,
        sealed: true,
        checkpoints: None,
    })
}

fn scan_last(
    scanner: &mut Scanner,
    may_be_torn: bool,
    repairs: &mut Repairs,
) -> Result<Segment, OpenError> {
    let mut checkpoints: Vec<Checkpoint> = vec![scanner.here()];
    let complete = loop {
        match scanner.next() {
            Ok(Found::Batch(_)) => {}
            Ok(Found::Checkpoint) => checkpoints.push(scanner.here()),
            Ok(Found::Trailer) => break true,
            Ok(Found::End) => break false,
            Err(ReadError::Damaged(damage)) if may_be_torn && scanner.is_torn(&damage)? => {
                repairs.cut = Some(scanner.offset());
                break false;
            }
            Err(error) => return Err(error.into()),
        }
    };
    if !may_be_torn && !complete {
        let end = scanner.offset();
        return Err(scanner.damage(end, DamageReason::NoTrailer).into());
    }
    Ok(Segment {
        path: scanner.path().to_owned(),
        base: scanner.base(),
        tip: scanner.tip(),
        len: scanner.offset(),
        sealed: complete,
        checkpoints: Some(checkpoints),
    })
}
