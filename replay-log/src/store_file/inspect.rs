//! Reading a folder of segments without being its store: nothing is locked and nothing written.
//!
//! Everything up to the first damage is given out, with the segment and offset where it stands.

use std::path::{Path, PathBuf};
use std::vec;

use super::scan::{Found, Scanner};
use super::survey::{Listed, check_place, is_unborn, list};
use crate::batch::Batch;
use crate::position::LogTip;
use crate::store::{DamageReason, OpenError, ReadError};

/// A batch and where it was found.
#[derive(Clone, Debug)]
pub struct LocatedBatch {
    /// The file.
    pub segment: PathBuf,
    /// Where its chunk begins in the file.
    pub offset: u64,
    /// The batch, its checksum and its place in the log checked, its entries not yet decoded.
    pub batch: Batch,
    /// Where the log ends after it.
    pub tip: LogTip,
}

/// A last write that was cut off.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TornEnd {
    /// The file.
    pub segment: PathBuf,
    /// Where the good part ends.
    pub offset: u64,
    /// How many bytes follow it.
    pub bytes: u64,
}

/// What is known of one segment, once all of it was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SegmentReport {
    /// The file.
    pub path: PathBuf,
    /// Whether it is sealed.
    pub sealed: bool,
    /// Where the log ends before it.
    pub base: LogTip,
    /// Where the log ends after it.
    pub tip: LogTip,
    /// Its good bytes.
    pub bytes: u64,
    /// How many batches it holds.
    pub batches: u64,
    /// Their payloads' bytes, before compression.
    pub payload_bytes: u64,
}

/// Reads batches in order; ends after the first error. What it has seen of whole segments is in
/// [`Inspector::segments`].
#[derive(Debug)]
pub struct Inspector {
    to_come: vec::IntoIter<Listed>,
    scanner: Option<Scanner>,
    segments: Vec<SegmentReport>,
    torn: Option<TornEnd>,
}

/// Begins to read the log in `dir`.
pub fn inspect(dir: &Path) -> Result<Inspector, OpenError> {
    let (segments, _leftovers) = list(dir)?;
    Ok(Inspector {
        to_come: segments.into_iter(),
        scanner: None,
        segments: Vec::new(),
        torn: None,
    })
}

impl Inspector {
    /// The segments begun so far, the last one as far as it was read.
    pub fn segments(&self) -> &[SegmentReport] {
        &self.segments
    }

    /// Where the good part of the log ends that was read so far.
    pub fn tip(&self) -> LogTip {
        self.segments.last().map(|s| s.tip).unwrap_or_default()
    }

    /// The write that was cut off at the very end, if there was one; known after the last batch.
    pub fn torn(&self) -> Option<&TornEnd> {
        self.torn.as_ref()
    }

    fn is_last(&self) -> bool {
        self.to_come.as_slice().is_empty()
    }

    /// Opens the next segment; says whether there was one.
    fn begin_segment(&mut self) -> Result<bool, OpenError> {
        let Some(next) = self.to_come.next() else {
            return Ok(false);
        };
        let scanner = match Scanner::open(&next.path) {
            Ok(scanner) => scanner,
            Err(ReadError::Damaged(damage))
                if self.is_last() && !next.sealed && is_unborn(&damage) =>
            {
                self.torn = Some(TornEnd {
                    bytes: next.path.metadata().map_or(0, |data| data.len()),
                    segment: next.path,
                    offset: 0,
                });
                return Ok(false);
            }
            Err(error) => return Err(error.into()),
        };
        check_place(&scanner, &next, self.segments.last().map(|s| s.tip))?;
        self.segments.push(SegmentReport {
            path: next.path,
            sealed: next.sealed,
            base: scanner.base(),
            tip: scanner.base(),
            bytes: scanner.offset(),
            batches: 0,
            payload_bytes: 0,
        });
        self.scanner = Some(scanner);
        Ok(true)
    }

    /// The next batch of the current segment; `None` at its end.
    fn in_segment(&mut self) -> Result<Option<LocatedBatch>, OpenError> {
        let last_file = self.is_last();
        let (Some(scanner), Some(report)) = (&mut self.scanner, self.segments.last_mut()) else {
            return Ok(None);
        };
        loop {
            let offset = scanner.offset();
            let found = match scanner.next() {
                Ok(found) => found,
                Err(ReadError::Damaged(damage))
                    if last_file && !report.sealed && scanner.is_torn(&damage)? =>
                {
                    self.torn = Some(TornEnd {
                        segment: report.path.clone(),
                        offset,
                        bytes: scanner.end().saturating_sub(offset),
                    });
                    Found::End
                }
                Err(error) => return Err(error.into()),
            };
            report.bytes = scanner.offset();
            match found {
                Found::Checkpoint => {}
                Found::Batch(batch) => {
                    report.tip = scanner.tip();
                    report.batches += 1;
                    report.payload_bytes += batch.payload().len() as u64;
                    return Ok(Some(LocatedBatch {
                        segment: report.path.clone(),
                        offset,
                        batch,
                        tip: report.tip,
                    }));
                }
                // A segment that others follow is complete, whatever it is called.
                Found::End if report.sealed || !last_file => {
                    return Err(scanner.damage(offset, DamageReason::NoTrailer).into());
                }
                Found::End | Found::Trailer => return Ok(None),
            }
        }
    }

    fn advance(&mut self) -> Result<Option<LocatedBatch>, OpenError> {
        loop {
            if self.scanner.is_some() {
                if let Some(batch) = self.in_segment()? {
                    return Ok(Some(batch));
                }
                self.scanner = None;
            }
            if !self.begin_segment()? {
                return Ok(None);
            }
        }
    }
}

impl Iterator for Inspector {
    type Item = Result<LocatedBatch, OpenError>;

    fn next(&mut self) -> Option<Self::Item> {
        let next = self.advance();
        if next.is_err() {
            self.scanner = None;
            self.to_come = Vec::new().into_iter();
        }
        next.transpose()
    }
}

/// What [`verify`] found.
#[derive(Debug)]
pub struct Report {
    /// The segments, the last one up to the damage if there is any.
    pub segments: Vec<SegmentReport>,
    /// Where the good part of the log ends.
    pub tip: LogTip,
    /// A write that was cut off at the very end: no damage.
    pub torn: Option<TornEnd>,
    /// The first thing that is wrong.
    pub damage: Option<OpenError>,
}

/// Reads the whole log in `dir`, decodes every entry, and calls `seen` after each batch.
pub fn verify(dir: &Path, mut seen: impl FnMut(&LocatedBatch)) -> Result<Report, OpenError> {
    let mut inspector = inspect(dir)?;
    let (mut tip, mut damage) = (None, None);
    for next in &mut inspector {
        let found = next.and_then(|found| match found.batch.entries().find_map(Result::err) {
            Some(error) => Err(OpenError::Damaged(crate::store::Damage {
                segment: found.segment,
                offset: found.offset,
                reason: DamageReason::Entry(error),
            })),
            None => Ok(found),
        });
        match found {
            Ok(found) => {
                seen(&found);
                tip = Some(found.tip);
            }
            Err(error) => {
                damage = Some(error);
                break;
            }
        }
    }
    Ok(Report {
        tip: tip.unwrap_or_else(|| {
            inspector
                .segments()
                .first()
                .map(|s| s.base)
                .unwrap_or_default()
        }),
        segments: inspector.segments,
        torn: inspector.torn,
        damage,
    })
}
