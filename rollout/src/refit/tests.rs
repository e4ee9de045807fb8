//! The laws of a change of weights, over every order of events.

use super::{Refit, RefitAction, RefitEvent};
use proptest::prelude::*;
use temper_types::{ContentHash, PolicyVersion};

fn version(number: u64) -> PolicyVersion {
    PolicyVersion { number, hash: ContentHash([number as u8; 16]) }
}

/// An engine that does what it is told: open groups with the version of each of their tokens.
#[derive(Debug)]
struct Engine {
    refit: Refit,
    /// Weights in use, and those that arrived beside them.
    loaded: PolicyVersion,
    arrived: Option<PolicyVersion>,
    is_paused: bool,
    open: Vec<Vec<PolicyVersion>>,
    ended: Vec<Vec<PolicyVersion>>,
    wants_fetch: Option<PolicyVersion>,
}

impl Engine {
    fn new() -> Self {
        let refit = Refit::Serving(version(0));
        let (open, ended) = (Vec::new(), Vec::new());
        Engine { refit, loaded: version(0), arrived: None, is_paused: false, open, ended, wants_fetch: None }
    }

    fn tell(&mut self, event: RefitEvent) {
        let (refit, actions) = self.refit.step(event);
        self.refit = refit;
        for action in actions {
            match action {
                RefitAction::Pause => assert!(!std::mem::replace(&mut self.is_paused, true), "paused once"),
                RefitAction::Drain => assert!(self.is_paused, "what drains admits nothing"),
                RefitAction::Fetch(wanted) => {
                    assert!(self.open.is_empty() && self.is_paused, "a group is open while weights change");
                    self.wants_fetch = Some(wanted);
                }
                RefitAction::Bump(to) => {
                    assert_eq!(self.arrived.take(), Some(to), "served without having been attested");
                    assert!(self.open.is_empty() && self.is_paused);
                    self.loaded = to;
                }
                RefitAction::Resume => {
                    assert!(std::mem::replace(&mut self.is_paused, false), "resumed once");
                    (self.arrived, self.wants_fetch) = (None, None);
                }
            }
        }
        assert_eq!(self.refit.admits(), !self.is_paused);
        assert_eq!(self.refit.served(), self.loaded, "the version that is named is the one that is loaded");
    }

    /// One thing that can happen; `choice` says which.
    fn happen(&mut self, choice: u8, number: u64) {
        match choice {
            0 if self.refit.admits() => self.open.push(Vec::new()),
            1 if self.refit.computes() => self.open.iter_mut().for_each(|group| group.push(self.loaded)),
            2 if self.refit.computes() && !self.open.is_empty() => self.ended.push(self.open.remove(0)),
            3 => self.tell(RefitEvent::Publish(version(number))),
            4 if self.open.is_empty() => self.tell(RefitEvent::Drained),
            // What arrives is what was asked for, or something else.
            5 | 6 if self.wants_fetch.is_some() => {
                let found = if choice == 5 { self.wants_fetch } else { Some(version(100 + number)) };
                self.arrived = found;
                found.into_iter().for_each(|found| self.tell(RefitEvent::Attested(found)));
            }
            7 => self.tell(RefitEvent::Failed),
            _ => {}
        }
    }

    /// What is asked for is done: the engine comes to rest.
    fn settle(&mut self) {
        self.ended.append(&mut self.open);
        self.tell(RefitEvent::Drained);
        if let Some(wanted) = self.wants_fetch {
            self.arrived = Some(wanted);
            self.tell(RefitEvent::Attested(wanted));
        }
        assert!(self.refit.admits(), "a publication ends in serving: {self:?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    /// No order of events mixes versions in a group, serves what was not attested, or leaves the engine paused.
    #[test]
    fn every_group_is_of_one_proven_version(events in prop::collection::vec((0u8..8, 0u64..4), 0..60)) {
        let mut engine = Engine::new();
        for (choice, number) in events {
            engine.happen(choice, number);
            for group in engine.open.iter().chain(&engine.ended) {
                prop_assert!(group.windows(2).all(|pair| pair[0] == pair[1]), "{:?}", group);
            }
            prop_assert!(engine.loaded.number < 100, "what was not asked for is served");
        }
        engine.settle();
    }
}

#[test]
fn a_change_goes_through_every_state_and_back_where_it_fails() {
    let publish = RefitEvent::Publish(version(1));
    let (draining, actions) = Refit::Serving(version(0)).step(publish);
    assert_eq!(actions, [RefitAction::Pause, RefitAction::Drain]);
    assert!(!draining.admits() && draining.computes());
    let (refitting, actions) = draining.step(RefitEvent::Drained);
    assert_eq!(actions, [RefitAction::Fetch(version(1))]);
    assert!(!refitting.admits() && !refitting.computes());
    let (serving, actions) = refitting.step(RefitEvent::Attested(version(1)));
    assert_eq!(
        (serving, actions),
        (Refit::Serving(version(1)), vec![RefitAction::Bump(version(1)), RefitAction::Resume])
    );
    let back = (Refit::Serving(version(0)), vec![RefitAction::Resume]);
    assert_eq!(refitting.step(RefitEvent::Attested(version(2))), back, "other weights are not served");
    assert_eq!((refitting.step(RefitEvent::Failed), draining.step(RefitEvent::Failed)), (back.clone(), back.clone()));
    assert_eq!(draining.step(RefitEvent::Publish(version(0))), back, "what is served already needs no change");
}

/// A late or repeated message changes nothing.
#[test]
fn events_that_say_nothing_to_a_state_change_nothing() {
    let serving = Refit::Serving(version(3));
    for event in
        [RefitEvent::Drained, RefitEvent::Attested(version(4)), RefitEvent::Failed, RefitEvent::Publish(version(3))]
    {
        assert_eq!(serving.step(event), (serving, Vec::new()), "{event:?}");
    }
    let (draining, _) = serving.step(RefitEvent::Publish(version(4)));
    assert_eq!(draining.step(RefitEvent::Attested(version(4))), (draining, Vec::new()), "nothing was fetched");
    let (refitting, _) = draining.step(RefitEvent::Drained);
    assert_eq!(refitting.step(RefitEvent::Publish(version(5))), (refitting, Vec::new()), "one change at a time");
}
