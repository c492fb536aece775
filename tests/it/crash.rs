//! The real binary, killed again and again under load. `tests/faults` has the other faults.
//!
//! Every test asserts the same at the end (`Scene::finish`): nothing lost, nothing that never
//! committed, first arrivals of each key in order. The long ones run when WATERSHIP_FULL is set.

use tokio::time::Instant;

use crate::support::full;
use crate::support::relay::Window;
use crate::support::scene::Scene;
use crate::support::servers::{own_database, own_vhost};
use crate::support::writers::{Load, STEADY};

#[tokio::test]
async fn a_relay_killed_again_and_again_loses_nothing_and_keeps_the_order() {
    let (database, vhost) = (own_database().await, own_vhost().await);
    let window = Window { events: 1024, unconfirmed: 512 };
    let mut scene = Scene::new("relay kill -9", &database.url, &vhost.url, window).await;
    scene.consume();
    scene.relay().start();
    scene.write(Load { rate: 2_000, ..STEADY });
    scene.flowing(500).await;
    kill_at_random(&mut scene, 8, 3_000).await;
    scene.enough();
    scene.finish().await;
}

/// Kills the relay `kills` times, each time before `most` further events are committed.
pub async fn kill_at_random(scene: &mut Scene, kills: u32, most: u64) {
    let mut dice = scene.dice();
    for kill in 1..=kills {
        // A random moment, the start of the relay included: 2 events are committed in 1 ms.
        scene.committed_more(dice.u64(40..most)).await;
        scene.fault(&format!("kill -9 of the relay, {kill}"));
        scene.relay().kill();
        scene.relay().start();
        // Half of the kills hit a relay that has not come far.
        if dice.bool() {
            scene.recovered(Instant::now(), 0).await;
        }
    }
}

#[tokio::test]
async fn a_relay_killed_while_it_drains_large_transactions_loses_nothing() {
    let (database, vhost) = (own_database().await, own_vhost().await);
    let mut scene = Scene::new("backlog", &database.url, &vhost.url, Window::default()).await;
    let events = if full() { 60_000 } else { 20_000 };
    scene.write(Load { events, rate: 0, rows: 200 });
    scene.written().await;
    let mut dice = scene.dice();
    scene.consume();
    scene.relay().start();
    for kill in 1..=5 {
        // By confirms, not by arrivals: the consumer may lag behind.
        scene.relay().confirms(dice.u64(1..u64::from(events) / 7)).await;
        scene.fault(&format!("kill -9 of the relay, {kill}"));
        scene.relay().kill();
        scene.relay().start();
        scene.recovered(Instant::now(), 0).await;
    }
    scene.finish().await;
}
