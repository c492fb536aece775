//! Holds what ships beside the code against itself: compose file, images, configuration, unit.
//!
//! No Docker here. What can be seen by reading is checked: that names point at something, that
//! every service says when it is healthy, that the example configuration and the compose file
//! talk about the same hosts and variables.

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;
use std::process::Command;

use serde_json::{Map, Value};
use watership::config::Config;

const DOCKERFILE: &str = "packaging/Dockerfile";

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_else(|e| panic!("{path}: {e}"))
}

fn yaml(path: &str) -> Value {
    serde_saphyr::from_str(&read(path)).unwrap_or_else(|e| panic!("{path}: {e}"))
}

fn services(compose: &Value) -> &Map<String, Value> {
    compose["services"].as_object().expect("services")
}

/// What is wrong with a compose file, as far as reading can tell.
fn faults(compose: &Value) -> Vec<String> {
    let mut found = Vec::new();
    for (name, service) in services(compose) {
        if service.get("image").is_none() && service.get("build").is_none() {
            found.push(format!("{name}: neither image nor build"));
        }
        let one_shot = service["restart"] == "no";
        if !one_shot && !has_healthcheck(service) {
            found.push(format!("{name}: no healthcheck"));
        }
        found.extend(dependency_faults(compose, name, service));
        found.extend(mount_faults(compose, name, service));
        found.extend(build_faults(name, service));
        found.extend(port_faults(name, service));
        for network in list(&service["networks"]) {
            if compose["networks"].get(&network).is_none() {
                found.push(format!("{name}: network {network} is not declared"));
            }
        }
    }
    found
}

fn has_healthcheck(service: &Value) -> bool {
    list(&service["healthcheck"]["test"]).len() >= 2
}

fn list(value: &Value) -> Vec<String> {
    let items = value.as_array().map(Vec::as_slice).unwrap_or_default();
    items.iter().map(|v| v.as_str().expect("a list of strings").to_owned()).collect()
}

fn dependency_faults(compose: &Value, name: &str, service: &Value) -> Vec<String> {
    let mut found = Vec::new();
    for (other, rule) in service["depends_on"].as_object().into_iter().flatten() {
        let Some(target) = services(compose).get(other) else {
            found.push(format!("{name}: depends on {other}, which does not exist"));
            continue;
        };
        let fits = match rule["condition"].as_str().unwrap_or_default() {
            "service_healthy" => has_healthcheck(target),
            "service_completed_successfully" => target["restart"] == "no",
            _ => false,
        };
        if !fits {
            found.push(format!("{name}: condition {} cannot hold for {other}", rule["condition"]));
        }
    }
    found
}

fn mount_faults(compose: &Value, name: &str, service: &Value) -> Vec<String> {
    let mut found = Vec::new();
    for mount in list(&service["volumes"]) {
        let source = mount.split(':').next().unwrap_or_default();
        match source.strip_prefix("./") {
            Some(file) if !root().join(file).exists() => {
                found.push(format!("{name}: mounts {file}, which does not exist"));
            }
            Some(_) => {}
            None if compose["volumes"].get(source).is_none() => {
                found.push(format!("{name}: volume {source} is not declared"));
            }
            None => {}
        }
    }
    found
}

fn build_faults(name: &str, service: &Value) -> Vec<String> {
    let Some(build) = service.get("build") else { return Vec::new() };
    let context = build["context"].as_str().unwrap_or_default();
    let dockerfile = build["dockerfile"].as_str().unwrap_or("Dockerfile");
    // The build copies what .dockerignore lets in, which is written for the root.
    if context != "." || !root().join(dockerfile).is_file() {
        return vec![format!("{name}: nothing to build in {context:?} with {dockerfile:?}")];
    }
    Vec::new()
}

/// `127.0.0.1:${NAME:-5432}:5432`: this file is for one machine.
fn port_faults(name: &str, service: &Value) -> Vec<String> {
    let fits = |port: &str| {
        let inner = port.strip_prefix("127.0.0.1:${").and_then(|rest| rest.split_once(":-"));
        let numbers = inner.and_then(|(_, rest)| rest.split_once("}:"));
        numbers.is_some_and(|(outside, inside)| {
            outside.parse::<u16>().is_ok() && inside.parse::<u16>().is_ok()
        })
    };
    let wrong = list(&service["ports"]).into_iter().filter(|port| !fits(port));
    wrong.map(|port| format!("{name}: port {port} is not 127.0.0.1:${{NAME:-n}}:n")).collect()
}

/// The names of the `${NAME}` in `text`; the defaults after `:-` are cut off.
fn variables(text: &str) -> BTreeSet<String> {
    let code: Vec<_> = text.lines().filter(|l| !l.trim_start().starts_with('#')).collect();
    let code = code.join("\n");
    let names = code.split("${").skip(1).map(|rest| {
        let end = rest.find(|c: char| !(c.is_alphanumeric() || c == '_')).unwrap_or(rest.len());
        rest[..end].to_owned()
    });
    names.collect()
}

#[test]
fn compose_file_holds_together() {
    let compose = yaml("docker-compose.yml");
    let found = faults(&compose);
    assert!(found.is_empty(), "docker-compose.yml:\n{}", found.join("\n"));
    for name in ["postgres", "rabbitmq", "init", "relay", "prometheus"] {
        assert!(services(&compose).contains_key(name), "no service {name}");
    }
    let command = list(&compose["services"]["postgres"]["command"]);
    assert!(command.iter().any(|word| word == "wal_level=logical"), "{command:?}");
}

#[test]
fn a_broken_compose_file_is_found_out() {
    for (text, fault) in [
        ("services: {a: {restart: 'no'}}", "a: neither image nor build"),
        ("services: {a: {image: x}}", "a: no healthcheck"),
        ("services: {a: {build: .., restart: 'no'}}", "nothing to build"),
        (
            "services: {a: {build: {context: .}, restart: 'no'}}",
            "a: nothing to build in \".\" with",
        ),
        ("services: {a: {image: x, restart: 'no', volumes: ['d:/d']}}", "volume d is not declared"),
        ("services: {a: {image: x, restart: 'no', volumes: ['./no:/d']}}", "mounts no, which"),
        ("services: {a: {image: x, restart: 'no', ports: ['5432:5432']}}", "port 5432:5432 is"),
        (
            "services: {a: {image: x, restart: 'no', networks: [net]}}",
            "network net is not declared",
        ),
        (
            "services: {a: {image: x, restart: 'no', depends_on: {b: {condition: x}}}}",
            "depends on b, which does not exist",
        ),
        (
            "services: {a: {image: x, restart: 'no', depends_on: {a: {condition: later}}}}",
            "cannot hold for a",
        ),
    ] {
        let compose = serde_saphyr::from_str(text).unwrap();
        let found = faults(&compose);
        assert!(found.len() == 1 && found[0].contains(fault), "{text}: {found:?}");
    }
}

#[test]
fn the_relays_compose_configuration_fits_the_compose_file() {
    let compose = yaml("docker-compose.yml");
    let text = read("config/compose.toml");
    let config: toml::Table = text.parse().expect("config/compose.toml is TOML");
    for (section, host) in [("source", "@postgres:5432/shop"), ("broker", "@rabbitmq:5672/")] {
        let url = config[section]["url"].as_str().expect("url");
        assert!(url.contains(host), "{section}.url {url} does not go to {host}");
    }
    let url = config["source"]["url"].as_str().expect("url");
    assert!(url.ends_with("?sslmode=disable"), "no TLS inside of the compose network: {url}");
    for service in ["init", "relay"] {
        let given = &compose["services"][service]["environment"];
        for name in variables(&text) {
            assert!(given.get(&name).is_some(), "{service} is not given {name}");
        }
        let mounts = list(&compose["services"][service]["volumes"]);
        assert!(mounts.iter().any(|m| m.starts_with("./config/compose.toml:")), "{mounts:?}");
    }
}

#[test]
fn the_relay_accepts_its_compose_configuration() {
    let text = read("config/compose.toml");
    let config = Config::parse("compose.toml", &text, &|_| Some("secret".into()))
        .unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(config.relay.name, "shop");
}

/// The command lines after the program's name that compose file, image and unit start.
fn shipped_commands() -> Vec<Vec<String>> {
    let compose = yaml("docker-compose.yml");
    let services = &compose["services"];
    let mut found = vec![list(&services["init"]["command"])];
    found.push(list(&services["relay"]["healthcheck"]["test"])[2..].to_vec());
    let dockerfile = read(DOCKERFILE).replace("\\\n", " ");
    for line in dockerfile.lines().filter_map(|l| l.split_once("CMD [")) {
        let words: Value = serde_json::from_str(&format!("[{}", line.1)).expect("a JSON list");
        let words = list(&words);
        let skipped = usize::from(words[0].ends_with("/watership"));
        found.push(words[skipped..].to_vec());
    }
    let unit = read("packaging/watership.service");
    let starts = unit.lines().filter_map(|l| l.strip_prefix("ExecStart=/usr/local/bin/watership "));
    found.extend(starts.map(|line| line.split(' ').map(str::to_owned).collect()));
    found
}

#[test]
fn the_program_knows_every_command_that_is_shipped() {
    let commands = shipped_commands();
    assert_eq!(commands.len(), 5, "{commands:?}");
    let said = |words: &[String]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_watership"));
        let output = command.args(words).arg("--help").output().expect("the program starts");
        (output.status.success(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    for words in commands {
        let (known, text) = said(&words);
        assert!(known, "{words:?}: {text}");
    }
    let (known, _) = said(&["run".to_owned(), "--no-such-flag".to_owned()]);
    assert!(!known, "--help hides a wrong flag, so this test cannot fail");
}

#[test]
fn every_password_has_a_default_for_development() {
    let text = read("docker-compose.yml");
    for name in variables(&text) {
        let with_default = text.matches(&format!("${{{name}:-")).count();
        assert_eq!(with_default, text.matches(&format!("${{{name}")).count(), "{name}");
    }
}

#[test]
fn prometheus_scrapes_services_that_exist() {
    let compose = yaml("docker-compose.yml");
    let prometheus = yaml("config/prometheus.yml");
    let jobs = prometheus["scrape_configs"].as_array().expect("scrape_configs");
    let mut targets = BTreeSet::new();
    for config in jobs.iter().flat_map(|job| job["static_configs"].as_array().unwrap()) {
        targets.extend(list(&config["targets"]));
    }
    let relay = format!("relay:{}", admin_port());
    assert!(targets.contains(&relay), "{targets:?} without {relay}");
    for target in targets {
        let (host, _) = target.split_once(':').expect("host:port");
        assert!(services(&compose).contains_key(host), "{target}: no such service");
    }
}

/// Where the relay of the compose file listens.
fn admin_port() -> u16 {
    let config: toml::Table = read("config/compose.toml").parse().expect("it is TOML");
    let listen = config["admin"]["listen"].as_str().expect("admin.listen");
    listen.rsplit(':').next().and_then(|port| port.parse().ok()).expect("a port")
}

#[test]
fn image_and_compose_file_publish_the_port_of_the_admin_server() {
    let port = admin_port();
    let published = list(&yaml("docker-compose.yml")["services"]["relay"]["ports"]);
    assert_eq!(published, [format!("127.0.0.1:${{RELAY_PORT:-{port}}}:{port}")]);
    let exposed = format!("EXPOSE {port}");
    assert!(read(DOCKERFILE).lines().any(|line| line == exposed), "no {exposed}");
}

#[test]
fn health_checks_ask_whether_the_relay_is_alive_so_that_no_standby_is_killed() {
    let compose = yaml("docker-compose.yml");
    let words = list(&compose["services"]["relay"]["healthcheck"]["test"]);
    let command = shipped_commands();
    let of_image = command.iter().find(|words| words.iter().any(|word| word == "status"));
    for words in [&words, of_image.expect("the image has a health check")] {
        assert!(words.iter().any(|word| word == "--alive"), "{words:?}");
        assert!(!words.iter().any(|word| word == "--ready"), "{words:?}");
    }
}

#[test]
fn image_is_built_in_stages_and_runs_without_root() {
    let dockerfile = read(DOCKERFILE);
    let stages = dockerfile.lines().filter(|l| l.starts_with("FROM ")).count();
    assert_eq!(stages, 2);
    let last = dockerfile.rsplit("FROM ").next().unwrap();
    for wanted in ["USER nonroot", "HEALTHCHECK", "STOPSIGNAL SIGTERM", "COPY --from=build"] {
        assert!(last.contains(wanted), "the last stage has no {wanted}");
    }
    // Everything is kept out but what is let in by name; what cargo reads must be among it.
    let ignored = read(".dockerignore");
    let let_in: BTreeSet<_> = ignored.lines().filter_map(|line| line.strip_prefix('!')).collect();
    assert!(ignored.lines().any(|line| line == "*"));
    for read in ["Cargo.toml", "Cargo.lock", "src", "sql", "scripts", "tests"] {
        assert!(let_in.contains(read), ".dockerignore keeps out {read}, which cargo reads");
    }
}

#[test]
fn ci_runs_check_and_nothing_else() {
    let workflow = yaml(".github/workflows/ci.yml");
    for (name, job) in workflow["jobs"].as_object().expect("jobs") {
        let steps = job["steps"].as_array().expect("steps");
        let runs: Vec<_> = steps.iter().filter_map(|step| step["run"].as_str()).collect();
        assert!(runs.iter().all(|run| run.starts_with("./check")), "{name}: {runs:?}");
        assert!(!runs.is_empty(), "{name} runs nothing");
    }
}

#[test]
fn service_unit_keeps_the_relay_in_its_box() {
    let unit = read("packaging/watership.service");
    let lines: BTreeSet<_> = unit.lines().collect();
    for wanted in [
        "DynamicUser=yes",
        "ProtectSystem=strict",
        "ProtectHome=yes",
        "PrivateTmp=yes",
        "NoNewPrivileges=yes",
        "CapabilityBoundingSet=",
        "RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX",
        "SystemCallFilter=@system-service",
        "MemoryDenyWriteExecute=yes",
        "LockPersonality=yes",
        "RestrictNamespaces=yes",
        "LimitCORE=0",
        "RestartPreventExitStatus=2 3",
    ] {
        assert!(lines.contains(wanted), "packaging/watership.service has no {wanted}");
    }
}

/// Whether it always names the same image: by an exact version, or a digest.
fn is_pinned(image: &str) -> bool {
    if let Some((_, digest)) = image.split_once("@sha256:") {
        return digest.len() == 64 && digest.bytes().all(|b| b.is_ascii_hexdigit());
    }
    let Some((name, tag)) = image.rsplit_once(':') else { return false };
    let version = tag.trim_start_matches('v').split('-').next().unwrap_or_default();
    let numbers = version.split('.').filter(|part| part.parse::<u32>().is_ok()).count();
    // Postgres has versions of two numbers.
    numbers >= if name == "postgres" { 2 } else { 3 }
}

#[test]
fn images_are_pinned() {
    let (compose, dockerfile) = (yaml("docker-compose.yml"), read(DOCKERFILE));
    let workflow = yaml(".github/workflows/ci.yml");
    let mut images: Vec<String> = Vec::new();
    images.extend(services(&compose).values().filter_map(|s| s["image"].as_str().map(Into::into)));
    let from = dockerfile.lines().filter_map(|line| line.strip_prefix("FROM "));
    images.extend(from.map(|line| line.split(' ').next().unwrap().to_owned()));
    let jobs = workflow["jobs"].as_object().expect("jobs").values();
    images.extend(jobs.filter_map(|job| job["container"]["image"].as_str().map(Into::into)));
    assert_eq!(images.len(), 6, "{images:?}");
    let moving: Vec<_> = images.iter().filter(|image| !is_pinned(image)).collect();
    assert!(moving.is_empty(), "{moving:?}: name an exact version or a digest");
    // What the frontend is could not be seen above.
    assert!(!dockerfile.contains("# syntax="), "an image of its own, which moves");
    for moving in ["postgres:17", "rabbitmq:4.1-management", "rust:1-slim", "rust", "a@sha256:1"] {
        assert!(!is_pinned(moving), "{moving}");
    }
}

#[test]
fn ci_gets_no_more_rights_than_it_needs() {
    let text = read(".github/workflows/ci.yml");
    assert!(!text.contains("privileged"), "a privileged container is root on its host");
}

#[test]
fn no_dependency_asks_for_a_newer_rust_than_is_promised() {
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".into());
    // For this platform only: the build has fetched no crates of others.
    let rustc = Command::new("rustc").arg("-vV").output().expect("rustc starts").stdout;
    let rustc = String::from_utf8(rustc).expect("it prints text");
    let host = rustc.lines().find_map(|line| line.strip_prefix("host: ")).expect("its platform");
    let mut command = Command::new(cargo);
    command
        .args(["metadata", "--locked", "--offline", "--format-version", "1"])
        .args(["--filter-platform", host])
        .current_dir(root());
    let output = command.output().expect("cargo starts");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: Value = serde_json::from_slice(&output.stdout).expect("it prints JSON");
    let packages = metadata["packages"].as_array().expect("packages");
    let version = |package: &Value| {
        let text = package["rust_version"].as_str().unwrap_or("0").to_owned();
        let mut numbers = text.split('.').map(|part| part.parse::<u32>().expect("a number"));
        [(); 3].map(|()| numbers.next().unwrap_or(0))
    };
    let ours = packages.iter().find(|package| package["name"] == "watership").expect("ours");
    let promised = version(ours);
    let newer: Vec<_> = packages.iter().filter(|package| version(package) > promised).collect();
    let names: Vec<_> = newer.iter().map(|package| &package["name"]).collect();
    assert!(names.is_empty(), "{names:?} ask for more than {promised:?}");
    assert!(packages.len() > 100, "all of them were looked at");
}
