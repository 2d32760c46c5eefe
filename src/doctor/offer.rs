//! Whether a host can run an image in a mode: the one place where that is decided. `run`, `images`,
//! `doctor` and the agents all ask here.

use serde::Serialize;
use thiserror::Error;
use vmm::kvm::{KvmKind, host_fingerprint};

use crate::agent::introduction::Introduction;
use crate::images::{self, Image, Mode, Need};
use crate::sentence::sentence;

/// What is known of a host, as far as it decides what can run there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Host {
    /// How KVM runs guests; or, in a sentence, why there can be none.
    pub kvm: Result<KvmKind, String>,
    /// Why replays cannot be trusted, if a self-test has found that.
    pub inexact: Option<String>,
}

impl Host {
    /// This host, by a look at its KVM and its CPU: some milliseconds, and no guest runs for it.
    pub fn here() -> Self {
        Self {
            kvm: host_fingerprint()
                .map(|fingerprint| fingerprint.kvm)
                .map_err(|error| sentence(&error)),
            inexact: None,
        }
    }

    /// A host by what it tells others of itself.
    pub fn introduced(introduction: &Introduction) -> Self {
        let kvm = introduction.fingerprint.as_ref();
        Self {
            kvm: kvm.map(|fingerprint| fingerprint.kvm).map_err(Clone::clone),
            inexact: None,
        }
    }
}

/// Why a host cannot run an image in a mode.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum CannotRun {
    /// It is not made for this mode.
    #[error("the image {image} can be run as {modes} only, not as {wanted}{others}")]
    OtherMode {
        /// Which.
        image: String,
        /// What it supports.
        modes: String,
        /// What was asked for.
        wanted: Mode,
        /// Images that can be run.
        others: Others,
    },
    /// Nothing that it does can be repeated.
    #[error(
        "the image {image} cannot be recorded or protected, its manifest says: run it on one host with --mode none"
    )]
    Unprotectable {
        /// Which.
        image: String,
    },
    /// No version of this program can.
    #[error(
        "this version of Understudy cannot run {image} as {wanted}: that is not built yet{others}"
    )]
    NotBuilt {
        /// Which.
        image: String,
        /// What was asked for.
        wanted: Mode,
        /// Images that can be run.
        others: Others,
    },
    /// No guest can run there.
    #[error("{why}")]
    NoGuests {
        /// The whole sentence.
        why: String,
    },
    /// It needs what the host lacks.
    #[error("the image {image} needs {} and this host has neither VMX nor SVM, so its KVM emulates ring 0{others}", need.words())]
    Lacks {
        /// Which.
        image: String,
        /// What it needs.
        need: Need,
        /// Images that can be run.
        others: Others,
    },
    /// The host does not repeat itself.
    #[error("this host cannot repeat a guest exactly: {why}")]
    Inexact {
        /// What differed.
        why: String,
    },
}

/// What to use instead, as the end of a sentence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Others(Vec<String>);

impl std::fmt::Display for Others {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.0.is_empty() {
            return Ok(());
        }
        write!(f, ": use one of {}", self.0.join(", "))
    }
}

/// Whether `host` can run `image` and protect it as `mode`.
pub fn check(host: &Host, image: &Image, mode: Mode) -> Result<(), CannotRun> {
    let reason = refusal(host, image, mode);
    reason.map_or(Ok(()), Err)
}

fn refusal(host: &Host, image: &Image, mode: Mode) -> Option<CannotRun> {
    let others = || runnable(host, image);
    let name = || image.name.clone();
    if mode != Mode::None && image.modes == [Mode::None] {
        return Some(CannotRun::Unprotectable { image: name() });
    }
    // Whatever can be protected can also do without.
    if mode != Mode::None && !image.modes.contains(&mode) {
        return Some(CannotRun::OtherMode {
            image: name(),
            modes: listed(&image.modes),
            wanted: mode,
            others: others(),
        });
    }
    if mode == Mode::Checkpointed {
        return Some(CannotRun::NotBuilt {
            image: name(),
            wanted: mode,
            others: others(),
        });
    }
    let kind = match &host.kvm {
        Ok(kind) => *kind,
        Err(why) => return Some(CannotRun::NoGuests { why: why.clone() }),
    };
    if let Some(why) = &host.inexact
        && mode != Mode::None
    {
        return Some(CannotRun::Inexact { why: why.clone() });
    }
    let lacking = image.needs.iter().find(|need| !has(kind, **need));
    lacking.map(|need| CannotRun::Lacks {
        image: name(),
        need: *need,
        others: others(),
    })
}

/// Whether a KVM of this kind has what an image needs.
const fn has(kind: KvmKind, need: Need) -> bool {
    match need {
        Need::NativeRing0 => !matches!(kind, KvmKind::Pvm),
    }
}

/// The embedded images that can be run instead of `refused`.
fn runnable(host: &Host, refused: &Image) -> Others {
    // The embedded images are read by a test; one that cannot be is nothing to propose.
    let images = images::embedded().unwrap_or_default();
    let able = images.into_iter().filter(|image| {
        image.name != refused.name
            && image.modes.contains(&Mode::Replayed)
            && host.inexact.is_none()
            && host
                .kvm
                .as_ref()
                .is_ok_and(|kind| image.needs.iter().all(|need| has(*kind, *need)))
    });
    Others(able.map(|image| image.name).collect())
}

fn listed(modes: &[Mode]) -> String {
    if modes.is_empty() {
        return "nothing".to_owned();
    }
    let modes: Vec<_> = modes.iter().map(Mode::to_string).collect();
    modes.join(" or ")
}

/// One row of the table: an image, a mode, and whether the host can.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Offer {
    /// The image.
    pub image: String,
    /// The mode.
    pub mode: Mode,
    /// Whether it can be run so on this host.
    pub here: bool,
    /// Why not; or what must be done first.
    pub why: Option<String>,
}

/// What a host can offer: every image that this version knows, and `more`, in every mode.
pub fn offers(host: &Host, more: &[Image]) -> Vec<Offer> {
    // As above.
    let embedded = images::embedded().unwrap_or_default();
    let built = images::built_elsewhere().unwrap_or_default();
    let of = |image: &Image, mode: Mode, hint: Option<&str>| {
        let refused = check(host, image, mode).err();
        Offer {
            image: image.name.clone(),
            mode,
            here: refused.is_none(),
            why: refused.map_or(hint.map(str::to_owned), |why| Some(why.to_string())),
        }
    };
    let known = embedded.iter().chain(more).map(|image| (image, None));
    let built = built
        .iter()
        .map(|(image, hint)| (image, Some(*hint)))
        .filter(|(image, _)| more.iter().all(|given| given.name != image.name));
    known
        .chain(built)
        .flat_map(|(image, hint)| Mode::ALL.map(|mode| of(image, mode, hint)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(kind: KvmKind) -> Host {
        Host {
            kvm: Ok(kind),
            inexact: None,
        }
    }

    fn linux() -> Image {
        let built = images::built_elsewhere().unwrap();
        let found = built.into_iter().find(|(image, _)| image.name == "linux");
        found.unwrap().0
    }

    fn ledger() -> Image {
        images::find("ledger").unwrap()
    }

    #[test]
    fn linux_needs_a_native_ring_0_and_the_ledger_does_not() {
        for kind in [KvmKind::Vmx, KvmKind::Svm] {
            assert_eq!(check(&host(kind), &linux(), Mode::Replayed), Ok(()));
            assert_eq!(check(&host(kind), &ledger(), Mode::Replayed), Ok(()));
        }
        let here = host(KvmKind::Pvm);
        assert_eq!(check(&here, &ledger(), Mode::Replayed), Ok(()));
        let why = check(&here, &linux(), Mode::Replayed).unwrap_err();
        let why = why.to_string();
        for part in ["linux needs", "neither VMX nor SVM", "use one of ledger"] {
            assert!(why.contains(part), "{why}");
        }
    }

    #[test]
    fn what_is_not_built_or_not_supported_is_said_before_anything_of_the_host() {
        let without = Host {
            kvm: Err("there is no /dev/kvm".to_owned()),
            inexact: None,
        };
        let why = check(&without, &ledger(), Mode::Checkpointed).unwrap_err();
        assert!(matches!(why, CannotRun::OtherMode { .. }), "{why}");
        let mut image = ledger();
        image.modes.push(Mode::Checkpointed);
        let why = check(&without, &image, Mode::Checkpointed).unwrap_err();
        assert!(matches!(why, CannotRun::NotBuilt { .. }), "{why}");
        let why = check(&without, &image, Mode::Replayed).unwrap_err();
        assert_eq!(why.to_string(), "there is no /dev/kvm");
    }

    #[test]
    fn what_nothing_can_protect_is_run_as_that_only() {
        let mut image = ledger();
        image.modes = vec![Mode::None];
        let here = host(KvmKind::Svm);
        assert_eq!(check(&here, &image, Mode::None), Ok(()));
        assert_eq!(check(&here, &linux(), Mode::None), Ok(()));
        let why = check(&here, &image, Mode::Replayed).unwrap_err();
        assert!(why.to_string().contains("--mode none"), "{why}");
    }

    #[test]
    fn a_host_that_does_not_repeat_itself_offers_nothing() {
        let host = Host {
            inexact: Some("RBX differs".to_owned()),
            ..host(KvmKind::Svm)
        };
        let protected = |offer: &Offer| offer.here && offer.mode != Mode::None;
        assert!(!offers(&host, &[]).iter().any(protected));
        let why = check(&host, &ledger(), Mode::Replayed).unwrap_err();
        assert!(why.to_string().contains("RBX differs"), "{why}");
    }

    #[test]
    fn every_image_is_in_the_table_in_every_mode() {
        let table = offers(&host(KvmKind::Svm), &[]);
        let row = |image: &str, mode: Mode| {
            let found = table.iter().find(|o| o.image == image && o.mode == mode);
            found.unwrap_or_else(|| panic!("{image} as {mode} in {table:?}"))
        };
        assert!(row("ledger", Mode::Replayed).here);
        assert_eq!(row("ledger", Mode::Replayed).why, None);
        assert!(!row("ledger", Mode::Checkpointed).here);
        let linux = row("linux", Mode::Replayed);
        assert!(linux.here && linux.why.as_ref().unwrap().contains("images/linux/build"));
        assert!(row("linux", Mode::None).here);
        assert_eq!(table.len(), 6);
    }
}
