//! A tape for tests that drive a machine by hand: the clock moves by a microsecond with each look,
//! random bytes are counted, commands are kept.

use bytes::Bytes;
use replay_log::{Answer, GuestTime, MarkDigest, Position};
use vmm::tape::{Command, CpuState, DigestKey, Next, Pending, Query, Sources, Tape, TapeError};

#[derive(Debug, Default)]
pub struct NoTape {
    now: u64,
    pub commands: Vec<Command>,
}

impl Tape for NoTape {
    fn key(&self) -> DigestKey {
        DigestKey::default()
    }

    fn pending(&mut self, _: Position, _: CpuState, _: Sources) -> Result<Pending, TapeError> {
        Ok(Pending::Nothing)
    }

    fn next(&mut self, _: Position, _: CpuState, _: Sources) -> Result<Next, TapeError> {
        Ok(Next::Run)
    }

    fn answer(&mut self, query: Query) -> Result<Answer, TapeError> {
        Ok(match query {
            Query::Clock => {
                self.now += 1000;
                Answer::Clock(GuestTime(self.now))
            }
            Query::Entropy(count) => {
                Answer::Entropy((0..count).map(|i| i as u8).collect::<Bytes>())
            }
        })
    }

    fn command(&mut self, command: Command) -> Result<(), TapeError> {
        self.commands.push(command);
        Ok(())
    }

    fn close(&mut self, _: Position) -> Result<(), TapeError> {
        Ok(())
    }

    fn mark(&mut self, _: Position, _: MarkDigest) -> Result<(), TapeError> {
        Ok(())
    }
}
