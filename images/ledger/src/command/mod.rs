//! The commands: a table of names and arities, the dispatch, and Redis's own words for errors.

#[allow(clippy::unnecessary_wraps, reason = "handlers share one signature")]
mod keys;
#[allow(clippy::unnecessary_wraps, reason = "handlers share one signature")]
mod server;
mod strings;

use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;

use crate::connection::Session;
use crate::keyspace::{Full, Keyspace};
use crate::reply::Replies;
use crate::resp::lossy;
use crate::service::Figures;

/// What a command is executed on.
pub struct Context<'a> {
    /// The data.
    pub keyspace: &'a mut Keyspace,
    /// Who asks.
    pub session: &'a mut Session,
    /// What `INFO` tells.
    pub figures: &'a Figures,
    /// Where the answer goes.
    pub reply: Replies<'a>,
}

/// Why a command is refused; its display is the error line a client reads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// Not a command.
    Unknown {
        /// What was asked for.
        name: Vec<u8>,
        /// The rest of the request.
        arguments: Vec<Vec<u8>>,
    },
    /// Not a subcommand.
    UnknownSubcommand {
        /// The command.
        command: &'static str,
        /// What was asked for.
        name: Vec<u8>,
    },
    /// Too many or too few arguments.
    Arity(String),
    /// Options that do not exist or do not go together.
    Syntax,
    /// Not an integer of 64 bits.
    NotAnInteger,
    /// The sum does not fit 64 bits.
    Overflow,
    /// The number cannot be negated.
    DecrementOverflow,
    /// The value would be too long.
    TooLong,
    /// Memory or disk is full.
    Full,
    /// There is one database.
    DatabaseIndex,
    /// RESP3 is not spoken here.
    Protocol,
    /// `AUTH` without passwords.
    NoPassword,
    /// A parameter that cannot be set.
    ConfigSet(Vec<u8>),
    /// The answer would be too long to hold.
    ReplyTooLong,
}

impl From<Full> for Refusal {
    fn from(Full: Full) -> Self {
        Self::Full
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unknown { name, arguments } => {
                let name = &c_string(name)[..c_string(name).len().min(128)];
                write!(
                    f,
                    "ERR unknown command '{}', with args beginning with: ",
                    lossy(name)
                )?;
                // Redis shows arguments until 128 bytes are full.
                let mut shown = 0;
                for argument in arguments {
                    if shown >= 128 {
                        break;
                    }
                    let argument = c_string(argument);
                    let argument = &argument[..argument.len().min(128 - shown)];
                    shown += argument.len() + 3;
                    write!(f, "'{}' ", lossy(argument))?;
                }
                Ok(())
            }
            Self::UnknownSubcommand { command, name } => {
                let name = &c_string(name)[..c_string(name).len().min(128)];
                write!(
                    f,
                    "ERR unknown subcommand '{}'. Try {command} HELP.",
                    lossy(name)
                )
            }
            Self::Arity(name) => {
                write!(f, "ERR wrong number of arguments for '{name}' command")
            }
            Self::Syntax => f.write_str("ERR syntax error"),
            Self::NotAnInteger => f.write_str("ERR value is not an integer or out of range"),
            Self::Overflow => f.write_str("ERR increment or decrement would overflow"),
            Self::DecrementOverflow => f.write_str("ERR decrement would overflow"),
            Self::TooLong => {
                f.write_str("ERR string exceeds maximum allowed size (proto-max-bulk-len)")
            }
            Self::Full => f.write_str("OOM command not allowed when used memory > 'maxmemory'."),
            Self::DatabaseIndex => f.write_str("ERR DB index is out of range"),
            Self::Protocol => f.write_str("NOPROTO unsupported protocol version"),
            Self::NoPassword => f.write_str(
                "ERR AUTH <password> called without any password configured for the default user. \
                 Are you sure your configuration is correct?",
            ),
            Self::ConfigSet(name) => write!(
                f,
                "ERR CONFIG SET failed (possibly related to argument '{}') - can't set immutable config",
                lossy(name)
            ),
            Self::ReplyTooLong => {
                f.write_str("ERR the answer would be too long; ask for fewer keys at a time")
            }
        }
    }
}

/// The bytes up to the first NUL: where Redis formats an argument as a C string.
fn c_string(bytes: &[u8]) -> &[u8] {
    bytes.split(|&byte| byte == 0).next().unwrap_or_default()
}

type Handler = fn(&mut Context<'_>, &[&[u8]]) -> Result<(), Refusal>;

/// A command.
pub(crate) struct Command {
    /// Lower case.
    pub name: &'static str,
    /// How many words a request has, the name included; negative: at least that many.
    pub arity: i8,
    /// Whether it changes data.
    pub writes: bool,
    /// First and last argument that are keys, and the step between them.
    pub keys: (i8, i8, i8),
    handler: Handler,
}

const fn command(
    name: &'static str,
    arity: i8,
    writes: bool,
    keys: (i8, i8, i8),
    handler: Handler,
) -> Command {
    Command {
        name,
        arity,
        writes,
        keys,
        handler,
    }
}

const NONE: (i8, i8, i8) = (0, 0, 0);
const ONE: (i8, i8, i8) = (1, 1, 1);
const ALL: (i8, i8, i8) = (1, -1, 1);

/// All commands, in the order of their names.
pub(crate) static COMMANDS: [Command; 34] = [
    command("append", 3, true, ONE, strings::append),
    command("auth", -2, false, NONE, server::auth),
    command("client", -2, false, NONE, server::client),
    command("command", -1, false, NONE, server::command),
    command("config", -2, false, NONE, server::config),
    command("dbsize", 1, false, NONE, keys::dbsize),
    command("decr", 2, true, ONE, strings::decr),
    command("decrby", 3, true, ONE, strings::decrby),
    command("del", -2, true, ALL, keys::del),
    command("echo", 2, false, NONE, server::echo),
    command("exists", -2, false, ALL, keys::exists),
    command("flushall", -1, true, NONE, keys::flush),
    command("flushdb", -1, true, NONE, keys::flush),
    command("get", 2, false, ONE, strings::get),
    command("getdel", 2, true, ONE, strings::getdel),
    command("getset", 3, true, ONE, strings::getset),
    command("hello", -1, false, NONE, server::hello),
    command("incr", 2, true, ONE, strings::incr),
    command("incrby", 3, true, ONE, strings::incrby),
    command("info", -1, false, NONE, server::info),
    command("keys", 2, false, NONE, keys::keys),
    command("mget", -2, false, ALL, strings::mget),
    command("mset", -3, true, (1, -1, 2), strings::mset),
    command("msetnx", -3, true, (1, -1, 2), strings::msetnx),
    command("ping", -1, false, NONE, server::ping),
    command("pttl", 2, false, ONE, keys::ttl),
    command("quit", -1, false, NONE, server::quit),
    command("select", 2, false, NONE, server::select),
    command("set", -3, true, ONE, strings::set),
    command("setnx", 3, true, ONE, strings::setnx),
    command("strlen", 2, false, ONE, strings::strlen),
    command("ttl", 2, false, ONE, keys::ttl),
    command("type", 2, false, ONE, keys::type_of),
    command("unlink", -2, true, ALL, keys::del),
];

/// The command with this name, in any case.
pub(crate) fn find(name: &[u8]) -> Option<&'static Command> {
    let mut lower = [0; 16];
    let lower = lower.get_mut(..name.len())?;
    lower.copy_from_slice(name);
    lower.make_ascii_lowercase();
    let at = COMMANDS
        .binary_search_by(|command| command.name.as_bytes().cmp(lower))
        .ok()?;
    COMMANDS.get(at)
}

/// Executes one request; an error is answered, too.
pub fn execute(context: &mut Context<'_>, request: &[&[u8]]) {
    if let Err(refusal) = dispatch(context, request) {
        context.reply.error(format_args!("{refusal}"));
    }
}

fn dispatch(context: &mut Context<'_>, request: &[&[u8]]) -> Result<(), Refusal> {
    let Some((name, arguments)) = request.split_first() else {
        return Ok(());
    };
    let command = find(name).ok_or_else(|| Refusal::Unknown {
        name: name.to_vec(),
        arguments: arguments.iter().take(64).map(|it| it.to_vec()).collect(),
    })?;
    let wanted = usize::from(command.arity.unsigned_abs());
    let fits = if command.arity < 0 {
        request.len() >= wanted
    } else {
        request.len() == wanted
    };
    if !fits {
        return Err(Refusal::Arity(command.name.into()));
    }
    (command.handler)(context, arguments)
}

/// Whether an argument is this word, in any case.
fn is(argument: &[u8], word: &str) -> bool {
    argument.eq_ignore_ascii_case(word.as_bytes())
}

/// Redis's glob patterns: `*`, `?`, `[a-z]`, `[^a]`, `\` quotes.
fn glob(pattern: &[u8], text: &[u8]) -> bool {
    let (mut p, mut t) = (0, 0);
    // Where to go on when what follows the last `*` does not fit: that star takes one byte more.
    let mut star = None;
    loop {
        if pattern.get(p) == Some(&b'*') {
            p += 1;
            star = Some((p, t));
            continue;
        }
        let step = match (pattern.get(p..), text.get(t)) {
            (Some([]) | None, None) => return true,
            (Some(rest), Some(&byte)) => glob_one(rest, byte),
            _ => None,
        };
        match (step, star) {
            (Some(taken), _) => {
                p += taken;
                t += 1;
            }
            (None, Some((after, from))) if from < text.len() => {
                p = after;
                t = from + 1;
                star = Some((after, t));
            }
            _ => return false,
        }
    }
}

/// Matches one byte with the first element of a pattern: its length if it fits.
fn glob_one(pattern: &[u8], byte: u8) -> Option<usize> {
    match pattern {
        [] => None,
        [b'?', ..] => Some(1),
        [b'\\', quoted, ..] => (*quoted == byte).then_some(2),
        [b'[', class @ ..] => {
            let (negated, mut at) = match class {
                [b'^', ..] => (true, 1),
                _ => (false, 0),
            };
            let mut found = false;
            loop {
                match class.get(at..).unwrap_or_default() {
                    [] => break,
                    [b']', ..] => {
                        at += 1;
                        break;
                    }
                    [b'\\', quoted, ..] => {
                        found |= *quoted == byte;
                        at += 2;
                    }
                    [low, b'-', high, ..] if *high != b']' => {
                        found |= (low.min(high)..=low.max(high)).contains(&&byte);
                        at += 3;
                    }
                    [one, ..] => {
                        found |= *one == byte;
                        at += 1;
                    }
                }
            }
            (found != negated).then_some(at + 1)
        }
        [literal, ..] => (*literal == byte).then_some(1),
    }
}

#[cfg(test)]
mod tests;
