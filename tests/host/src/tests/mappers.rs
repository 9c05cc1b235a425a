// SPDX-License-Identifier: GPL-2.0

//! Tests of `mm/mappers.rs`.

use crate::mm::mappers::{Mapper, MapperCheck, Refusal, MAX_FORK_VMAS};
use std::cell::RefCell;

/// A VMA of another process, and the questions that it was asked.
#[derive(Default)]
struct Vma {
    own: bool,
    maps_folio: bool,
    elsewhere: bool,
    registered: bool,
    forking: bool,
    asked: RefCell<Vec<&'static str>>,
}

impl Vma {
    /// A VMA that a merge allows.
    fn allowed() -> Self {
        Self {
            maps_folio: true,
            registered: true,
            ..Self::default()
        }
    }

    fn answer(&self, question: &'static str, answer: bool) -> bool {
        self.asked.borrow_mut().push(question);
        answer
    }
}

impl Mapper for Vma {
    fn is_own(&self) -> bool {
        self.answer("own", self.own)
    }

    fn maps_folio(&self) -> bool {
        self.answer("folio", self.maps_folio)
    }

    fn maps_elsewhere(&self) -> bool {
        self.answer("elsewhere", self.elsewhere)
    }

    fn is_registered(&self) -> bool {
        self.answer("registered", self.registered)
    }

    fn may_be_forking(&self) -> bool {
        self.answer("forking", self.forking)
    }
}

/// Checks `vmas` as the kernel's rmap walk does, which stops when it is told to.
fn check(vmas: &[Vma], mapcount: Option<i32>) -> Result<(), Refusal> {
    let mut check = MapperCheck::new();
    vmas.iter().all(|vma| check.visit(vma));
    check.finish(mapcount)
}

/// What a check of this VMA alone comes to, and the questions that it was asked.
fn check_one(vma: Vma) -> (Result<(), Refusal>, Vec<&'static str>) {
    let vmas = [vma];
    let verdict = check(&vmas, Some(2));
    let [vma] = vmas;
    (verdict, vma.asked.into_inner())
}

/// No question is asked once the verdict is clear. The last one takes a lock.
#[test]
fn asks_in_order() {
    let all = ["own", "folio", "elsewhere", "registered", "forking"];
    let own = Vma {
        own: true,
        ..Vma::default()
    };
    let stranger = Vma::default();
    let moved = Vma {
        elsewhere: true,
        registered: false,
        forking: true,
        ..Vma::allowed()
    };
    let unregistered = Vma {
        registered: false,
        forking: true,
        ..Vma::allowed()
    };
    let forking = Vma {
        forking: true,
        ..Vma::allowed()
    };
    let passing = Err(Refusal::Passing);
    // A mapping is missing besides that of the own process.
    assert_eq!(check_one(own), (passing, all[..1].to_vec()));
    assert_eq!(check_one(stranger), (passing, all[..2].to_vec()));
    let lasting = Err(Refusal::Lasting);
    assert_eq!(check_one(moved), (lasting, all[..3].to_vec()));
    assert_eq!(check_one(unregistered), (lasting, all[..4].to_vec()));
    assert_eq!(check_one(forking), (passing, all.to_vec()));
    assert_eq!(check_one(Vma::allowed()), (Ok(()), all.to_vec()));
}

/// The first refusal ends the walk and stands, whatever the mapcount.
#[test]
fn stops_at_the_first_refusal() {
    let forking = Vma {
        forking: true,
        ..Vma::allowed()
    };
    let unregistered = Vma {
        registered: false,
        ..Vma::allowed()
    };
    let vmas = [Vma::allowed(), unregistered, forking];
    for mapcount in [None, Some(1), Some(100)] {
        assert_eq!(check(&vmas, mapcount), Err(Refusal::Lasting));
    }
    assert!(vmas[2].asked.borrow().is_empty());
}

/// All VMAs count for the limit, also those that do not map the page.
#[test]
fn looks_at_a_limited_number_of_vmas() {
    let limit = MAX_FORK_VMAS as usize;
    let mut vmas: Vec<_> = std::iter::repeat_with(Vma::default).take(limit).collect();
    vmas[0].own = true;
    assert_eq!(check(&vmas, Some(1)), Ok(()));
    vmas.push(Vma::allowed());
    assert_eq!(check(&vmas, Some(1)), Err(Refusal::Lasting));
    assert!(vmas[limit].asked.borrow().is_empty());
}

/// The own process has one mapping. The entries of a large folio are not compared with VMAs.
#[test]
fn misses_mappings_that_the_walk_did_not_find() {
    let vmas = [Vma::allowed(), Vma::allowed()];
    assert_eq!(check(&vmas, Some(3)), Ok(()));
    assert_eq!(check(&vmas, Some(4)), Err(Refusal::Passing));
    assert_eq!(check(&vmas, None), Ok(()));
}
