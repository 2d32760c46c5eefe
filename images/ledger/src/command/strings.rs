//! Commands on values.

use alloc::vec::Vec;

use super::{Context, Refusal, is};
use crate::limits::{MAX_BULK, MAX_REPLY};
use crate::reply::Decimal;
use crate::resp::parse_integer;

type Outcome = Result<(), Refusal>;

pub(super) fn get(context: &mut Context<'_>, arguments: &[&[u8]]) -> Outcome {
    let [key] = arguments else {
        return Err(Refusal::Arity("get".into()));
    };
    context.reply.bulk_or_nil(context.keyspace.get(key));
    Ok(())
}

pub(super) fn strlen(context: &mut Context<'_>, arguments: &[&[u8]]) -> Outcome {
    let [key] = arguments else {
        return Err(Refusal::Arity("strlen".into()));
    };
    let length = context.keyspace.get(key).map_or(0, <[u8]>::len);
    context.reply.count(length);
    Ok(())
}

/// What `SET` was asked to do besides setting.
#[derive(Default)]
struct SetOptions {
    only_new: bool,
    only_existing: bool,
    get: bool,
}

impl SetOptions {
    /// NX, XX, GET and KEEPTTL (nothing here expires); everything else is a syntax error.
    fn parse(words: &[&[u8]]) -> Result<Self, Refusal> {
        let mut options = Self::default();
        for word in words {
            if is(word, "nx") {
                options.only_new = true;
            } else if is(word, "xx") {
                options.only_existing = true;
            } else if is(word, "get") {
                options.get = true;
            } else if !is(word, "keepttl") {
                return Err(Refusal::Syntax);
            }
        }
        if options.only_new && options.only_existing {
            return Err(Refusal::Syntax);
        }
        Ok(options)
    }
}

pub(super) fn set(context: &mut Context<'_>, arguments: &[&[u8]]) -> Outcome {
    let [key, value, words @ ..] = arguments else {
        return Err(Refusal::Arity("set".into()));
    };
    let options = SetOptions::parse(words)?;
    let old = context.keyspace.get(key);
    let wanted = match old {
        Some(_) => !options.only_new,
        None => !options.only_existing,
    };
    if options.get {
        let old: Option<Vec<u8>> = old.map(Into::into);
        if wanted {
            context.keyspace.set(key, value)?;
        }
        context.reply.bulk_or_nil(old.as_deref());
    } else if wanted {
        context.keyspace.set(key, value)?;
        context.reply.ok();
    } else {
        context.reply.bulk_or_nil(None);
    }
    Ok(())
}

pub(super) fn setnx(context: &mut Context<'_>, arguments: &[&[u8]]) -> Outcome {
    let [key, value] = arguments else {
        return Err(Refusal::Arity("setnx".into()));
    };
    let absent = context.keyspace.get(key).is_none();
    if absent {
        context.keyspace.set(key, value)?;
    }
    context.reply.integer(i64::from(absent));
    Ok(())
}

pub(super) fn getset(context: &mut Context<'_>, arguments: &[&[u8]]) -> Outcome {
    let [key, value] = arguments else {
        return Err(Refusal::Arity("getset".into()));
    };
    let old: Option<Vec<u8>> = context.keyspace.get(key).map(Into::into);
    context.keyspace.set(key, value)?;
    context.reply.bulk_or_nil(old.as_deref());
    Ok(())
}

pub(super) fn getdel(context: &mut Context<'_>, arguments: &[&[u8]]) -> Outcome {
    let [key] = arguments else {
        return Err(Refusal::Arity("getdel".into()));
    };
    context.reply.bulk_or_nil(context.keyspace.get(key));
    context.keyspace.delete(key);
    Ok(())
}

pub(super) fn append(context: &mut Context<'_>, arguments: &[&[u8]]) -> Outcome {
    let [key, more] = arguments else {
        return Err(Refusal::Arity("append".into()));
    };
    let old = context.keyspace.get(key).unwrap_or_default();
    let length = old.len() + more.len();
    if length > MAX_BULK {
        return Err(Refusal::TooLong);
    }
    let mut value = Vec::with_capacity(length);
    value.extend_from_slice(old);
    value.extend_from_slice(more);
    context.keyspace.set(key, &value)?;
    context.reply.count(length);
    Ok(())
}

pub(super) fn incr(context: &mut Context<'_>, arguments: &[&[u8]]) -> Outcome {
    let [key] = arguments else {
        return Err(Refusal::Arity("incr".into()));
    };
    add(context, key, 1)
}

pub(super) fn decr(context: &mut Context<'_>, arguments: &[&[u8]]) -> Outcome {
    let [key] = arguments else {
        return Err(Refusal::Arity("decr".into()));
    };
    add(context, key, -1)
}

pub(super) fn incrby(context: &mut Context<'_>, arguments: &[&[u8]]) -> Outcome {
    let [key, by] = arguments else {
        return Err(Refusal::Arity("incrby".into()));
    };
    add(
        context,
        key,
        parse_integer(by).ok_or(Refusal::NotAnInteger)?,
    )
}

pub(super) fn decrby(context: &mut Context<'_>, arguments: &[&[u8]]) -> Outcome {
    let [key, by] = arguments else {
        return Err(Refusal::Arity("decrby".into()));
    };
    let by = parse_integer(by).ok_or(Refusal::NotAnInteger)?;
    add(
        context,
        key,
        by.checked_neg().ok_or(Refusal::DecrementOverflow)?,
    )
}

fn add(context: &mut Context<'_>, key: &[u8], by: i64) -> Outcome {
    let old = match context.keyspace.get(key) {
        Some(value) => parse_integer(value).ok_or(Refusal::NotAnInteger)?,
        None => 0,
    };
    let new = old.checked_add(by).ok_or(Refusal::Overflow)?;
    context.keyspace.set(key, Decimal::new(new).as_bytes())?;
    context.reply.integer(new);
    Ok(())
}

pub(super) fn mget(context: &mut Context<'_>, arguments: &[&[u8]]) -> Outcome {
    let values = || arguments.iter().map(|key| context.keyspace.get(key));
    let size: usize = values()
        .map(|value| value.map_or(5, |it| it.len() + 16))
        .sum();
    if size > MAX_REPLY {
        return Err(Refusal::ReplyTooLong);
    }
    context.reply.array(arguments.len());
    for value in values() {
        context.reply.bulk_or_nil(value);
    }
    Ok(())
}

pub(super) fn mset(context: &mut Context<'_>, arguments: &[&[u8]]) -> Outcome {
    set_all(context, arguments, "mset")?;
    context.reply.ok();
    Ok(())
}

pub(super) fn msetnx(context: &mut Context<'_>, arguments: &[&[u8]]) -> Outcome {
    let mut keys = arguments.iter().step_by(2);
    let all_new = keys.all(|key| context.keyspace.get(key).is_none());
    if all_new || arguments.len() % 2 == 1 {
        set_all(context, arguments, "msetnx")?;
    }
    context.reply.integer(i64::from(all_new));
    Ok(())
}

/// Sets all pairs or none.
fn set_all(context: &mut Context<'_>, arguments: &[&[u8]], name: &str) -> Outcome {
    let (pairs, []) = arguments.as_chunks::<2>() else {
        return Err(Refusal::Arity(name.into()));
    };
    let sizes = pairs.iter().map(|[key, value]| (*key, value.len()));
    context.keyspace.check(sizes)?;
    for [key, value] in pairs {
        context.keyspace.set_checked(key, value);
    }
    Ok(())
}
