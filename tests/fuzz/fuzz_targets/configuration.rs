//! Any text as a configuration file: it is read, or refused with the name of the file, and nothing
//! that came from a variable is in the refusal.
//!
//! Run: `scripts/fuzz 60 configuration`

#![no_main]

use libfuzzer_sys::fuzz_target;
use watership::config::Config;

/// What every variable holds.
const SECRET: &str = "s3cr3t-0f-a-variable";
/// So that most of what is tried is about one key.
const BEFORE: &str = "name = 'shop'\nsource.url = 'postgres://r@h/d'\nbroker.url = 'amqp://h'\n";

fuzz_target!(|data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else { return };
    // Nothing on this machine is to be read, and the file itself holds no secrets.
    if text.contains("file:") || text.contains(SECRET) {
        return;
    }
    let lookup = |_: &str| Some(SECRET.to_owned());
    for text in [text.to_owned(), format!("{BEFORE}{text}")] {
        match Config::parse("shop.toml", &text, &lookup) {
            Ok(config) => assert_eq!(config.route_labels().len(), config.relay.rules.len()),
            Err(error) => {
                let told = error.text_with_hint();
                assert!(told.contains("shop.toml"), "{told}");
                assert!(!told.contains(SECRET), "{told}");
            }
        }
    }
});
