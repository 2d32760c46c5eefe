//! The program as the hosts get it: a cpio archive that is appended to their initramfs.
//!
//! Hosts need what is loaded of it and nothing more, so debugging information stays behind: what
//! follows the last loaded byte is cut off. A program that is linked dynamically brings its
//! libraries with it.

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use thiserror::Error;

/// Where hosts have it.
const PLACE: &str = "bin/understudy";
/// The end of a cpio archive.
const TRAILER: &str = "TRAILER!!!";
/// Names the program that loads a dynamically linked one.
const PT_INTERP: u32 = 3;

/// Why hosts cannot have the program.
#[derive(Debug, Error)]
pub enum ProgramError {
    /// It cannot be read.
    #[error("the program for the hosts, {}, cannot be read", path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// It is no program, or one for other machines.
    #[error(
        "{} is no program for x86-64 Linux: build one with RUSTFLAGS='-C target-feature=+crt-static' cargo build --release --target x86_64-unknown-linux-gnu",
        .0.display()
    )]
    NoElf(PathBuf),
    /// Its libraries are not there.
    #[error("the libraries of {} cannot be found: {said}", path.display())]
    Libraries {
        /// Whose.
        path: PathBuf,
        /// What ldd said.
        said: String,
    },
    /// The archive cannot be written.
    #[error("the hosts' initramfs cannot be written: set TMPDIR to a folder with room")]
    Write(#[source] io::Error),
}

/// Writes the archive with this program.
pub fn append(program: &Path, to: &mut impl Write) -> Result<(), ProgramError> {
    let whole = read(program)?;
    let elf = Elf::parse(&whole).ok_or_else(|| ProgramError::NoElf(program.to_owned()))?;
    let mut archive = Archive::new(to);
    archive.file(PLACE, &elf.loaded(&whole))?;
    if elf.dynamic {
        let mut folders = BTreeSet::new();
        for library in libraries(program)? {
            let name = library.strip_prefix("/").unwrap_or(&library);
            let above: Vec<_> = name.ancestors().skip(1).collect();
            for folder in above.into_iter().rev() {
                if !folder.as_os_str().is_empty() && folders.insert(folder.to_owned()) {
                    archive.folder(&folder.to_string_lossy())?;
                }
            }
            archive.file(&name.to_string_lossy(), &read(&library)?)?;
        }
    }
    archive.finish()
}

fn read(path: &Path) -> Result<Vec<u8>, ProgramError> {
    fs::read(path).map_err(|source| ProgramError::Read {
        path: path.to_owned(),
        source,
    })
}

fn libraries(program: &Path) -> Result<Vec<PathBuf>, ProgramError> {
    let failed = |said: String| ProgramError::Libraries {
        path: program.to_owned(),
        said,
    };
    let output = Command::new("ldd")
        .arg(program)
        .stdin(Stdio::null())
        .output()
        .map_err(|error| failed(format!("ldd cannot be started: {error}")))?;
    let said = String::from_utf8_lossy(&output.stdout);
    if !output.status.success() || said.contains("not found") {
        return Err(failed(said.trim().replace('\n', ";")));
    }
    // "libc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x…)", "/lib64/ld-linux-x86-64.so.2 (0x…)"
    let paths = said
        .lines()
        .filter_map(|line| line.split_whitespace().find(|word| word.starts_with('/')));
    Ok(paths.map(PathBuf::from).collect())
}

/// What matters of an ELF file.
struct Elf {
    dynamic: bool,
    /// Where the last loaded byte of the file ends.
    end: usize,
}

impl Elf {
    fn parse(bytes: &[u8]) -> Option<Self> {
        let u16_at = |at| Some(u16::from_le_bytes(*part(bytes, at)?));
        let u32_at = |at| Some(u32::from_le_bytes(*part(bytes, at)?));
        let u64_at = |at| usize::try_from(u64::from_le_bytes(*part(bytes, at)?)).ok();
        // 64 bits, little-endian; x86-64.
        let ours = part(bytes, 0)? == b"\x7fELF\x02\x01" && u16_at(18)? == 62;
        let table = ours.then_some(u64_at(32)?)?;
        let entry_size = usize::from(u16_at(54)?);
        let entries = usize::from(u16_at(56)?);
        let mut elf = Self {
            dynamic: false,
            end: table.checked_add(entries.checked_mul(entry_size)?)?,
        };
        for entry in 0..entries {
            let at = table.checked_add(entry.checked_mul(entry_size)?)?;
            elf.dynamic |= u32_at(at)? == PT_INTERP;
            let end = u64_at(at.checked_add(8)?)?.checked_add(u64_at(at.checked_add(32)?)?)?;
            elf.end = elf.end.max(end);
        }
        (elf.end <= bytes.len()).then_some(elf)
    }

    /// The file without what is not loaded, and without the table that tells of it.
    fn loaded(&self, whole: &[u8]) -> Vec<u8> {
        let mut bytes = whole[..self.end].to_vec();
        // Where the table of sections is; how many there are, and which one has their names.
        for field in [40..48, 60..62, 62..64] {
            if let Some(field) = bytes.get_mut(field) {
                field.fill(0);
            }
        }
        bytes
    }
}

fn part<const N: usize>(bytes: &[u8], at: usize) -> Option<&[u8; N]> {
    bytes.get(at..)?.first_chunk()
}

/// A cpio archive in the "newc" form, the one that kernels unpack.
struct Archive<'a, W> {
    to: &'a mut W,
    entries: u32,
}

impl<'a, W: Write> Archive<'a, W> {
    fn new(to: &'a mut W) -> Self {
        Self { to, entries: 0 }
    }

    fn file(&mut self, name: &str, bytes: &[u8]) -> Result<(), ProgramError> {
        self.entry(name, 0o100_755, bytes)
    }

    fn folder(&mut self, name: &str) -> Result<(), ProgramError> {
        self.entry(name, 0o040_755, &[])
    }

    fn finish(mut self) -> Result<(), ProgramError> {
        self.entry(TRAILER, 0, &[])
    }

    fn entry(&mut self, name: &str, mode: u32, bytes: &[u8]) -> Result<(), ProgramError> {
        self.entries += 1;
        let too_long = |_| ProgramError::Write(io::Error::from(io::ErrorKind::FileTooLarge));
        let size = u32::try_from(bytes.len()).map_err(too_long)?;
        let name_size = u32::try_from(name.len() + 1).map_err(too_long)?;
        // Number, mode, owner, group, links, time, size, device (four), length of the name, checksum.
        let fields = [
            self.entries,
            mode,
            0,
            0,
            1,
            0,
            size,
            0,
            0,
            0,
            0,
            name_size,
            0,
        ];
        let mut head = String::from("070701");
        for field in fields {
            use std::fmt::Write as _;
            // Writing to a string cannot fail.
            let _ = write!(head, "{field:08x}");
        }
        let mut entry = head.into_bytes();
        entry.extend_from_slice(name.as_bytes());
        entry.push(0);
        entry.resize(entry.len().next_multiple_of(4), 0);
        let padding = bytes.len().next_multiple_of(4) - bytes.len();
        self.to
            .write_all(&entry)
            .and_then(|()| self.to.write_all(bytes))
            .and_then(|()| self.to.write_all(&[0; 3][..padding]))
            .map_err(ProgramError::Write)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_loaded_still_runs() {
        let folder = tempfile::tempdir().expect("a folder");
        let whole = fs::read("/bin/true").expect("a program");
        let elf = Elf::parse(&whole).expect("an ELF file");
        let short = elf.loaded(&whole);
        assert!(short.len() < whole.len());
        let program = folder.path().join("true");
        fs::write(&program, short).expect("written");
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        fs::set_permissions(&program, mode).expect("set");
        assert!(Command::new(program).status().expect("it starts").success());
    }

    #[test]
    fn what_is_no_program_is_refused() {
        let whole = fs::read("/bin/true").expect("a program");
        for end in [0, 5, 20, 64, 200] {
            assert!(Elf::parse(&whole[..end]).is_none(), "{end}");
        }
        let mut lying = whole.clone();
        lying[32..40].fill(0xff);
        assert!(Elf::parse(&lying).is_none());
    }

    #[test]
    fn an_archive_holds_the_program_and_its_libraries() {
        let mut archive = Vec::new();
        append(Path::new("/bin/true"), &mut archive).expect("an archive");
        let holds = |name: &str| archive.windows(name.len()).any(|it| it == name.as_bytes());
        for name in [PLACE, "libc.so.6", TRAILER] {
            assert!(holds(name), "{name}");
        }
        assert!(archive.len().is_multiple_of(4));
        assert!(archive.starts_with(b"070701"));
    }
}
