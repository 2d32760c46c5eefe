//! Commands about the service and the connection: what clients ask before they begin.

use alloc::format;
use alloc::string::String;
use core::fmt::Write;

use super::{COMMANDS, Command, Context, Refusal, find, glob, is};
use crate::limits::MAX_BULK;
use crate::reply::{Decimal, Replies};
use crate::resp::parse_integer;

type Outcome = Result<(), Refusal>;

/// The Redis version whose answers these are: clients decide by it what they may ask.
const REDIS_VERSION: &str = "7.0.0";

pub(super) fn ping(context: &mut Context<'_>, arguments: &[&[u8]]) -> Outcome {
    match arguments {
        [] => context.reply.simple("PONG"),
        [message] => context.reply.bulk(message),
        _ => return Err(Refusal::Arity("ping".into())),
    }
    Ok(())
}

pub(super) fn echo(context: &mut Context<'_>, arguments: &[&[u8]]) -> Outcome {
    let message = arguments.first().copied().unwrap_or_default();
    context.reply.bulk(message);
    Ok(())
}

pub(super) fn quit(context: &mut Context<'_>, _arguments: &[&[u8]]) -> Outcome {
    context.session.closing = true;
    context.reply.ok();
    Ok(())
}

pub(super) fn select(context: &mut Context<'_>, arguments: &[&[u8]]) -> Outcome {
    let index = arguments.first().copied().unwrap_or_default();
    match parse_integer(index) {
        Some(0) => context.reply.ok(),
        Some(_) => return Err(Refusal::DatabaseIndex),
        None => return Err(Refusal::NotAnInteger),
    }
    Ok(())
}

pub(super) fn auth(_context: &mut Context<'_>, _arguments: &[&[u8]]) -> Outcome {
    Err(Refusal::NoPassword)
}

pub(super) fn hello(context: &mut Context<'_>, arguments: &[&[u8]]) -> Outcome {
    if let Some((version, mut options)) = arguments.split_first() {
        match parse_integer(version) {
            Some(2) => {}
            _ => return Err(Refusal::Protocol),
        }
        while let Some((option, rest)) = options.split_first() {
            match rest {
                [name, rest @ ..] if is(option, "setname") => {
                    context.session.name = name.to_vec();
                    options = rest;
                }
                [_, _, ..] if is(option, "auth") => return Err(Refusal::NoPassword),
                _ => return Err(Refusal::Syntax),
            }
        }
    }
    let id = i64::try_from(context.session.id.0).unwrap_or(i64::MAX);
    let reply = &mut context.reply;
    reply.array(14);
    for (name, value) in [("server", "redis"), ("version", REDIS_VERSION)] {
        reply.bulk(name.as_bytes());
        reply.bulk(value.as_bytes());
    }
    reply.bulk(b"proto");
    reply.integer(2);
    reply.bulk(b"id");
    reply.integer(id);
    for (name, value) in [("mode", "standalone"), ("role", "master")] {
        reply.bulk(name.as_bytes());
        reply.bulk(value.as_bytes());
    }
    reply.bulk(b"modules");
    reply.array(0);
    Ok(())
}

pub(super) fn client(context: &mut Context<'_>, arguments: &[&[u8]]) -> Outcome {
    let Some((&name, arguments)) = arguments.split_first() else {
        return Err(Refusal::Arity("client".into()));
    };
    match arguments {
        [] if is(name, "getname") => {
            let name = &context.session.name;
            context
                .reply
                .bulk_or_nil((!name.is_empty()).then_some(name));
        }
        [] if is(name, "id") => {
            let id = i64::try_from(context.session.id.0).unwrap_or(i64::MAX);
            context.reply.integer(id);
        }
        [given] if is(name, "setname") => {
            context.session.name = given.to_vec();
            context.reply.ok();
        }
        [_, _] if is(name, "setinfo") => context.reply.ok(),
        _ => {
            return Err(subcommand(
                "client",
                "CLIENT",
                name,
                &["getname", "id", "setname", "setinfo"],
            ));
        }
    }
    Ok(())
}

/// A subcommand that exists has the wrong number of arguments; one that does not is unknown.
fn subcommand(lower: &str, command: &'static str, name: &[u8], known: &[&str]) -> Refusal {
    match known.iter().find(|known| is(name, known)) {
        Some(known) => Refusal::Arity(format!("{lower}|{known}")),
        None => Refusal::UnknownSubcommand {
            command,
            name: name.to_vec(),
        },
    }
}

pub(super) fn config(context: &mut Context<'_>, arguments: &[&[u8]]) -> Outcome {
    let Some((&name, arguments)) = arguments.split_first() else {
        return Err(Refusal::Arity("config".into()));
    };
    match arguments {
        patterns if is(name, "get") && !patterns.is_empty() => {
            config_get(context, patterns);
        }
        [parameter, _, ..] if is(name, "set") => {
            return Err(Refusal::ConfigSet(parameter.to_vec()));
        }
        [] if is(name, "resetstat") => context.reply.ok(),
        _ => {
            return Err(subcommand(
                "config",
                "CONFIG",
                name,
                &["get", "set", "resetstat"],
            ));
        }
    }
    Ok(())
}

/// The parameters that mean something here; `redis-benchmark` asks for `save` and `appendonly`.
fn config_get(context: &mut Context<'_>, patterns: &[&[u8]]) {
    let memory = Decimal::of_len(context.keyspace.capacity().memory);
    let longest = Decimal::of_len(MAX_BULK);
    let parameters: [(&str, &[u8]); 7] = [
        ("appendfsync", b"always"),
        ("appendonly", b"yes"),
        ("databases", b"1"),
        ("maxmemory", memory.as_bytes()),
        ("maxmemory-policy", b"noeviction"),
        ("proto-max-bulk-len", longest.as_bytes()),
        ("save", b""),
    ];
    let wanted = |name: &str| {
        let mut patterns = patterns.iter();
        patterns.any(|pattern| glob(&pattern.to_ascii_lowercase(), name.as_bytes()))
    };
    let found = || parameters.iter().filter(|(name, _)| wanted(name));
    context.reply.array(found().count() * 2);
    for (name, value) in found() {
        context.reply.bulk(name.as_bytes());
        context.reply.bulk(value);
    }
}

pub(super) fn command(context: &mut Context<'_>, arguments: &[&[u8]]) -> Outcome {
    let reply = &mut context.reply;
    match arguments {
        [] => {
            reply.array(COMMANDS.len());
            for command in &COMMANDS {
                describe(reply, command);
            }
        }
        [name] if is(name, "count") => reply.count(COMMANDS.len()),
        // Nothing is documented here; `redis-cli` then has no hints to show, and goes on.
        [name, ..] if is(name, "docs") => reply.array(0),
        [name, names @ ..] if is(name, "info") && !names.is_empty() => {
            reply.array(names.len());
            for name in names {
                match find(name) {
                    Some(command) => describe(reply, command),
                    None => reply.bulk_or_nil(None),
                }
            }
        }
        [name] if is(name, "info") => return self::command(context, &[]),
        [name, ..] => return Err(subcommand("command", "COMMAND", name, &["count"])),
    }
    Ok(())
}

fn describe(reply: &mut Replies<'_>, command: &Command) {
    let (first, last, step) = command.keys;
    reply.array(6);
    reply.bulk(command.name.as_bytes());
    reply.integer(i64::from(command.arity));
    reply.array(1);
    reply.simple(if command.writes { "write" } else { "readonly" });
    for number in [first, last, step] {
        reply.integer(i64::from(number));
    }
}

pub(super) fn info(context: &mut Context<'_>, arguments: &[&[u8]]) -> Outcome {
    let everything = ["default", "all", "everything"];
    let wanted = |section: &str| {
        arguments.is_empty()
            || arguments.iter().any(|argument| {
                is(argument, section) || everything.iter().any(|all| is(argument, all))
            })
    };
    let figures = context.figures;
    let capacity = context.keyspace.capacity();
    let mut text = String::new();
    let mut section = |name: &str, lines: core::fmt::Arguments<'_>| {
        if wanted(name) {
            if !text.is_empty() {
                text.push_str("\r\n");
            }
            // Writing to a string cannot fail.
            let _ = write!(text, "# {name}\r\n{lines}");
        }
    };
    section(
        "Server",
        format_args!(
            "redis_version:{REDIS_VERSION}\r\nserver_name:ledger\r\nledger_version:{}\r\nredis_mode:standalone\r\narch_bits:64\r\ntcp_port:6379\r\n",
            env!("CARGO_PKG_VERSION")
        ),
    );
    section(
        "Clients",
        format_args!("connected_clients:{}\r\n", figures.connected),
    );
    section(
        "Memory",
        format_args!(
            "used_memory:{}\r\nmaxmemory:{}\r\nmaxmemory_policy:noeviction\r\n",
            context.keyspace.memory(),
            capacity.memory
        ),
    );
    section(
        "Persistence",
        format_args!(
            "loading:0\r\naof_enabled:1\r\naof_current_size:{}\r\nlog_area_size:{}\r\nlog_commits:{}\r\nlog_compactions:{}\r\nlog_recovered_batches:{}\r\n",
            figures.journal.used,
            figures.journal.capacity,
            figures.journal.commits,
            figures.journal.compactions,
            figures.recovered.batches
        ),
    );
    section(
        "Stats",
        format_args!(
            "total_connections_received:{}\r\ntotal_commands_processed:{}\r\n",
            figures.connections, figures.commands
        ),
    );
    section(
        "Replication",
        format_args!("role:master\r\nconnected_slaves:0\r\n"),
    );
    let keys = context.keyspace.len();
    if keys > 0 {
        section(
            "Keyspace",
            format_args!("db0:keys={keys},expires=0,avg_ttl=0\r\n"),
        );
    } else {
        section("Keyspace", format_args!(""));
    }
    context.reply.bulk(text.as_bytes());
    Ok(())
}
