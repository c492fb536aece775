//! The client of the management API: against a server that shows what it was asked, and against the
//! real plugin with users that may see little.

use std::sync::{Arc, Mutex};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use watership::amqp::audit::Grade;
use watership::amqp::management::Management;
use watership::amqp::options::{Options, Url};
use watership::error::Kind;
use watership::message::KeyPart;
use watership::secret::Secret;

use crate::support::servers::{own_vhost, rabbit};

/// Connections, and the heads of the requests that came over them.
pub type Asked = Arc<Mutex<(usize, Vec<String>)>>;

/// A server on this address that answers each request in chunks with an empty list.
async fn chunked(address: &str) -> (u16, Asked) {
    let answer = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n\
                  1\r\n[\r\n1\r\n]\r\n0\r\n\r\n";
    answering(address, answer).await
}

/// A server on this address that answers each request like this.
pub async fn answering(address: &str, answer: &'static str) -> (u16, Asked) {
    let listener = TcpListener::bind(address).await.expect("a listener");
    let port = listener.local_addr().expect("an address").port();
    let asked = Asked::default();
    let seen = asked.clone();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            seen.lock().expect("no panic").0 += 1;
            tokio::spawn(serve(stream, seen.clone(), answer));
        }
    });
    (port, asked)
}

async fn serve(mut stream: TcpStream, seen: Asked, answer: &str) {
    let mut text = String::new();
    let mut buffer = [0; 4096];
    while let Ok(n @ 1..) = stream.read(&mut buffer).await {
        text.push_str(&String::from_utf8_lossy(&buffer[..n]));
        while let Some((head, rest)) = text.split_once("\r\n\r\n") {
            seen.lock().expect("no panic").1.push(head.to_owned());
            text = rest.to_owned();
            let _ = stream.write_all(answer.as_bytes()).await;
        }
    }
}

fn management(url: &str, broker: &str) -> Management {
    let options = Options::new(vec![Url::parse(broker).expect("a broker URL")]);
    Management::new(&Secret::new(url), &options).expect("a management URL")
}

#[tokio::test]
async fn one_connection_speaks_http_1_1_to_an_ipv6_address_behind_a_prefix() {
    let (port, asked) = chunked("[::1]:0").await;
    let url = format!("http://u:secret@[::1]:{port}/rabbit/");
    let api = management(&url, "amqp://guest@127.0.0.1/shop");
    for name in ["a", "b", "c/d"] {
        assert!(api.bindings(name).await.expect("an answer").is_empty());
    }
    let (connections, heads) = asked.lock().expect("no panic").clone();
    assert_eq!(connections, 1);
    let first = "GET /rabbit/api/exchanges/shop/a/bindings/source HTTP/1.1\r\n";
    assert!(heads[0].starts_with(first), "{heads:?}");
    assert!(heads[2].contains("/c%2Fd/"), "{heads:?}");
    let host = format!("host: [::1]:{port}");
    assert!(heads.iter().all(|head| head.to_lowercase().contains(&host)), "{heads:?}");
}

#[tokio::test]
async fn what_is_wrong_with_the_connection_or_the_user_is_named_and_no_password_is_shown() {
    let node = rabbit().await;
    let vhost = own_vhost().await;
    let url = node.management_url().expect("management runs");
    let user = format!("plain-{}", vhost.name);
    let body = r#"{"password":"secret","tags":""}"#;
    node.management("PUT", &format!("/api/users/{user}"), body).await.expect("a user");
    let rights = r#"{"configure":".*","write":".*","read":".*"}"#;
    let path = format!("/api/permissions/{}/{user}", vhost.name);
    node.management("PUT", &path, rights).await.expect("rights");

    let as_user = |password: &str| url.replace("guest:guest", &format!("{user}:{password}"));
    let untagged = management(&as_user("secret"), &vhost.url).bindings("x").await.unwrap_err();
    assert_eq!(untagged.kind(), Kind::Refused);
    let text = untagged.to_string();
    assert!(text.contains("lacks the tag \"monitoring\"") && !text.contains("secret"), "{text}");
    let hint = untagged.hint_text().expect("a hint");
    assert!(hint.contains(&format!("set_user_tags {user} monitoring")), "{hint}");

    let wrong = management(&as_user("sesame"), &vhost.url).bindings("x").await.unwrap_err();
    let text = wrong.to_string();
    assert!(text.contains("password is wrong") && !text.contains("sesame"), "{text}");

    let tls = management(&url.replace("http:", "https:"), &vhost.url);
    let error = tls.bindings("x").await.unwrap_err();
    let hint = error.hint_text().expect("a hint");
    assert!(hint.contains("TLS enabled on this port"), "{error:?}");
}

#[tokio::test]
async fn an_alternate_exchange_of_a_policy_is_seen_by_a_user_that_may_only_look() {
    let node = rabbit().await;
    let vhost = own_vhost().await;
    let name = &vhost.name;
    let put = async |path: String, body: &str| {
        node.management("PUT", &path, body).await.expect("the broker takes it");
    };
    let user = format!("looks-{name}");
    put(format!("/api/users/{user}"), r#"{"password":"pw","tags":"monitoring"}"#).await;
    let all = r#"{"configure":"","write":"","read":""}"#;
    put(format!("/api/permissions/{name}/{user}"), all).await;
    put(format!("/api/exchanges/{name}/shop"), r#"{"type":"topic","durable":true}"#).await;
    put(format!("/api/exchanges/{name}/ae"), r#"{"type":"fanout","durable":true}"#).await;
    let quorum = r#"{"durable":true,"arguments":{"x-queue-type":"quorum"}}"#;
    put(format!("/api/queues/{name}/q"), quorum).await;
    let bind = format!("/api/bindings/{name}/e/ae/q/q");
    node.management("POST", &bind, r#"{"routing_key":""}"#).await.expect("bound");
    let policy = r#"{"pattern":"^shop$","apply-to":"exchanges",
        "definition":{"alternate-exchange":"ae"}}"#;
    put(format!("/api/policies/{name}/AE"), policy).await;

    let url = node.management_url().expect("management runs");
    let url = url.replace("guest:guest", &format!("{user}:pw"));
    let api = management(&url, &vhost.url);
    let survey = api.survey(&["shop".into()]).await.expect("a survey");
    let graded = survey.grade(&[], "shop", &[KeyPart::Any]);
    // One node, so its disk is the only copy; RabbitMQ 4 says first that it limits deliveries.
    assert_eq!(graded.grade, Grade::Weak, "{}", graded.reason);
    assert!(graded.reason.contains("queue \"q\""), "{}", graded.reason);
}

#[tokio::test]
async fn a_url_behind_which_there_is_no_management_api_shows_nothing_as_missing() {
    let node = rabbit().await;
    let vhost = own_vhost().await;
    let url = node.management_url().expect("management runs");
    let real = management(&url, &vhost.url);
    assert!(real.bindings("nowhere").await.expect("an answer").is_empty());
    let html = "200 OK\r\ncontent-type: text/html\r\ncontent-length: 13\r\n\r\n<html></html>";
    let list = "200 OK\r\ncontent-length: 2\r\n\r\n[]";
    let mut urls = Vec::new();
    for answer in ["404 Not Found\r\ncontent-length: 0\r\n\r\n", html, list] {
        let answer = format!("HTTP/1.1 {answer}").leak();
        let (port, _) = answering("127.0.0.1:0", answer).await;
        urls.push(format!("http://guest:guest@127.0.0.1:{port}"));
    }
    // The plugin itself, with a prefix that it does not have.
    urls.push(format!("{}/rabbit", url.trim_end_matches('/')));
    for (index, url) in urls.iter().enumerate() {
        let other = management(url, &vhost.url);
        let (bindings, survey) = (other.bindings("x").await, other.survey(&["x".into()]).await);
        let error = survey.unwrap_err();
        assert!(error.hint_text().is_some_and(|hint| hint.contains("path prefix")), "{error:?}");
        if index == 0 {
            for text in [error.to_string(), bindings.unwrap_err().to_string()] {
                assert!(text.contains("no management API at") && text.contains("(404)"), "{text}");
            }
        }
    }
}
