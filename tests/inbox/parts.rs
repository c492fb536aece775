//! The parts by themselves, in a transaction of the caller.

use watership::inbox::{
    Message, Received, claim, claim_many, claim_with_hash, forget, park, receive,
};

use crate::stage::{Stage, now};

#[tokio::test]
async fn a_message_is_claimed_once_in_the_callers_transaction() {
    let mut stage = Stage::new().await;
    let tx = stage.sql.transaction().await.expect("a transaction");
    assert!(claim(&tx, "c", "m1", Some(now())).await.expect("claimed"));
    tx.rollback().await.expect("rolled back");
    let tx = stage.sql.transaction().await.expect("a transaction");
    for at in [Some(now()), None] {
        assert!(claim(&tx, "c", "m1", at).await.expect("claimed"));
        assert!(!claim(&tx, "c", "m1", at).await.expect("claimed"));
    }
    let many = claim_many(&tx, "c", &[("m1", now()), ("m2", now()), ("m2", now())]).await;
    assert_eq!(many.expect("claimed"), ["m2"]);
    assert!(claim_with_hash(&tx, "c", "m3", now(), b"one", true).await.expect("claimed"));
    tx.commit().await.expect("committed");
    let other = claim_with_hash(&stage.sql, "c", "m3", now(), b"other", true).await;
    assert_eq!(other.unwrap_err().sqlstate(), Some("WI004"));
    let other = claim_with_hash(&stage.sql, "c", "m3", now(), b"other", false).await;
    assert!(!other.expect("a duplicate"));
    for (at, code) in [(0, "WI001"), (u64::MAX, "WI002")] {
        let refused = claim(&stage.sql, "c", "m4", Some(at)).await.unwrap_err();
        assert_eq!(refused.sqlstate(), Some(code));
    }
    assert!(forget(&stage.sql, "c", "m1").await.expect("forgotten"));
    assert!(claim(&stage.sql, "c", "m1", Some(now())).await.expect("claimed"));
}

#[tokio::test]
async fn a_failed_message_is_parked_and_its_key_waits() {
    let stage = Stage::new().await;
    let message = |id: &str| Message::new(id, Some(now()), "body").with_key("k");
    let sql = &stage.sql;
    assert!(park(sql, "c", &message("m1"), "failed", "a\0b").await.expect("parked"));
    for (id, expected) in [("m1", Received::Duplicate), ("m2", Received::Parked)] {
        assert_eq!(receive(sql, "c", &message(id)).await.expect("received"), expected);
    }
    let other = message("m3").with_key("other");
    assert_eq!(receive(sql, "c", &other).await.expect("received"), Received::Handle);
    assert!(!park(sql, "c", &other, "failed", "why").await.expect("it was handled"));
    assert_eq!(forget(sql, "c", "m1").await.unwrap_err().sqlstate(), Some("55000"));
}
