//! The list of streams that are ready: many streams are polled by one task without being asked one
//! by one. A stream that becomes ready puts its name on the list and wakes that task.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Wake, Waker};

/// The names of the streams that are ready, and who is to be told.
#[derive(Debug)]
pub struct Ready<Id> {
    state: Mutex<State<Id>>,
}

#[derive(Debug)]
struct State<Id> {
    ids: Vec<Id>,
    owner: Option<Waker>,
}

impl<Id> Default for Ready<Id> {
    fn default() -> Self {
        let state = State {
            ids: Vec::new(),
            owner: None,
        };
        Self {
            state: Mutex::new(state),
        }
    }
}

impl<Id> Ready<Id> {
    /// From now on this task is woken when a stream becomes ready.
    pub fn listen(&self, owner: &Waker) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        match &mut state.owner {
            Some(known) => known.clone_from(owner),
            unknown => *unknown = Some(owner.clone()),
        }
    }

    /// Moves the list to the end of `into`.
    pub fn take(&self, into: &mut Vec<Id>) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        into.append(&mut state.ids);
    }
}

/// Wakes for one stream. It is on the list at most once between two calls of
/// [`ReadyWaker::unlist`].
#[derive(Debug)]
pub struct ReadyWaker<Id> {
    id: Id,
    listed: AtomicBool,
    ready: Arc<Ready<Id>>,
}

impl<Id> ReadyWaker<Id> {
    /// For the stream of this name, which is not on the list yet.
    pub fn new(id: Id, ready: &Arc<Ready<Id>>) -> Arc<Self> {
        Arc::new(Self {
            id,
            listed: AtomicBool::new(false),
            ready: Arc::clone(ready),
        })
    }

    /// The stream is about to be polled: what happens from now on lists it again.
    pub fn unlist(&self) {
        self.listed.store(false, Ordering::Release);
    }
}

impl<Id: Copy + Send + 'static> Wake for ReadyWaker<Id> {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if self.listed.swap(true, Ordering::AcqRel) {
            return;
        }
        let owner = {
            let state = &self.ready.state;
            let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
            state.ids.push(self.id);
            state.owner.clone()
        };
        if let Some(owner) = owner {
            owner.wake();
        }
    }
}
