//! The process table, and killing all that stands below a process.

use rustix::process::{Pid, Signal, WaitOptions, WaitStatus};
use std::collections::{BTreeMap, BTreeSet};
use std::io::Read;
use std::time::{Duration, Instant};

/// Pause between two rounds of killing, for the kernel to take the dead apart.
const ROUND: Duration = Duration::from_millis(1);

/// One line of the process table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Process {
    pub(crate) pid: i32,
    parent: i32,
    group: i32,
    /// Dead, but not yet waited for.
    is_zombie: bool,
    num_threads: u64,
    /// CPU time of the process itself.
    own_ticks: u64,
    /// CPU time of children that it has waited for.
    reaped_ticks: u64,
    resident_pages: u64,
}

/// What a tree of processes uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Usage {
    /// Processes that are not dead.
    pub(crate) num_processes: u64,
    /// CPU time of the tree, that of its reaped processes included.
    pub(crate) cpu_ticks: u64,
    /// Resident memory, shared pages counted by each.
    pub(crate) resident_pages: u64,
}

/// All processes that can be seen.
pub(crate) fn table() -> Vec<Process> {
    let Ok(entries) = std::fs::read_dir("/proc") else { return Vec::new() };
    let pid = |entry: std::io::Result<std::fs::DirEntry>| entry.ok()?.file_name().to_str()?.parse::<i32>().ok();
    entries.filter_map(pid).filter_map(|pid| parse(&read_short(&format!("/proc/{pid}/stat"))?)).collect()
}

/// A file of the kernel that one read gives whole.
fn read_short(path: &str) -> Option<String> {
    let mut buffer = [0; 1024];
    let len = std::fs::File::open(path).ok()?.read(&mut buffer).ok()?;
    Some(String::from_utf8_lossy(&buffer[..len]).into_owned())
}

fn parse(stat: &str) -> Option<Process> {
    let pid = stat.split(' ').next()?.parse().ok()?;
    // The name in brackets may itself hold brackets and spaces.
    let rest: Vec<&str> = stat[stat.rfind(')')? + 1..].split_ascii_whitespace().collect();
    let number = |index: usize| rest.get(index)?.parse::<u64>().ok();
    Some(Process {
        pid,
        parent: rest.get(1)?.parse().ok()?,
        group: rest.get(2)?.parse().ok()?,
        is_zombie: matches!(*rest.first()?, "Z" | "X"),
        own_ticks: number(11)? + number(12)?,
        reaped_ticks: number(13)? + number(14)?,
        num_threads: number(17)?,
        resident_pages: number(21)?,
    })
}

/// Everything below `root`, itself left out.
fn below(root: i32, table: &[Process]) -> Vec<Process> {
    let mut children: BTreeMap<i32, Vec<&Process>> = BTreeMap::new();
    for process in table {
        children.entry(process.parent).or_default().push(process);
    }
    let (mut found, mut open) = (Vec::new(), vec![root]);
    while let Some(pid) = open.pop() {
        for child in children.remove(&pid).unwrap_or_default() {
            open.push(child.pid);
            found.push(*child);
        }
    }
    found
}

/// What everything below this process uses.
pub(crate) fn usage_below_me() -> Usage {
    let (table, me) = (table(), rustix::process::getpid().as_raw_pid());
    let mut usage = Usage::default();
    for process in below(me, &table) {
        usage.num_processes += u64::from(!process.is_zombie);
        usage.cpu_ticks += process.own_ticks + process.reaped_ticks;
        usage.resident_pages += process.resident_pages;
    }
    usage.cpu_ticks += table.iter().find(|process| process.pid == me).map_or(0, |process| process.reaped_ticks);
    usage
}

/// Threads of all processes that `user` runs.
pub(crate) fn num_tasks_of(user: u32) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let owner = |process: &Process| std::fs::metadata(format!("/proc/{}", process.pid)).map(|m| m.uid()).ok();
    table().iter().filter(|process| owner(process) == Some(user)).map(|process| process.num_threads).sum()
}

/// Threads of the whole system: one short file, where the table is one file per process.
pub(crate) fn num_tasks() -> u64 {
    let text = read_short("/proc/loadavg").unwrap_or_default();
    let tasks = text.split(' ').nth(3).and_then(|field| field.split_once('/'));
    tasks.and_then(|(_, all)| all.parse().ok()).unwrap_or(0)
}

/// Wait for every child that has died, without waiting for one that has not.
pub(crate) fn reap() -> Vec<(Pid, WaitStatus)> {
    let mut dead = Vec::new();
    while let Ok(Some(one)) = rustix::process::wait(WaitOptions::NOHANG) {
        dead.push(one);
    }
    dead
}

/// Kill everything below this process, which must be the subreaper of all that it starts, and wait until nothing is
/// left. Gives what was reaped, and the number of processes that were still there at the end of `patience`.
pub(crate) fn kill_below_me(patience: Duration) -> (Vec<(Pid, WaitStatus)>, usize) {
    let (begin, me) = (Instant::now(), rustix::process::getpid().as_raw_pid());
    let mut reaped = Vec::new();
    loop {
        let found = below(me, &table());
        signal_all(&found);
        reaped.extend(reap());
        if found.is_empty() || begin.elapsed() > patience {
            return (reaped, found.len());
        }
        std::thread::sleep(ROUND);
    }
}

/// SIGKILL to all of them. A whole group dies at once, so that none of it can fork while the others are killed.
fn signal_all(processes: &[Process]) {
    let my_group = rustix::process::getpgrp().as_raw_pid();
    let groups: BTreeSet<i32> = processes.iter().map(|p| p.group).filter(|group| *group != my_group).collect();
    for group in groups.into_iter().filter(|group| *group > 1).filter_map(Pid::from_raw) {
        let _gone_already = rustix::process::kill_process_group(group, Signal::KILL);
    }
    for pid in processes.iter().filter(|p| !p.is_zombie).filter_map(|p| Pid::from_raw(p.pid)) {
        let _gone_already = rustix::process::kill_process(pid, Signal::KILL);
    }
}

/// Kill every process that was started with `marker` (`NAME=value`) in its environment, until none is left: what a
/// warden that was itself killed left behind.
pub(crate) fn kill_marked(marker: &str, patience: Duration) {
    let begin = Instant::now();
    loop {
        let marked: Vec<Process> = table().into_iter().filter(|p| !p.is_zombie && is_marked(p.pid, marker)).collect();
        signal_all(&marked);
        if marked.is_empty() || begin.elapsed() > patience {
            return;
        }
        std::thread::sleep(ROUND);
    }
}

fn is_marked(pid: i32, marker: &str) -> bool {
    let environment = std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
    environment.split(|byte| *byte == 0).any(|variable| variable == marker.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_the_table() {
        let stat = "42 (a) b) S 7 40 39 0 -1 4194304 1 2 3 4 10 20 30 40 20 0 5 0 100 1000000 250 18446744073709551615";
        let process = parse(stat).expect("a line of /proc/PID/stat");
        assert_eq!((process.pid, process.parent, process.group, process.is_zombie), (42, 7, 40, false));
        assert_eq!((process.own_ticks, process.reaped_ticks), (30, 70));
        assert_eq!((process.num_threads, process.resident_pages), (5, 250));
        assert_eq!(parse("42 (a"), None);
    }

    #[test]
    fn what_stands_below_is_found_through_all_generations() {
        let one = |pid, parent| Process { pid, parent, ..parse(&format!("{pid} (x) S 0{}", " 0".repeat(30))).unwrap() };
        let table = [one(1, 0), one(2, 1), one(3, 2), one(4, 3), one(5, 1), one(6, 5)];
        let mut found: Vec<i32> = below(2, &table).iter().map(|p| p.pid).collect();
        found.sort_unstable();
        assert_eq!(found, [3, 4]);
        assert_eq!(below(6, &table), []);
    }

    #[test]
    fn this_process_is_in_the_table_and_has_tasks() {
        let me = rustix::process::getpid().as_raw_pid();
        assert!(table().iter().any(|process| process.pid == me));
        assert!(num_tasks() > 0 && num_tasks_of(rustix::process::geteuid().as_raw()) > 0);
    }
}
