//! Partitions: the queues that a route spreads its keys over, and which one a key goes to. Pure.
//!
//! Invariant: the partition is a function of the key's text and of the number of partitions, and of
//! nothing else; the text is that of the header `ws-key`. Programs in other languages compute the
//! same (docs/consuming.md), so neither function may ever change.
//!
//! The hash is XXH64 with seed 0, of which [`bucket`] makes a partition by jump consistent hashing:
//! when N partitions become M, only the share (M − N) / M of the keys moves, and those all into new
//! ones. With a remainder, almost all would.

use xxhash_rust::xxh64::xxh64;

/// Maximum number of partitions of a route: their numbers have two digits.
pub const PARTITIONS_MAX: u16 = 100;

/// The queues `<queue>.00`, `<queue>.01`, … of a route.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Partitions {
    /// What their names begin with.
    pub queue: String,
    /// How many there are, 1 to [`PARTITIONS_MAX`].
    pub count: u16,
}

impl Partitions {
    /// The name of a partition; also its routing key.
    pub fn name(&self, number: u16) -> String {
        format!("{}.{number:02}", self.queue)
    }

    /// The names of all, in order.
    pub fn names(&self) -> Vec<String> {
        (0..self.count).map(|number| self.name(number)).collect()
    }

    /// The number of the partition of a key.
    pub fn of_key(&self, key: &str) -> u16 {
        of_key(key, self.count)
    }
}

/// The number of the partition, of `count`, that the key with this text goes to.
pub(super) fn of_key(key: &str, count: u16) -> u16 {
    bucket(xxh64(key.as_bytes(), 0), count)
}

/// Jump consistent hash: a number below `count`, which is at least 1.
///
/// J. Lamping, E. Veach: A Fast, Minimal Memory, Consistent Hash Algorithm (2014),
/// <https://arxiv.org/abs/1406.2294>.
fn bucket(mut hash: u64, count: u16) -> u16 {
    let (mut bucket, mut next) = (0, 0);
    while next < u64::from(count) {
        bucket = next;
        hash = hash.wrapping_mul(2_862_933_555_777_941_757).wrapping_add(1);
        // Both are below 2^53, so the quotient is the same on every machine.
        let step = (1_u64 << 31) as f64 / ((hash >> 33) + 1) as f64;
        next = ((bucket + 1) as f64 * step) as u64;
    }
    u16::try_from(bucket).expect("it is below count")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_those_of_other_implementations() {
        for (hash, count, expected) in [
            (1, 1, 0),
            (42, 57, 43),
            (0xDEAD_10CC, 1, 0),
            (0xDEAD_10CC, 666, 361),
            (256, 1024, 520),
            (10_863_919_174_838_991, 11, 6),
            (2_016_238_256_797_177_309, 11, 3),
        ] {
            assert_eq!(bucket(hash, count), expected, "{hash} of {count}");
        }
    }

    /// The table of docs/consuming.md.
    #[test]
    fn a_key_has_the_partition_that_is_documented() {
        let docs = include_str!("../../docs/consuming.md");
        for (key, hash, partitions) in VECTORS {
            assert_eq!(xxh64(key.as_bytes(), 0), *hash, "{key}");
            let found: Vec<u16> = [1, 8, 12, 100].map(|count| of_key(key, count)).into();
            assert_eq!(found, *partitions, "{key}");
            let numbers: Vec<String> = found.iter().map(ToString::to_string).collect();
            let row = format!("| `{key}` | `{hash:016x}` | {} |", numbers.join(" | "));
            assert!(docs.contains(&row), "docs/consuming.md lacks {row}");
        }
    }

    /// Computed by a program of its own, in another language.
    const VECTORS: &[(&str, u64, &[u16])] = &[
        ("order/7", 0x9ef0_4e99_3a03_362e, &[0, 2, 2, 22]),
        ("order/8", 0xf09e_898f_07b9_fe96, &[0, 4, 4, 20]),
        ("customer/0198c2f0-7a11-7cc0-b4d5-0b6f2a9d3e11", 0x671e_d3dc_bd5c_c77b, &[0, 2, 2, 2]),
        ("public.items/42", 0xb159_87ba_a6e8_c086, &[0, 7, 8, 19]),
        ("public.items", 0xcb8a_9f85_a35d_5759, &[0, 7, 7, 60]),
        ("order/Zürich", 0xb4c3_d1db_8a4d_f81b, &[0, 3, 11, 90]),
    ];

    #[test]
    fn with_more_partitions_a_key_stays_or_goes_to_a_new_one() {
        let keys: Vec<String> = (0..10_000).map(|n| format!("order/{n}")).collect();
        let mut moved = 0;
        for key in &keys {
            let (before, after) = (of_key(key, 8), of_key(key, 12));
            assert!(before == after || after >= 8, "{key}: {before} to {after}");
            moved += usize::from(before != after);
        }
        assert!((3000..3700).contains(&moved), "a third moves: {moved}");
        let mut sizes = [0; 8];
        keys.iter().for_each(|key| sizes[usize::from(of_key(key, 8))] += 1);
        assert!(sizes.iter().all(|size| (1000..1500).contains(size)), "{sizes:?}");
    }

    #[test]
    fn names_have_two_digits() {
        let partitions = Partitions { queue: "orders".into(), count: 100 };
        let names = partitions.names();
        assert_eq!((&*names[0], &*names[9], &*names[99]), ("orders.00", "orders.09", "orders.99"));
    }
}
