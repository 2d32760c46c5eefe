//! How a command fails: with one sentence on stderr and an exit code that scripts can rely on.

use std::error::Error;
use std::fmt;
use std::process::ExitCode;

use crate::sentence::sentence;

/// What the exit code says. The numbers are part of the command line's interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// It was tried and did not work.
    Failed = 1,
    /// The command line makes no sense (clap ends the process with the same number).
    Usage = 2,
    /// This host cannot do it.
    Unavailable = 3,
    /// A log is damaged, or a replay differs from it.
    Corrupt = 4,
    /// Something that is promised did not hold.
    Broken = 5,
    /// Ctrl-C, or a signal that asks to end.
    Interrupted = 130,
}

/// The end of `--help`; README.md has the same table.
pub const EXIT_CODES: &str = "\
Exit codes:
  0    done
  1    it was tried and did not work; the message says what to do
  2    the command line makes no sense
  3    this host cannot do it: no /dev/kvm, no permission, a missing capability
  4    a log is damaged, or a replay differs from it
  5    a promise was broken: a lost write, a broken connection, a violated invariant
  130  interrupted";

/// Why a command failed.
#[derive(Debug)]
pub struct Failure {
    exit: Exit,
    error: Box<dyn Error + Send + Sync>,
}

impl Failure {
    /// A failure with the exit code that fits it.
    pub fn new(exit: Exit, error: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self {
            exit,
            error: error.into(),
        }
    }

    /// The same, as another kind.
    #[must_use]
    pub fn with_exit(self, exit: Exit) -> Self {
        Self { exit, ..self }
    }

    /// Which kind it is.
    pub const fn exit(&self) -> Exit {
        self.exit
    }

    /// Tells the user, and gives the process's exit code.
    pub fn report(&self) -> ExitCode {
        if !self.error.is::<super::output::Unread>() {
            eprintln!("understudy: {self}");
        }
        ExitCode::from(self.exit as u8)
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&sentence(self.error.as_ref()))
    }
}

/// Gives an error its exit code.
pub trait OrExit<T> {
    /// Turns the error into a failure of this kind.
    fn or_exit(self, exit: Exit) -> Result<T, Failure>;

    /// Turns the error into [`Exit::Failed`].
    fn or_fail(self) -> Result<T, Failure>
    where
        Self: Sized,
    {
        self.or_exit(Exit::Failed)
    }
}

impl<T, E: Into<Box<dyn Error + Send + Sync>>> OrExit<T> for Result<T, E> {
    fn or_exit(self, exit: Exit) -> Result<T, Failure> {
        self.map_err(|error| Failure::new(exit, error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_names_every_exit_code() {
        for exit in [
            Exit::Failed,
            Exit::Usage,
            Exit::Unavailable,
            Exit::Corrupt,
            Exit::Broken,
            Exit::Interrupted,
        ] {
            let line = format!("\n  {:<5}", exit as u8);
            assert!(EXIT_CODES.contains(&line), "{exit:?}");
        }
    }
}
