// SPDX-License-Identifier: GPL-2.0
//! The content of pages.
//!
//! A [`Desc`] of 64 bits determines every byte of a page. The page begins with the descriptor, field by
//! field, and ends with a checksum of itself. So a page in the wrong place shows its owner.
//!
//! | kind | header | body | equal to |
//! | --- | --- | --- | --- |
//! | zero | | | all others |
//! | class | the class and a small version | the class's | pages of its class and version, of any owner |
//! | stamped | owner, place, version | the class's | no other page, but 4016 of its bytes are |
//! | own | owner, place, version | its own | no other page |

/// Bytes, and 64-bit words, per page.
pub const PAGE: usize = 4096;
pub const WORDS: usize = PAGE / 8;
/// The number of words in the header. The last word is the checksum, and the words between are the body.
pub const HEADER: usize = 9;
const MAGIC: u64 = u64::from_le_bytes(*b"tortured");
/// The number of bodies that pages of several owners share.
pub const CLASSES: usize = 16;
/// The owner of pages on the disk.
pub const DISK: u8 = u8::MAX;

/// The words of a page.
pub type Words = [u64; WORDS];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Zero,
    Class,
    Stamped,
    Own,
}

/// The content of a page, in 64 bits.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Desc(pub u64);

/// The owner of a page, and the page's place in that process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    pub owner: u8,
    pub slot: u8,
    pub page: u16,
}

impl Desc {
    pub const ZERO: Self = Self(0);

    fn pack(kind: u64, class: u8, place: Place, version: u32) -> Self {
        Self(
            kind | (u64::from(class) << 3)
                | (u64::from(place.owner) << 10)
                | (u64::from(place.slot & 15) << 18)
                | (u64::from(place.page & 1023) << 22)
                | (u64::from(version) << 32),
        )
    }

    /// Content that other pages have as well.
    pub fn class(class: u8, version: u32) -> Self {
        let nobody = Place {
            owner: 0,
            slot: 0,
            page: 0,
        };
        Self::pack(1, class % CLASSES as u8, nobody, version)
    }

    /// The body of a class under a header of its own.
    pub fn stamped(class: u8, place: Place, version: u32) -> Self {
        Self::pack(2, class % CLASSES as u8, place, version)
    }

    /// Content that no other page has.
    pub fn own(class: u8, place: Place, version: u32) -> Self {
        Self::pack(3, class % CLASSES as u8, place, version)
    }

    /// `None` if this is no valid descriptor.
    pub fn kind(self) -> Option<Kind> {
        match self.0 & 7 {
            0 if self.0 == 0 => Some(Kind::Zero),
            1 => Some(Kind::Class),
            2 => Some(Kind::Stamped),
            3 => Some(Kind::Own),
            _ => None,
        }
    }

    pub fn class_of(self) -> u8 {
        ((self.0 >> 3) & 127) as u8
    }

    pub fn place(self) -> Place {
        Place {
            owner: (self.0 >> 10) as u8,
            slot: ((self.0 >> 18) & 15) as u8,
            page: ((self.0 >> 22) & 1023) as u16,
        }
    }

    pub fn version(self) -> u32 {
        (self.0 >> 32) as u32
    }
}

impl std::fmt::Display for Desc {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (class, p, version) = (self.class_of(), self.place(), self.version());
        match self.kind() {
            Some(Kind::Zero) => write!(f, "zeroes"),
            Some(Kind::Class) => write!(f, "class {class} version {version}"),
            Some(kind) => write!(
                f,
                "{} of owner {} place {}:{} version {version}, class {class}",
                if kind == Kind::Own { "own" } else { "stamped" },
                p.owner,
                p.slot,
                p.page
            ),
            None => write!(f, "no descriptor ({:#x})", self.0),
        }
    }
}

pub fn mix(x: u64) -> u64 {
    let mut z = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// The bodies of all classes, made once.
pub struct Bodies {
    words: Vec<Words>,
    sums: Vec<u64>,
}

/// Return a sum in which positions count, so that exchanged words change it.
fn sum(words: &[u64], first: usize) -> u64 {
    words.iter().enumerate().fold(0u64, |sum, (i, &w)| {
        sum.wrapping_add(w.wrapping_mul((2 * (first + i) + 1) as u64))
    })
}

impl Bodies {
    pub fn new() -> Self {
        let mut this = Self {
            words: vec![[0; WORDS]; CLASSES],
            sums: Vec::new(),
        };
        for (class, words) in this.words.iter_mut().enumerate() {
            for (i, word) in words.iter_mut().enumerate() {
                *word = mix((class * WORDS + i) as u64 + 1);
            }
            this.sums.push(sum(&words[HEADER..WORDS - 1], HEADER));
        }
        this
    }

    /// Write header and checksum of a page whose body is in place.
    fn frame(desc: Desc, page: &mut Words, body: u64) {
        let place = desc.place();
        page[0] = MAGIC;
        page[1] = desc.0;
        page[2] = desc.0 & 7;
        page[3] = u64::from(desc.class_of());
        page[4] = u64::from(place.owner);
        page[5] = u64::from(place.slot);
        page[6] = u64::from(place.page);
        page[7] = u64::from(desc.version());
        page[8] = mix(desc.0);
        page[WORDS - 1] = mix(sum(&page[..HEADER], 0).wrapping_add(body));
    }

    /// Write the content of `desc` to `page`.
    pub fn render(&self, desc: Desc, page: &mut Words) {
        let class = desc.class_of() as usize % CLASSES;
        match desc.kind() {
            Some(Kind::Class | Kind::Stamped) => {
                page[HEADER..].copy_from_slice(&self.words[class][HEADER..]);
                Self::frame(desc, page, self.sums[class]);
            }
            Some(Kind::Own) => {
                let key = mix(desc.0);
                let body = &self.words[class];
                for (word, base) in page[HEADER..].iter_mut().zip(&body[HEADER..]) {
                    *word = base ^ key;
                }
                let body = sum(&page[HEADER..WORDS - 1], HEADER);
                Self::frame(desc, page, body);
            }
            Some(Kind::Zero) | None => page.fill(0),
        }
    }

    /// Describe the content of a page that differs from the expected one.
    pub fn diagnose(&self, page: &Words, want: Desc) -> String {
        let mut right = [0; WORDS];
        self.render(want, &mut right);
        let wrong: Vec<usize> = (0..PAGE)
            .filter(|&i| byte(page, i) != byte(&right, i))
            .collect();
        let (first, last) = (wrong.first().copied(), wrong.last().copied());
        let found = if page.iter().all(|&w| w == 0) {
            "all zeroes".to_string()
        } else if page[0] != MAGIC {
            format!("no page of ours (begins {:#x} {:#x})", page[0], page[1])
        } else {
            let told = Desc(page[1]);
            self.render(told, &mut right);
            let whole = *page == right;
            format!(
                "{told}, {}",
                if whole {
                    "whole and its checksum right: it is another's, or an older one"
                } else {
                    "torn: its bytes are not what its header says"
                }
            )
        };
        format!(
            "want {want}; found {found}; {} bytes differ, from {:?} to {:?}",
            wrong.len(),
            first.unwrap_or(0),
            last.unwrap_or(0)
        )
    }
}

impl Default for Bodies {
    fn default() -> Self {
        Self::new()
    }
}

fn byte(page: &Words, i: usize) -> u8 {
    page[i / 8].to_le_bytes()[i % 8]
}

#[cfg(test)]
mod tests {
    use super::*;

    const P: Place = Place {
        owner: 17,
        slot: 5,
        page: 1000,
    };

    fn page(desc: Desc) -> Words {
        let mut page = [7; WORDS];
        Bodies::new().render(desc, &mut page);
        page
    }

    #[test]
    fn a_descriptor_keeps_all_it_is_given() {
        let desc = Desc::own(9, P, u32::MAX - 3);
        assert_eq!(desc.kind(), Some(Kind::Own));
        assert_eq!(
            (desc.class_of(), desc.place(), desc.version()),
            (9, P, u32::MAX - 3)
        );
        assert_eq!(Desc::class(3, 2).kind(), Some(Kind::Class));
        assert_eq!(Desc::ZERO.kind(), Some(Kind::Zero));
        assert_eq!(Desc(8).kind(), None);
    }

    #[test]
    fn pages_of_a_class_are_equal_and_all_others_differ() {
        assert_eq!(page(Desc::class(3, 1)), page(Desc::class(3, 1)));
        let all = [
            Desc::ZERO,
            Desc::class(3, 1),
            Desc::class(3, 2),
            Desc::class(4, 1),
            Desc::stamped(3, P, 1),
            Desc::stamped(3, P, 2),
            Desc::own(3, P, 1),
            Desc::own(3, Place { owner: 18, ..P }, 1),
            Desc::own(3, Place { page: 999, ..P }, 1),
        ];
        for (i, &a) in all.iter().enumerate() {
            for &b in &all[i + 1..] {
                assert_ne!(page(a), page(b), "{a} and {b}");
            }
        }
    }

    #[test]
    fn a_stamp_changes_header_and_checksum_alone() {
        let (class, stamped) = (page(Desc::class(3, 0)), page(Desc::stamped(3, P, 8)));
        assert_eq!(class[HEADER..WORDS - 1], stamped[HEADER..WORDS - 1]);
        assert_ne!(class[WORDS - 1], stamped[WORDS - 1]);
    }

    #[test]
    fn every_lost_bit_breaks_the_checksum() {
        for desc in [
            Desc::own(1, P, 5),
            Desc::stamped(1, P, 5),
            Desc::class(1, 5),
        ] {
            let good = page(desc);
            let check = |p: &Words| mix(sum(&p[..WORDS - 1], 0)) == p[WORDS - 1];
            assert!(check(&good));
            for bit in 0..PAGE * 8 {
                let mut bad = good;
                bad[bit / 64] ^= 1 << (bit % 64);
                assert!(!check(&bad), "bit {bit} of {desc}");
            }
        }
    }

    #[test]
    fn a_diagnosis_names_what_is_there() {
        let bodies = Bodies::new();
        let want = Desc::own(1, P, 5);
        let other = bodies.diagnose(&page(Desc::own(2, P, 6)), want);
        assert!(
            other.contains("version 6") && other.contains("whole"),
            "{other}"
        );
        let mut torn = page(want);
        torn[100] ^= 0xff00;
        let torn = bodies.diagnose(&torn, want);
        assert!(
            torn.contains("torn") && torn.contains("1 bytes differ, from 801 to 801"),
            "{torn}"
        );
        assert!(bodies.diagnose(&[0; WORDS], want).contains("all zeroes"));
    }
}
