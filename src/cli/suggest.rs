//! "Did you mean": the closest of the names there are.

use std::fmt;

use thiserror::Error;

/// How alike two names must be, from 0 to 1, for one to be offered instead of the other.
const ALIKE: f64 = 0.7;

/// A name that does not exist.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("there is no {what} '{name}'{}", Hint(self))]
pub struct Unknown {
    /// What kind of thing: "image", "host".
    pub what: &'static str,
    /// What was asked for.
    pub name: String,
    /// The closest name there is.
    pub closest: Option<String>,
    /// All names there are.
    pub known: Vec<String>,
}

struct Hint<'a>(&'a Unknown);

impl fmt::Display for Hint<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.0.closest, self.0.known.is_empty()) {
            (Some(closest), _) => write!(f, ": did you mean '{closest}'?"),
            (None, true) => f.write_str(", and no other either"),
            (None, false) => write!(f, ": use one of {}", self.0.known.join(", ")),
        }
    }
}

/// Says that there is no `name`, and what was probably meant.
pub fn unknown<T: fmt::Display>(
    what: &'static str,
    name: &str,
    known: impl IntoIterator<Item = T>,
) -> Unknown {
    let known: Vec<String> = known.into_iter().map(|k| k.to_string()).collect();
    let closest = known
        .iter()
        .map(|candidate| (strsim::jaro_winkler(name, candidate), candidate))
        .filter(|(alike, _)| *alike >= ALIKE)
        .max_by(|(a, _), (b, _)| a.total_cmp(b))
        .map(|(_, candidate)| candidate.clone());
    Unknown {
        what,
        name: name.to_owned(),
        closest,
        known,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_closest_name_is_offered() {
        let known = ["ledger", "linux", "debian"];
        let said = unknown("image", "legder", known).to_string();
        assert_eq!(said, "there is no image 'legder': did you mean 'ledger'?");
    }

    #[test]
    fn far_off_names_get_the_whole_list() {
        let said = unknown("image", "xyz", ["ledger", "linux"]).to_string();
        assert_eq!(said, "there is no image 'xyz': use one of ledger, linux");
        let nothing = unknown::<&str>("host", "a", []).to_string();
        assert_eq!(nothing, "there is no host 'a', and no other either");
    }
}
