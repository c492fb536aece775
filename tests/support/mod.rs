//! What the test binaries share: servers, the relay between them, and the judgement of a run.
//!
//! | module | what |
//! |---|---|
//! | `servers` | Postgres and RabbitMQ: shared, with a database and a vhost a test, or private |
//! | `stage`, `inbox` | one relay between a database and a vhost, step by step |
//! | `scene`, `writers`, `judge` | one run under load and faults, judged at its end by the ledger |
//! | `relay` | the real binary as a process |
//! | `topology` | the one queue of a scene, taken away and given back |
//! | `proxy`, `framing` | what breaks connections, at any byte or message |
//! | `schedule` | the soak's faults, made from a seed |
//! | `results` | the file that the fault tests report to |
//! | `waiting` | waits that end on what they see, and the one limit that means "hung" |

#![allow(dead_code, reason = "each test binary uses a part of it")]

pub mod framing;
pub mod inbox;
pub mod judge;
pub mod proxy;
pub mod relay;
pub mod results;
pub mod scene;
pub mod schedule;
pub mod servers;
pub mod stage;
pub mod topology;
pub mod waiting;
pub mod writers;

/// Whether the long tests were asked for.
pub fn full() -> bool {
    std::env::var_os("WATERSHIP_FULL").is_some()
}
