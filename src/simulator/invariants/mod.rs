//! What must hold whatever fails, each in its own file (DESIGN.md section 10).

mod answers_stay;
mod digests_agree;
mod gateways_never_go_back;
mod members_hold_their_log;
mod numbers_rise;
mod one_history;
mod released_is_kept;

use super::facts::Invariant;

/// All of them.
pub(super) fn all() -> Vec<Box<dyn Invariant>> {
    vec![
        Box::<released_is_kept::ReleasedIsKept>::default(),
        Box::<one_history::OneHistory>::default(),
        Box::<gateways_never_go_back::GatewaysNeverGoBack>::default(),
        Box::<digests_agree::DigestsAgree>::default(),
        Box::<numbers_rise::NumbersRise>::default(),
        Box::<members_hold_their_log::MembersHoldTheirLog>::default(),
        Box::<answers_stay::AnswersStay>::default(),
    ]
}
