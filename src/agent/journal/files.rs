//! The journal's files: a few of bounded size, numbered lines in them, and marks that say where to begin
//! to read. Owned by the journal's thread.

use std::collections::VecDeque;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead as _, BufReader, Read as _, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};
use std::sync::mpsc::Receiver;

use tokio::sync::watch;

use super::{Incident, Line, Task, What};

/// A file of this size is put aside and a new one begun.
pub(super) const FILE_BYTES: u64 = 4 << 20;
/// How many files are kept, the one that is written included.
pub(super) const FILES: u32 = 4;
/// The longest line.
const LINE_MAX: u64 = 256 * 1024;
/// From one mark to the next, at least. Whoever wants the last line reads no more than this and a line.
const MARK_BYTES: u64 = 4 << 10;

/// Where a line begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Mark {
    number: u64,
    offset: u64,
}

/// Where some of the lines of one file begin, the first among them.
#[derive(Debug, Default)]
struct Marks(Vec<Mark>);

impl Marks {
    fn saw(&mut self, number: u64, offset: u64) {
        let due = |last: &Mark| offset >= last.offset + MARK_BYTES;
        if self.0.last().is_none_or(due) {
            self.0.push(Mark { number, offset });
        }
    }

    fn first(&self) -> Option<u64> {
        self.0.first().map(|mark| mark.number)
    }

    /// Where to begin to read for all lines from this number on.
    fn offset_of(&self, number: u64) -> u64 {
        let later = self.0.partition_point(|mark| mark.number <= number);
        let mark = later.checked_sub(1).and_then(|before| self.0.get(before));
        mark.map_or(0, |mark| mark.offset)
    }
}

/// The files.
pub(super) struct Files {
    folder: PathBuf,
    current: File,
    bytes: u64,
    /// The number of the last line.
    pub(super) last: u64,
    lost: u64,
    reason: String,
    /// Of each file, the newest first.
    marks: VecDeque<Marks>,
}

impl Files {
    pub(super) fn path(folder: &Path, age: u32) -> PathBuf {
        match age {
            0 => folder.join("journal.jsonl"),
            age => folder.join(format!("journal.{age}.jsonl")),
        }
    }

    pub(super) fn open(folder: &Path) -> io::Result<Self> {
        fs::create_dir_all(folder)?;
        let (marks, last) = scan(folder)?;
        let mut current = OpenOptions::new()
            .create(true)
            .append(true)
            .read(true)
            .open(Self::path(folder, 0))?;
        let mut bytes = current.metadata()?.len();
        if bytes > 0 && !ends_with_newline(&Self::path(folder, 0))? {
            // The process died within a line: what follows begins on the next.
            current.write_all(b"\n")?;
            bytes += 1;
        }
        Ok(Self {
            folder: folder.to_owned(),
            current,
            bytes,
            last,
            lost: 0,
            reason: String::new(),
            marks,
        })
    }

    pub(super) fn work(&mut self, tasks: &Receiver<Task>, tell: &watch::Sender<u64>) {
        while let Ok(task) = tasks.recv() {
            match task {
                Task::Write(line, _place) => {
                    self.write(*line);
                    tell.send_replace(self.last);
                }
                Task::Read {
                    after,
                    limit,
                    reply,
                } => {
                    // Whoever asked may have gone.
                    let _ = reply.send(self.read(after, limit));
                }
            }
        }
    }

    fn write(&mut self, line: Line) {
        if self.lost > 0 {
            let what = What::Incident(Incident::LinesLost {
                count: self.lost,
                reason: self.reason.clone(),
            });
            let lost = Line {
                text: what.to_string(),
                what,
                vm: None,
                ..line.clone()
            };
            if self.try_write(lost).is_ok() {
                self.lost = 0;
            }
        }
        if let Err(error) = self.try_write(line) {
            self.lost += 1;
            self.reason = error.to_string();
        }
    }

    fn try_write(&mut self, mut line: Line) -> io::Result<()> {
        line.number = self.last + 1;
        let mut text = serde_json::to_vec(&line)?;
        text.push(b'\n');
        if text.len() as u64 > LINE_MAX {
            return Err(io::Error::other("a line was too long"));
        }
        if self.bytes + text.len() as u64 > FILE_BYTES {
            self.rotate()?;
        }
        if let Err(error) = self.current.write_all(&text) {
            // A part of it may be there: what follows must not continue that.
            self.mend();
            return Err(error);
        }
        if let Some(marks) = self.marks.front_mut() {
            marks.saw(line.number, self.bytes);
        }
        self.bytes += text.len() as u64;
        self.last = line.number;
        Ok(())
    }

    /// After a line that was written in part: the file is what it was, or its length is known again.
    fn mend(&mut self) {
        if self.current.set_len(self.bytes).is_err()
            && let Ok(metadata) = self.current.metadata()
        {
            self.bytes = metadata.len();
        }
    }

    fn rotate(&mut self) -> io::Result<()> {
        let rotated = self.try_rotate();
        match &rotated {
            Ok(()) => {
                self.marks.truncate(FILES as usize - 1);
                self.marks.push_front(Marks::default());
            }
            // Nobody knows which of them have new names.
            Err(_) => {
                if let Ok((marks, _)) = scan(&self.folder) {
                    self.marks = marks;
                }
            }
        }
        rotated
    }

    fn try_rotate(&mut self) -> io::Result<()> {
        for age in (0..FILES - 1).rev() {
            let from = Self::path(&self.folder, age);
            if from.exists() {
                fs::rename(from, Self::path(&self.folder, age + 1))?;
            }
        }
        self.current = OpenOptions::new()
            .create(true)
            .append(true)
            .open(Self::path(&self.folder, 0))?;
        self.bytes = 0;
        Ok(())
    }

    /// The lines after this number, at most so many.
    pub(super) fn read(&self, after: u64, limit: usize) -> io::Result<Vec<Line>> {
        let mut lines = Vec::new();
        for (age, offset) in self.places(after.saturating_add(1)) {
            each_line(&Self::path(&self.folder, age), offset, |line, _| {
                if line.number > after && lines.len() < limit {
                    lines.push(line);
                }
                lines.len() < limit
            })?;
            if lines.len() >= limit {
                break;
            }
        }
        Ok(lines)
    }

    /// The files that have lines from this number on, the oldest first, and where in each to begin.
    fn places(&self, number: u64) -> Vec<(u32, u64)> {
        let mut places = Vec::new();
        for (age, marks) in (0..FILES).zip(&self.marks) {
            places.push((age, marks.offset_of(number)));
            if marks.first().is_some_and(|first| first <= number) {
                break;
            }
        }
        places.reverse();
        places
    }
}

/// Reads every file once: their marks, and the number of the last line.
fn scan(folder: &Path) -> io::Result<(VecDeque<Marks>, u64)> {
    let (mut all, mut last) = (VecDeque::new(), 0);
    for age in 0..FILES {
        let mut marks = Marks::default();
        each_line(&Files::path(folder, age), 0, |line, offset| {
            marks.saw(line.number, offset);
            last = last.max(line.number);
            true
        })?;
        all.push_back(marks);
    }
    Ok((all, last))
}

fn ends_with_newline(path: &Path) -> io::Result<bool> {
    let mut file = File::open(path)?;
    file.seek(SeekFrom::End(-1))?;
    let mut last = [0];
    file.read_exact(&mut last)?;
    Ok(last == *b"\n")
}

/// Hands out the lines of a file that can be read, from an offset on, with their own offsets, until
/// `take` wants no more. One that the process died within is left out.
fn each_line(path: &Path, offset: u64, mut take: impl FnMut(Line, u64) -> bool) -> io::Result<()> {
    let mut file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    file.seek(SeekFrom::Start(offset))?;
    let mut reader = BufReader::new(file);
    let (mut offset, mut text) = (offset, Vec::new());
    loop {
        text.clear();
        let read = (&mut reader).take(LINE_MAX).read_until(b'\n', &mut text)?;
        if read == 0 {
            return Ok(());
        }
        if let Ok(line) = serde_json::from_slice(&text)
            && !take(line, offset)
        {
            return Ok(());
        }
        offset += read as u64;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::{Event, HostName};

    fn line(words: usize) -> Line {
        let what = What::from(Event::Waiting {
            why: "word ".repeat(words),
        });
        Line {
            number: 0,
            at: "now".to_owned(),
            clock: 1,
            host: HostName::new("a").expect("a name"),
            vm: None,
            text: what.to_string(),
            what,
        }
    }

    /// How many bytes are looked at for all lines from this number on.
    fn looked_at(files: &Files, number: u64) -> u64 {
        let length = |(age, offset): (u32, u64)| {
            let file = fs::metadata(Files::path(&files.folder, age)).expect("a file");
            file.len() - offset
        };
        files.places(number).into_iter().map(length).sum()
    }

    #[test]
    fn what_is_read_grows_with_what_is_wanted_and_not_with_what_there_is() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let mut files = Files::open(folder.path()).expect("files");
        for words in 0..20_000 {
            files.write(line(words % 200));
        }
        let again = Files::open(folder.path()).expect("files");
        let all = files.read(0, usize::MAX).expect("readable");
        let first = all.first().expect("lines").number;
        assert!(first > 1, "the first file is gone");
        for files in [&files, &again] {
            let last = files.last;
            assert_eq!(last, 20_000);
            let bytes = looked_at(files, last);
            assert!(bytes < 3 * MARK_BYTES, "{bytes} for one line");
            assert_eq!(looked_at(files, last + 1), looked_at(files, last));
            assert!(looked_at(files, first) > 2 * FILE_BYTES);
            for after in [first - 1, first, first + 4_321, last - 1_000, last - 1] {
                let read = files.read(after, 700).expect("readable");
                let numbers: Vec<_> = read.iter().map(|line| line.number).collect();
                let expected: Vec<_> = (after + 1..=last.min(after + 700)).collect();
                assert_eq!(numbers, expected);
            }
            assert_eq!(files.read(last, 10).expect("readable"), []);
            assert_eq!(files.read(u64::MAX, 10).expect("readable"), []);
            assert_eq!(files.read(0, 0).expect("readable"), []);
        }
    }

    #[test]
    fn a_file_that_cannot_be_put_aside_loses_lines_and_says_so() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let mut files = Files::open(folder.path()).expect("files");
        // A folder that is not empty is in the way of the oldest file's name.
        let in_the_way = Files::path(folder.path(), FILES - 1);
        fs::create_dir_all(in_the_way.join("x")).expect("a folder");
        while files.lost == 0 {
            files.write(line(10_000));
        }
        let kept = files.last;
        fs::remove_dir_all(&in_the_way).expect("removed");
        files.write(line(1));
        let read = files.read(kept - 1, 10).expect("readable");
        let numbers: Vec<_> = read.iter().map(|line| line.number).collect();
        assert_eq!(numbers, [kept, kept + 1, kept + 2]);
        assert!(matches!(
            read[1].what,
            What::Incident(Incident::LinesLost { count: 1, .. })
        ));
    }
}
