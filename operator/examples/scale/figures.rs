//! What is measured, and its goals.

use std::time::{Duration, Instant};

use tulle_operator::discovery::Acknowledgement;

use crate::clients::now_millis;
use crate::{Operator, telemetry, world};

/// A figure beside its goal.
pub struct Figure {
    name: &'static str,
    value: f64,
    goal: Option<f64>,
    unit: &'static str,
}

fn figure(name: &'static str, value: f64, goal: f64, unit: &'static str) -> Figure {
    Figure { name, value, goal: Some(goal), unit }
}

/// Measures everything.
pub fn all(operator: &mut Operator) -> Vec<Figure> {
    operator.clients.ask("connect");
    pause(3);
    let mut figures = vec![figure("CPU at rest", at_rest(), 2.0, "% of a core")];
    figures.push(figure("CPU of one pod event, 20 clients", pod_event(operator), 5.0, "ms"));
    figures.extend(policy_changes(operator));
    figures.extend(restart(operator));
    pause(2);
    let again = operator.clients.ask("connect");
    figures.push(figure("all streams reconnect at once", again, 20.0, "s"));
    pause(2);
    figures.extend(acknowledgement(operator));
    // Last: what was needed meanwhile counts.
    figures.push(figure("memory of the operator", memory(), 200.0, "MB"));
    figures.extend(reported());
    figures
}

/// Ten thousand sidecars report what they count, on top of everything else.
fn reported() -> Vec<Figure> {
    let measured = telemetry::measure(cpu);
    // What was freed is given back after a second.
    pause(3);
    let memory = memory();
    let share = measured.cpu.as_secs_f64() / measured.time.as_secs_f64() * 100.0;
    let rate = measured.bytes as f64 / measured.time.as_secs_f64() / 1e6;
    let series = measured.bytes_of_a_series / 1000.0;
    drop(measured);
    vec![
        figure("telemetry of 10,000 sidecars × 10 series", share, 100.0, "% of a core"),
        Figure { name: "  that they send", value: rate, goal: None, unit: "MB/s" },
        Figure { name: "  six hours of a series of 20 pods", value: series, goal: None, unit: "kB" },
        figure("  memory of the operator with all of it", memory, 300.0, "MB"),
    ]
}

/// Prints the table. Returns whether a goal was missed by more than half.
pub fn print(figures: &[Figure]) -> bool {
    println!("| {:<44} | {:>20} | {:>10} | {:<6} |", "figure", "value", "goal", "");
    println!("|{:-<46}|{:-<22}|{:-<12}|{:-<8}|", "", "", "", "");
    for figure in figures {
        let value = format!("{:.2} {}", figure.value, figure.unit);
        let goal = figure.goal.map_or_else(String::new, |goal| format!("≤ {goal}"));
        let verdict = match figure.goal {
            Some(goal) if figure.value > goal => "missed",
            Some(_) => "ok",
            None => "",
        };
        println!("| {:<44} | {value:>20} | {goal:>10} | {verdict:<6} |", figure.name);
    }
    figures.iter().any(|figure| figure.goal.is_some_and(|goal| figure.value > goal * 1.5))
}

fn at_rest() -> f64 {
    let before = cpu();
    pause(10);
    (cpu() - before).as_secs_f64() / 10.0 * 100.0
}

/// A pod of a Service becomes ready or ceases to be.
fn pod_event(operator: &Operator) -> f64 {
    const EVENTS: u32 = 200;
    let before = cpu();
    for event in 0..EVENTS {
        // Services without a Canary; each once.
        let service = world::CANARIES + event;
        let slice = world::slice(service, Some(service * (world::PODS / world::SERVICES)));
        operator.hub.change(|model| model.apply_slice(world::key(&world::service_name(service)), slice));
        std::thread::sleep(Duration::from_millis(10));
    }
    pause(1);
    per(cpu() - before, EVENTS)
}

/// Rules of a policy change.
fn policy_changes(operator: &Operator) -> Vec<Figure> {
    let first_service = world::MANY / (world::PODS / world::SERVICES) + 1;
    let few = world::service_name(first_service);
    let few = change_policy(operator, "few-1", ("app", &few), 100);
    let many = change_policy(operator, "many", ("tier", "many"), 10);
    let per_pod = (many / f64::from(world::MANY)) / (few / f64::from(world::FEW)).max(0.001);
    vec![
        Figure { name: "CPU of a policy change, 10 pods", value: few, goal: None, unit: "ms" },
        Figure { name: "CPU of a policy change, 1,000 pods", value: many, goal: None, unit: "ms" },
        figure("  per pod, 1,000 pods ÷ 10 pods", per_pod, 2.0, ""),
    ]
}

fn change_policy(operator: &Operator, name: &str, label: (&str, &str), times: u32) -> f64 {
    let before = cpu();
    for generation in 2..times + 2 {
        let policy = world::policy(name, label, generation);
        operator.hub.change(|model| model.apply_policy(world::key(name), policy));
        std::thread::sleep(Duration::from_millis(if times > 50 { 20 } else { 500 }));
    }
    pause(1);
    per(cpu() - before, times)
}

/// A thousand pods are restarted, 50 events per second.
fn restart(operator: &mut Operator) -> Vec<Figure> {
    const EVENTS: u32 = 1_000;
    operator.clients.ask("worst");
    let (before, started) = (cpu(), Instant::now());
    for event in 0..EVENTS {
        // Spread over the Services, so that every client has something to be told.
        let pod = event * (world::PODS / EVENTS);
        let revision = now_millis().to_string();
        operator.hub.change(|model| model.apply_pod(world::pod(pod, &revision)));
        let due = Duration::from_millis(20) * (event + 1);
        std::thread::sleep(due.saturating_sub(started.elapsed()));
    }
    let used = (cpu() - before).as_secs_f64() / started.elapsed().as_secs_f64();
    pause(2);
    let worst = operator.clients.ask("worst");
    // Nothing arrived at all: everybody is starved.
    let worst = if worst == 0.0 { f64::INFINITY } else { worst };
    vec![
        figure("restart of 1,000 pods at 50/s", used, 1.0, "cores"),
        figure("  longest wait of a client for a change", worst, 5.0, "s"),
    ]
}

/// From a change of shares until the tracker has the last of 20 acknowledgements.
fn acknowledgement(operator: &Operator) -> Vec<Figure> {
    let mut times: Vec<f64> = (0..world::CANARIES).map(|service| acknowledged(operator, service)).collect();
    times.sort_by(f64::total_cmp);
    let quantile = |share: f64| {
        let index = (times.len() as f64 * share) as usize;
        times.get(index.min(times.len().saturating_sub(1))).copied().unwrap_or(f64::INFINITY)
    };
    vec![
        figure("change → last acknowledgement, p50", quantile(0.5), 100.0, "ms"),
        figure("change → last acknowledgement, p99", quantile(0.99), 100.0, "ms"),
    ]
}

fn acknowledged(operator: &Operator, service: u32) -> f64 {
    const EPOCH: u64 = 2;
    let canary = world::key(&world::service_name(service));
    let started = Instant::now();
    operator.hub.change(|model| model.apply_canary(canary.clone(), world::canary(service, EPOCH)));
    while started.elapsed() < Duration::from_secs(2) {
        let acknowledged = operator.acks.acknowledged_canary(&operator.hub.model(), &canary, EPOCH);
        if acknowledged == Acknowledgement::Complete {
            return started.elapsed().as_secs_f64() * 1000.0;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    f64::INFINITY
}

fn per(cpu: Duration, times: u32) -> f64 {
    cpu.as_secs_f64() * 1000.0 / f64::from(times)
}

fn pause(seconds: u64) {
    std::thread::sleep(Duration::from_secs(seconds));
}

/// Time on a core, of all threads of this process. None of them ends while something is measured.
fn cpu() -> Duration {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap().filter_map(Result::ok);
    let nanoseconds = tasks.filter_map(|task| {
        let text = std::fs::read_to_string(task.path().join("schedstat")).ok()?;
        text.split_whitespace().next()?.parse::<u64>().ok()
    });
    Duration::from_nanos(nanoseconds.sum())
}

/// Resident memory in megabytes.
fn memory() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.split_whitespace().next().and_then(|kilobytes| kilobytes.parse::<f64>().ok()).unwrap() / 1024.0
}
