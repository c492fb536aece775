//! Any bytes from a broker: each frame is read or refused, never more than what is there, and a
//! frame that is not complete yet is waited for.
//!
//! Run: `scripts/fuzz 60 amqp_frames`

#![no_main]

use libfuzzer_sys::fuzz_target;
use watership::amqp::wire;

/// Small, so that frames above it are among what is tried.
const FRAME_MAX: usize = 4096;

fuzz_target!(|data: &[u8]| {
    let mut rest = data;
    while let Ok(Some((_, len))) = wire::parse(rest, FRAME_MAX) {
        assert!((8..=rest.len()).contains(&len), "a frame has a head, an end, and is all there");
        // Of one that lacks its last byte, nothing is read.
        assert!(!matches!(wire::parse(&rest[..len - 1], FRAME_MAX), Ok(Some(_))));
        rest = &rest[len..];
    }
});
