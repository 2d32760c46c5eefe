//! What must hold whatever fails, each in its own file (DESIGN.md section 10).

mod answers_stay;
mod digests_agree;
mod gateways_never_go_back;
mod keeper_keeps_up;
mod last_log_stays;
mod members_hold_their_log;
mod numbers_rise;
mod one_history;
mod operators_are_told;
mod output_resumes;
mod paused_guests_go_on;
mod queues_are_bounded;
mod released_is_kept;
mod strangers_learn_nothing;
mod terms_come_to_life;
mod the_deaf_remove_nobody;

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
        Box::<last_log_stays::LastLogStays>::default(),
        Box::<keeper_keeps_up::KeeperKeepsUp>::default(),
        Box::<strangers_learn_nothing::StrangersLearnNothing>::default(),
        Box::<terms_come_to_life::TermsComeToLife>::default(),
        Box::<paused_guests_go_on::PausedGuestsGoOn>::default(),
        Box::<queues_are_bounded::QueuesAreBounded>::default(),
        Box::<output_resumes::OutputResumes>::default(),
        Box::<the_deaf_remove_nobody::TheDeafRemoveNobody>::default(),
        Box::<operators_are_told::OperatorsAreTold>::default(),
    ]
}
