//! The WAL stream over our own connection: slots, positions, errors that stick, odd segments.

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::time::timeout;
use watership::dev::{Postgres, PostgresOptions, StopMode};
use watership::error::{Kind, Result};
use watership::pg::client;
use watership::pg::connect::Options;
use watership::pg::replication::{Frame, ReplicationConnection, ReplicationStream, StreamOptions};
use watership::pg::slot::{create_slot, drop_slot};
use watership::position::Lsn;
use watership::secret::Secret;
use watership::verdict::Verdict;

use crate::support::servers;
use crate::support::waiting::LIMIT;

fn options(url: &str) -> Options {
    Options::parse(&Secret::new(url)).expect("a good URL")
}

/// A database with a table, a publication of it and a slot.
async fn published() -> (servers::Database, tokio_postgres::Client, ReplicationConnection) {
    let database = servers::own_database().await;
    let client = database.connect().await;
    let sql = "CREATE TABLE t (id int PRIMARY KEY, v text); CREATE PUBLICATION p FOR TABLE t";
    client.batch_execute(sql).await.expect("done");
    let session = ReplicationConnection::connect(&options(&database.url)).await.expect("done");
    (database, client, session)
}

async fn next(stream: &mut ReplicationStream) -> Result<Frame> {
    loop {
        if let Some(frame) = stream.try_next()? {
            return Ok(frame);
        }
        timeout(LIMIT, stream.fill()).await.expect("something arrives")?;
    }
}

/// The tags of the pgoutput messages up to and including the next Commit, and its end LSN.
async fn transaction(stream: &mut ReplicationStream) -> (String, Lsn) {
    let mut tags = String::new();
    loop {
        let Frame::XLogData { data, .. } = next(stream).await.expect("a frame") else { continue };
        tags.push(char::from(data[0]));
        if data[0] == b'C' {
            // Commit: tag, flags, commit LSN, end LSN, time.
            return (tags, Lsn(u64::from_be_bytes(data[10..18].try_into().expect("8 bytes"))));
        }
    }
}

#[tokio::test]
async fn a_slot_streams_an_insert_and_takes_the_flush_position() {
    let (database, client, mut session) = published().await;
    let slot = format!("slot_{}", database.name);
    let system = session.identify_system().await.unwrap();
    let row = client
        .query_one("SELECT system_identifier::text FROM pg_control_system()", &[])
        .await
        .unwrap();
    assert_eq!(system.system_id.to_string(), row.get::<_, String>(0));
    assert_eq!((system.timeline, &system.dbname), (1, &database.name));
    let point = create_slot(&client, &slot, false).await.unwrap();
    assert!(point > Lsn::ZERO);
    let error = create_slot(&client, &slot, false).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Refused);
    assert!(error.to_string().contains(&slot), "{error}");

    let none = StreamOptions::default();
    let mut stream = session.start(&slot, Lsn::ZERO, &["p"], none).await.unwrap();
    client.batch_execute("INSERT INTO t VALUES (1, 'x')").await.unwrap();
    let (tags, end) = transaction(&mut stream).await;
    assert_eq!(tags, "BRIC");
    assert!(end > point);

    stream.status_update(end, end, true);
    stream.flush().await.unwrap();
    let reached = |frame| matches!(frame, Frame::Keepalive { wal_end, .. } if wal_end >= end);
    while !reached(next(&mut stream).await.unwrap()) {}
    stream.close().await;
    let sql =
        "SELECT confirmed_flush_lsn::text, active FROM pg_replication_slots WHERE slot_name = $1";
    let row = client.query_one(sql, &[&slot]).await.unwrap();
    assert_eq!(row.get::<_, String>(0).parse::<Lsn>().unwrap(), end);
    assert!(!row.get::<_, bool>(1), "close waits until the slot is free");
}

#[tokio::test]
async fn publication_names_of_any_kind_are_found() {
    let (database, client, session) = published().await;
    let slot = format!("slot_{}", database.name);
    let names = ["a\"b", "a,b", "a;b", "a\\b", "it's", "grüße 🐇", "Upper", &"x".repeat(63)];
    for name in names {
        let quoted = name.replace('"', "\"\"");
        client
            .batch_execute(&format!("CREATE PUBLICATION \"{quoted}\" FOR TABLE t"))
            .await
            .unwrap();
    }
    create_slot(&client, &slot, false).await.unwrap();
    let names: Vec<&str> = names.iter().map(|n| &**n).collect();
    let started = session.start(&slot, Lsn::ZERO, &names, StreamOptions::default()).await;
    let mut stream = started.unwrap();
    client.batch_execute("INSERT INTO t VALUES (1, 'x')").await.unwrap();
    assert_eq!(transaction(&mut stream).await.0, "BRIC");
}

#[tokio::test]
async fn slot_missing_busy_and_free_again() {
    let (database, client, session) = published().await;
    let slot = format!("slot_{}", database.name);
    create_slot(&client, &slot, false).await.unwrap();
    let none = StreamOptions::default();
    let held = session.start(&slot, Lsn::ZERO, &["p"], none).await.unwrap();

    let options = options(&database.url);
    let second = ReplicationConnection::connect(&options).await.unwrap();
    let error = second.start(&slot, Lsn::ZERO, &["p"], none).await.err().unwrap();
    assert_eq!(error.kind(), Kind::Busy, "{error:?}");
    let row = client
        .query_one(
            "SELECT active_pid::text FROM pg_replication_slots WHERE slot_name = $1",
            &[&slot],
        )
        .await
        .unwrap();
    assert!(error.to_string().contains(&row.get::<_, String>(0)), "{error}");
    let third = ReplicationConnection::connect(&options).await.unwrap();
    assert_eq!(drop_slot(&client, &slot).await.unwrap_err().kind(), Kind::Busy);

    held.close().await;
    drop_slot(&client, &slot).await.unwrap();
    assert_eq!(drop_slot(&client, &slot).await.unwrap_err().kind(), Kind::Refused);
    let error = third.start(&slot, Lsn::ZERO, &["p"], none).await.err().unwrap();
    assert_eq!(error.verdict(), Some(Verdict::SlotMissing), "{error:?}");
    assert!(error.to_string().contains(&slot), "{error}");
}

#[tokio::test]
async fn a_missing_publication_is_a_sticky_verdict_up_to_17() {
    if servers::postgres().await.major() >= 18 {
        return;
    }
    let (database, client, session) = published().await;
    let slot = format!("slot_{}", database.name);
    create_slot(&client, &slot, false).await.unwrap();
    let none = StreamOptions::default();
    let mut stream = session.start(&slot, Lsn::ZERO, &["absent"], none).await.unwrap();
    client.batch_execute("INSERT INTO t VALUES (1, 'x')").await.unwrap();
    let error = loop {
        match next(&mut stream).await {
            Ok(_) => {}
            Err(error) => break error,
        }
    };
    assert_eq!(error.verdict(), Some(Verdict::PublicationMissing), "{error:?}");
    assert!(error.to_string().contains("absent"), "{error}");
    for again in [stream.try_next().err(), stream.fill().await.err()] {
        assert_eq!(again.unwrap().to_string(), error.to_string());
    }
}

#[tokio::test]
async fn a_slot_is_not_made_with_wal_level_replica_and_the_error_says_so() {
    let conf = vec!["wal_level = replica".into()];
    let server = Postgres::start(PostgresOptions { conf, ..Default::default() }).await.unwrap();
    let options = options(&server.url("postgres", "postgres"));
    let sql = client::sql(&options).await.unwrap();
    let error = create_slot(&sql.client, "s", false).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Refused, "{error:?}");
    assert!(error.to_string().contains("wal_level"), "{error}");
}

#[tokio::test]
async fn a_server_that_stops_is_seen_at_once_on_both_connections() {
    let mut server = Postgres::start(PostgresOptions::default()).await.unwrap();
    let options = options(&server.url("postgres", "postgres"));
    server.execute("CREATE PUBLICATION p").await.unwrap();
    let session = ReplicationConnection::connect(&options).await.unwrap();
    let mut sql = client::sql(&options).await.unwrap();
    create_slot(&sql.client, "s", false).await.unwrap();
    let none = StreamOptions::default();
    let mut stream = session.start("s", Lsn::ZERO, &["p"], none).await.unwrap();

    let answer_keepalives = async {
        loop {
            match next(&mut stream).await {
                Ok(Frame::Keepalive { wal_end, .. }) => {
                    stream.status_update(wal_end, wal_end, false);
                    if let Err(error) = stream.flush().await {
                        return error;
                    }
                }
                Ok(Frame::XLogData { .. }) => {}
                Err(error) => return error,
            }
        }
    };
    let (stopped, streamed, closed) = timeout(LIMIT, async {
        tokio::join!(server.stop(StopMode::Fast), answer_keepalives, sql.closed.wait())
    })
    .await
    .expect("all end soon");
    stopped.unwrap();
    assert_eq!(streamed.kind(), Kind::Unreachable, "{streamed:?}");
    assert_eq!(closed.kind(), Kind::Unreachable, "{closed:?}");
    assert!(closed.to_string().contains("57P01"), "{closed}");
    let again = ReplicationConnection::connect(&options).await.err().unwrap();
    assert_eq!(again.kind(), Kind::Unreachable, "{again:?}");
}

#[tokio::test]
async fn a_terminated_walsender_is_unreachable() {
    let (database, client, session) = published().await;
    let slot = format!("slot_{}", database.name);
    create_slot(&client, &slot, false).await.unwrap();
    let none = StreamOptions::default();
    let mut stream = session.start(&slot, Lsn::ZERO, &["p"], none).await.unwrap();
    let sql =
        "SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE slot_name = $1";
    client.query(sql, &[&slot]).await.unwrap();
    let error = loop {
        match next(&mut stream).await {
            Ok(_) => {}
            Err(error) => break error,
        }
    };
    assert_eq!(error.kind(), Kind::Unreachable, "{error:?}");
}

#[tokio::test]
async fn a_dropped_fill_loses_nothing() {
    let (database, client, session) = published().await;
    let slot = format!("slot_{}", database.name);
    create_slot(&client, &slot, false).await.unwrap();
    let none = StreamOptions::default();
    let mut stream = session.start(&slot, Lsn::ZERO, &["p"], none).await.unwrap();
    let sql = "INSERT INTO t SELECT i, repeat('x', i % 500) FROM generate_series(1, 20000) i";
    client.batch_execute(sql).await.unwrap();
    let (mut inserts, mut turn) = (0, 0u32);
    let all = async {
        while inserts < 20_000 {
            while let Some(frame) = stream.try_next().unwrap() {
                if let Frame::XLogData { data, .. } = frame {
                    inserts += usize::from(data[0] == b'I');
                }
            }
            turn += 1;
            tokio::select! {
                biased;
                () = tokio::task::yield_now(), if turn % 2 == 0 => {}
                filled = stream.fill() => filled.unwrap(),
            }
        }
    };
    timeout(LIMIT, all).await.expect("all rows arrive");
}

#[tokio::test]
async fn a_cancelled_command_poisons_the_connection() {
    let database = servers::own_database().await;
    let mut session = ReplicationConnection::connect(&options(&database.url)).await.unwrap();
    tokio::select! {
        biased;
        _ = session.identify_system() => panic!("answered at once"),
        () = std::future::ready(()) => {}
    }
    let error = session.identify_system().await.unwrap_err();
    assert!(error.to_string().contains("cancelled"), "{error}");
    assert_eq!(session.timeline_history(2).await.unwrap_err().to_string(), error.to_string());
}

#[tokio::test]
async fn one_byte_segments_make_the_same_frames() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("postgres://r@{}/db", listener.local_addr().unwrap());
    let server = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        stream.set_nodelay(true).unwrap();
        let mut heard = [0; 4096];
        assert!(stream.read(&mut heard).await.unwrap() > 0);
        let mut script = b"R\0\0\0\x08\0\0\0\0v\0\0\0\x0c\0\x03\0\0\0\0\0\0".to_vec();
        script.extend(b"S\0\0\0\x18server_version\x0015.1\0Z\0\0\0\x05I");
        stream.write_all(&script).await.unwrap();
        assert!(stream.read(&mut heard).await.unwrap() > 0);
        let mut script = b"W\0\0\0\x07\0\0\0d\0\0\0\x1dw".to_vec();
        script.extend([0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 3]);
        script.extend(b"N\0\0\0\x06S\0\0d\0\0\0\x05?c\0\0\0\x04");
        for byte in script {
            // The client leaves at the frame that is broken.
            let _ = stream.write_all(&[byte]).await;
            tokio::task::yield_now().await;
        }
    });
    let session = ReplicationConnection::connect(&options(&url)).await.unwrap();
    let none = StreamOptions::default();
    let mut stream = session.start("s", Lsn::ZERO, &["p"], none).await.unwrap();
    let Frame::XLogData { wal_start, wal_end, sent_at, data } = next(&mut stream).await.unwrap()
    else {
        panic!("no XLogData")
    };
    assert_eq!((wal_start, wal_end, sent_at, data.len()), (Lsn(1), Lsn(2), 3, 0));
    let error = next(&mut stream).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Protocol, "{error:?}");
    assert_eq!(next(&mut stream).await.unwrap_err().to_string(), error.to_string());
    drop(stream);
    server.await.unwrap();
}
