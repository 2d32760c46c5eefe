//! Commands on keys.

use super::{Context, Refusal, glob, is};
use crate::limits::MAX_REPLY;

type Outcome = Result<(), Refusal>;

pub(super) fn dbsize(context: &mut Context<'_>, _arguments: &[&[u8]]) -> Outcome {
    context.reply.count(context.keyspace.len());
    Ok(())
}

pub(super) fn del(context: &mut Context<'_>, arguments: &[&[u8]]) -> Outcome {
    let deleted = arguments.iter().filter(|key| context.keyspace.delete(key));
    let deleted = deleted.count();
    context.reply.count(deleted);
    Ok(())
}

pub(super) fn exists(context: &mut Context<'_>, arguments: &[&[u8]]) -> Outcome {
    let there = arguments
        .iter()
        .filter(|key| context.keyspace.get(key).is_some());
    context.reply.count(there.count());
    Ok(())
}

pub(super) fn flush(context: &mut Context<'_>, arguments: &[&[u8]]) -> Outcome {
    match arguments {
        [] => {}
        [how] if is(how, "async") || is(how, "sync") => {}
        _ => return Err(Refusal::Syntax),
    }
    context.keyspace.clear();
    context.reply.ok();
    Ok(())
}

pub(super) fn keys(context: &mut Context<'_>, arguments: &[&[u8]]) -> Outcome {
    let pattern = arguments.first().copied().unwrap_or_default();
    let matching = || context.keyspace.keys().filter(|key| glob(pattern, key));
    let (mut count, mut size) = (0, 0);
    for key in matching() {
        count += 1;
        size += key.len() + 16;
        if size > MAX_REPLY {
            return Err(Refusal::ReplyTooLong);
        }
    }
    context.reply.array(count);
    for key in matching() {
        context.reply.bulk(key);
    }
    Ok(())
}

/// Nothing expires here.
pub(super) fn ttl(context: &mut Context<'_>, arguments: &[&[u8]]) -> Outcome {
    let key = arguments.first().copied().unwrap_or_default();
    let there = context.keyspace.get(key).is_some();
    context.reply.integer(if there { -1 } else { -2 });
    Ok(())
}

pub(super) fn type_of(context: &mut Context<'_>, arguments: &[&[u8]]) -> Outcome {
    let key = arguments.first().copied().unwrap_or_default();
    let there = context.keyspace.get(key).is_some();
    context.reply.simple(if there { "string" } else { "none" });
    Ok(())
}
