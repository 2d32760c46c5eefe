//! What the system lets a process have.

use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// Raises the number of descriptors that this process may have to its hard bound. Shells begin at
/// 1,024, which the clients of one gateway, or the VMs of one host, can need alone.
pub fn raise_descriptors() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE).and_then(|(soft, hard)| {
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
        Ok((soft, hard))
    });
    match raised {
        Ok((soft, hard)) => tracing::debug!(soft, hard, "descriptors"),
        // Whoever may not raise it goes on with what there is.
        Err(error) => tracing::warn!(%error, "the limit of descriptors stays as it is"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hard_bound_is_what_may_be_had() {
        let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).expect("a limit");
        // The lowest that the tests beside this one live with.
        setrlimit(Resource::RLIMIT_NOFILE, hard.min(1_024), hard).expect("lowered");
        raise_descriptors();
        let now = getrlimit(Resource::RLIMIT_NOFILE).expect("a limit");
        assert_eq!(now, (hard, hard));
    }
}
