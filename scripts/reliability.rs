//! Writes docs/reliability.md to standard output, from what the fault tests reported.
//!
//! `reliability RESULTS LOG...`: RESULTS is the file that WATERSHIP_FAULT_RESULTS named, each LOG
//! the output of a test run, in which the tests of other binaries are looked up.
//! `scripts/reliability` calls it.

use std::collections::BTreeMap;
use std::process::ExitCode;

use serde_json::Value;

/// What is known of one class.
#[derive(Default)]
struct Class {
    title: String,
    tests: Vec<String>,
    not_run: String,
    runs: u64,
    survived: u64,
    recoveries: Vec<u64>,
    events: u64,
    lost: u64,
    violations: u64,
    faults: u64,
    /// Most duplicates of one fault, and what one fault of that run may bring.
    duplicates: u64,
    bound: u64,
    crash_points: u64,
}

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    let Some(results) = arguments.next() else {
        eprintln!("usage: reliability RESULTS LOG...");
        return ExitCode::from(2);
    };
    let logs: Vec<String> = arguments.map(|path| read(&path)).collect();
    let lines = read(&results);
    let lines: Vec<Value> = lines.lines().filter_map(|l| serde_json::from_str(l).ok()).collect();
    let mut classes: BTreeMap<(char, u32), Class> = BTreeMap::new();
    for line in &lines {
        let id = line["listed"].as_str().or(line["class"].as_str()).unwrap_or_default();
        let Some(key) = key(id) else { continue };
        note(classes.entry(key).or_default(), line);
    }
    for class in classes.values_mut() {
        look_up(class, &logs);
    }
    print(&classes, &lines);
    ExitCode::SUCCESS
}

fn read(path: &str) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|e| panic!("{path}: {e}"))
}

fn key(id: &str) -> Option<(char, u32)> {
    let group = id.chars().next()?;
    Some((group, id.get(1..)?.parse().ok()?))
}

fn number(line: &Value, name: &str) -> u64 {
    line[name].as_u64().unwrap_or(0)
}

fn note(class: &mut Class, line: &Value) {
    if let Some(title) = line["title"].as_str() {
        class.title = title.into();
        let tests = line["tests"].as_array().into_iter().flatten();
        class.tests = tests.filter_map(Value::as_str).map(str::to_owned).collect();
    }
    if let Some(reason) = line["not_run"].as_str() {
        class.not_run = reason.into();
    }
    if line["class"].is_null() {
        return;
    }
    class.runs += 1;
    class.survived += u64::from(line["ok"] == true);
    let recoveries = line["recovery_ms"].as_array().into_iter().flatten();
    class.recoveries.extend(recoveries.filter_map(Value::as_u64));
    class.events += number(line, "events");
    class.lost += number(line, "lost");
    class.violations += number(line, "order_violations");
    let faults = number(line, "faults_injected");
    class.faults += faults;
    let most = number(line, "most_duplicates");
    if most >= class.duplicates {
        class.duplicates = most;
        class.bound = number(line, "duplicate_bound").checked_div(faults).unwrap_or(0);
    }
    class.crash_points += number(&line["more"], "crash_points");
}

/// Counts the runs of tests that stand in other binaries and write no results.
fn look_up(class: &mut Class, logs: &[String]) {
    for test in &class.tests {
        let Some((_, name)) = test.split_once(' ') else { continue };
        for line in logs.iter().flat_map(|log| log.lines()) {
            let Some((found, how)) = line.strip_prefix("test ").and_then(|l| l.split_once(" ... "))
            else {
                continue;
            };
            if found == name {
                class.runs += 1;
                class.survived += u64::from(how == "ok");
                class.faults += 1;
            }
        }
    }
}

fn print(classes: &BTreeMap<(char, u32), Class>, lines: &[Value]) {
    let museum = |key: &(char, u32)| key.0 == 'M';
    let (shown, faults): (Vec<_>, Vec<_>) = classes.iter().partition(|(key, _)| museum(key));
    let tested = |list: &[(&(char, u32), &Class)]| list.iter().filter(|c| c.1.runs > 0).count();
    let run: Vec<&Class> = faults.iter().map(|c| c.1).filter(|class| class.runs > 0).collect();
    let sum = |of: fn(&Class) -> u64| run.iter().map(|class| of(class)).sum::<u64>();
    let soaks: Vec<&Value> = lines.iter().filter(|line| line["class"] == "soak").collect();
    let soaked = |name: &str| soaks.iter().map(|line| number(line, name)).sum::<u64>();
    let survived = run.iter().filter(|class| class.survived == class.runs).count();
    println!("{HEAD}");
    for note in lines.iter().filter_map(|line| line["note"].as_str()) {
        println!("{note}\n");
    }
    println!("| what | figure |\n|---|---|");
    let listed = faults.len();
    println!("| fault classes with a test, of those in the model | {} of {listed} |", run.len());
    println!("| … of which every run passed | {survived} |");
    println!("| faults injected | {} |", sum(|c| c.faults) + soaked("faults_injected"));
    println!("| events checked | {} |", sum(|c| c.events) + soaked("events"));
    let failed = lines.iter().filter(|line| line["ok"] == false).count();
    println!(
        "| runs that failed, listed below; their losses and violations are not known | {failed} |"
    );
    println!("| events lost in the others | {} |", sum(|c| c.lost) + soaked("lost"));
    let violations = sum(|c| c.violations) + soaked("order_violations");
    println!("| order violations in the others | {violations} |");
    println!(
        "| crash points: messages at which the relay is killed | {} |",
        sum(|c| c.crash_points)
    );
    println!(
        "| bugs of other relays with a regression test | {} of {} |",
        tested(&shown),
        shown.len()
    );
    if let Some(planted) = lines.iter().find(|line| !line["planted"].is_null()) {
        println!("| planted bugs found | {} of {} |", planted["planted"], planted["of"]);
    }
    println!("\n## Soak\n");
    for soak in &soaks {
        let more = &soak["more"];
        println!(
            "- {} s at {} events a second, seed {}: {} events, {} faults, lost {}, order \
             violations {}, most duplicates of a fault {}, slowest recovery {} ms, memory at most \
             {} KiB, growing by {} KiB in ten minutes: {}",
            more["seconds"],
            more["rate"],
            more["seed"],
            soak["events"],
            soak["faults_injected"],
            soak["lost"],
            soak["order_violations"],
            more["most_duplicates"],
            more["slowest_ms"],
            more["memory_peak_kib"],
            more["memory_grown_kib"],
            if soak["ok"] == true { "held" } else { "FAILED" },
        );
    }
    let failed: Vec<&Value> = lines.iter().filter(|line| line["ok"] == false).collect();
    if !failed.is_empty() {
        println!("\n## Runs that failed\n");
    }
    for line in failed {
        let test = line["test"].as_str().unwrap_or_default();
        println!("- {}: `{test}`", line["class"].as_str().unwrap_or_default());
    }
    table(classes);
}

fn table(classes: &BTreeMap<(char, u32), Class>) {
    println!("\n## Classes\n\n{COLUMNS}");
    for ((group, number), class) in classes.iter().filter(|(_, class)| class.runs > 0) {
        let mut times = class.recoveries.clone();
        times.sort_unstable();
        let time = |at: usize| times.get(at).map_or("–".into(), u64::to_string);
        let (p50, max) = (time(times.len() / 2), time(times.len().saturating_sub(1)));
        let duplicates = match class.bound {
            0 => "–".to_owned(),
            bound => format!("{} / {bound}", class.duplicates),
        };
        println!(
            "| {group}{number} | {} | {}/{} | {p50} | {max} | {} | {} | {} | {duplicates} |",
            class.title, class.survived, class.runs, class.events, class.lost, class.violations
        );
    }
    println!("\n## Not run\n\n| class | why |\n|---|---|");
    for ((group, number), class) in classes.iter().filter(|(_, class)| class.runs == 0) {
        let reason = match &*class.not_run {
            "" => "its test was not among these runs",
            reason => reason,
        };
        println!("| {group}{number} | {reason} |");
    }
}

const HEAD: &str = "# Reliability\n\n\
Written by `scripts/reliability` from the results of the fault tests (`./check --full` runs all of \
them and calls it); do not edit by hand. Failed runs are listed, not left out.\n\n\
Each test runs the real binary between real servers, under load, with writers that commit and roll \
back, and compares what a consumer received with what the database holds at the end. *Lost*: \
committed and never arrived. *Order violation*: an event arrived for the first time after a later \
event of its key had. *Recovery*: from the end of the fault (if a server was down: from its first \
answer to another client) to the relay's next confirm, with debug builds on a machine that runs \
several such tests at once. *Duplicates*: the most that one fault caused, and the bound \
for a machine that stores its checkpoints in time. Recoveries and duplicates are figures of these \
runs: a slow machine makes them worse, and no test fails because of them.\n";

const COLUMNS: &str = "\
| class | what goes wrong | runs passed | recovery p50 ms | max ms | events | lost | order | \
duplicates / bound |\n|---|---|---|---|---|---|---|---|---|";
