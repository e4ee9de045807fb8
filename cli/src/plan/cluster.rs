//! The cluster file: hosts, and the places on them where something can compute.

use crate::recipe::{RecipeError, Source, typed};
use serde::Deserialize;
use std::path::Path;
use toml::Value;

const GIB: f64 = (1u64 << 30) as f64;
/// Most places of a cluster; beyond it the search would not end soon.
const MAX_PLACES: usize = 1024;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawHost {
    name: Option<String>,
    #[serde(default = "one")]
    count: usize,
    cores: usize,
    #[serde(default = "unity")]
    core_speed: f64,
    memory_gib: f64,
    #[serde(default = "ten")]
    network_gbit_per_second: f64,
    #[serde(default = "hundred")]
    network_latency_us: f64,
    device: Option<RawDevice>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawDevice {
    name: Option<String>,
    #[serde(default = "one")]
    count: usize,
    memory_gib: f64,
    tflops: f64,
    memory_gb_per_second: f64,
    link_gb_per_second: f64,
}

fn one() -> usize {
    1
}

fn unity() -> f64 {
    1.0
}

fn ten() -> f64 {
    10.0
}

fn hundred() -> f64 {
    100.0
}

/// A machine.
#[derive(Debug, Clone, PartialEq)]
pub struct Host {
    /// Its name; numbered where an entry has several.
    pub name: String,
    /// Cores.
    pub cores: usize,
    /// Speed of a core, as a multiple of one of the machine that was measured.
    pub core_speed: f64,
    /// Bytes of memory.
    pub memory_bytes: u64,
    /// Bytes in a second to other hosts.
    pub network_bytes_per_second: f64,
    /// Seconds of a message to another host.
    pub network_latency_seconds: f64,
}

/// An accelerator, which exists on paper: this binary computes on CPUs.
#[derive(Debug, Clone, PartialEq)]
pub struct Device {
    /// Its name.
    pub name: String,
    /// Bytes of its memory.
    pub memory_bytes: u64,
    /// Floating-point operations in a second that matrix products reach on it.
    pub flops: f64,
    /// Bytes in a second from its memory.
    pub memory_bytes_per_second: f64,
    /// Bytes in a second to another device of its host.
    pub link_bytes_per_second: f64,
}

/// Where something computes: the cores of a host together, or one of its devices.
#[derive(Debug, Clone, PartialEq)]
pub struct Place {
    /// Index of its host.
    pub host: usize,
    /// The device; `None`: the cores.
    pub device: Option<Device>,
}

/// A cluster, checked.
#[derive(Debug, Clone, PartialEq)]
pub struct Cluster {
    /// Where the description comes from.
    pub name: String,
    /// Hosts in the order of the file.
    pub hosts: Vec<Host>,
    /// Places in the order of the hosts. A host with devices computes on them alone.
    pub places: Vec<Place>,
}

impl Cluster {
    /// One host with this machine's cores and memory.
    pub fn this_machine(cores: usize, memory_bytes: u64) -> Self {
        let host = Host {
            name: "this machine".to_owned(),
            cores,
            core_speed: 1.0,
            memory_bytes,
            network_bytes_per_second: f64::INFINITY,
            network_latency_seconds: 0.0,
        };
        Cluster { name: "this machine".to_owned(), hosts: vec![host], places: vec![Place { host: 0, device: None }] }
    }

    /// Read a cluster file.
    ///
    /// # Errors
    /// A file that cannot be read, an unknown or missing key, or a value out of range: by file, line and key.
    pub fn read(path: &Path) -> Result<Self, RecipeError> {
        let source = Source::read(path, &[])?;
        let known = ["host"];
        if let Some(key) = source.table.keys().find(|key| !known.contains(&key.as_str())) {
            return Err(source.error(key, "unknown key: expected [[host]] tables alone"));
        }
        let hosts = match source.table.get("host") {
            Some(Value::Array(hosts)) if !hosts.is_empty() => hosts.clone(),
            Some(_) => return Err(source.error("host", "is no list of tables: expected [[host]], in double brackets")),
            None => return Err(source.error("host", "there is no host: expected at least one [[host]] table")),
        };
        let typed_host = |(index, value)| typed::<RawHost>(&source, &format!("host.{index}"), value);
        let raw = hosts.into_iter().enumerate().map(typed_host).collect::<Result<Vec<_>, _>>()?;
        let mut cluster = Cluster { name: path.display().to_string(), hosts: Vec::new(), places: Vec::new() };
        for (index, host) in raw.iter().enumerate() {
            check_host(&source, &format!("host.{index}"), host)?;
            cluster.add(index, host);
            if cluster.places.len() > MAX_PLACES {
                let problem = format!("the cluster has more than {MAX_PLACES} places: expected fewer hosts or devices");
                return Err(source.error(&format!("host.{index}.count"), problem));
            }
        }
        Ok(cluster)
    }

    fn add(&mut self, index: usize, raw: &RawHost) {
        let base = raw.name.clone().unwrap_or_else(|| format!("host{index}"));
        for number in 0..raw.count {
            let name = if raw.count == 1 { base.clone() } else { format!("{base}-{number}") };
            let host = self.hosts.len();
            self.hosts.push(Host {
                name,
                cores: raw.cores,
                core_speed: raw.core_speed,
                memory_bytes: (raw.memory_gib * GIB) as u64,
                network_bytes_per_second: raw.network_gbit_per_second * 1e9 / 8.0,
                network_latency_seconds: raw.network_latency_us * 1e-6,
            });
            match &raw.device {
                None => self.places.push(Place { host, device: None }),
                Some(device) => {
                    let place = Place { host, device: Some(self::device(device)) };
                    self.places.extend(std::iter::repeat_n(place, device.count));
                }
            }
        }
    }

    /// Whether two hosts take part.
    pub fn has_network(&self) -> bool {
        self.hosts.len() > 1
    }
}

fn device(raw: &RawDevice) -> Device {
    Device {
        name: raw.name.clone().unwrap_or_else(|| "device".to_owned()),
        memory_bytes: (raw.memory_gib * GIB) as u64,
        flops: raw.tflops * 1e12,
        memory_bytes_per_second: raw.memory_gb_per_second * 1e9,
        link_bytes_per_second: raw.link_gb_per_second * 1e9,
    }
}

fn check_host(source: &Source, key: &str, host: &RawHost) -> Result<(), RecipeError> {
    let at_least_one = |name: &str, value: usize| match value {
        1..=65536 => Ok(()),
        _ => Err(source.error(&format!("{key}.{name}"), format!("{value} is out of range: expected 1 to 65536"))),
    };
    let positive = |name: &str, value: f64| match value > 0.0 && value <= 1e12 {
        true => Ok(()),
        false => Err(source.error(&format!("{key}.{name}"), format!("{value} is out of range: expected more than 0"))),
    };
    at_least_one("count", host.count)?;
    at_least_one("cores", host.cores)?;
    positive("core_speed", host.core_speed)?;
    positive("memory_gib", host.memory_gib)?;
    positive("network_gbit_per_second", host.network_gbit_per_second)?;
    let latency = host.network_latency_us;
    if !(0.0..=1e9).contains(&latency) {
        let problem = format!("{latency} is out of range: expected 0 or more");
        return Err(source.error(&format!("{key}.network_latency_us"), problem));
    }
    let Some(device) = &host.device else { return Ok(()) };
    at_least_one("device.count", device.count)?;
    positive("device.memory_gib", device.memory_gib)?;
    positive("device.tflops", device.tflops)?;
    positive("device.memory_gb_per_second", device.memory_gb_per_second)?;
    positive("device.link_gb_per_second", device.link_gb_per_second)
}
