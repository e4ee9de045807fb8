//! `temper certs`: certificates for the processes of runs.

use crate::certs::Authority;
use crate::commands::common::output::print;
use crate::usage;
use std::path::PathBuf;

/// Make a CA, and a certificate for each host that it signs: what the processes of a run prove themselves by.
///
/// DIR gets ca.pem and ca-key.pem, and HOST.pem and HOST-key.pem of each host. A CA that is there already is used, so
/// that hosts can be added. Take to a host ca.pem and its own two files; ca-key.pem stays where it is: whoever has it
/// can join. A certificate also holds for the loopback of its host.
#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  temper certs tls 10.0.0.1 10.0.0.2\n  temper train recipe.toml --set placement.mode=processes --set placement.spawn_workers=false \\\n    --set placement.listen=10.0.0.1:7070 --set placement.tls.ca=tls/ca.pem \\\n    --set placement.tls.cert=tls/10.0.0.1.pem --set placement.tls.key=tls/10.0.0.1-key.pem\n  temper serve rollout --join 10.0.0.1:7070 --listen 10.0.0.2:0 \\\n    --tls-ca tls/ca.pem --tls-cert tls/10.0.0.2.pem --tls-key tls/10.0.0.2-key.pem"
)]
pub struct Certs {
    /// Where the files go.
    dir: PathBuf,
    /// Names or addresses of hosts, as others reach them.
    #[arg(value_name = "HOST", required = true)]
    hosts: Vec<String>,
    /// Days that the certificates are valid, that of a new CA included.
    #[arg(long, value_name = "N", default_value_t = 365, value_parser = clap::value_parser!(u32).range(1..=36500))]
    days: u32,
}

impl Certs {
    /// Make what is asked for, and print the files.
    ///
    /// # Errors
    /// No name of a host, a file that is there already or cannot be written.
    pub fn run(self) -> anyhow::Result<()> {
        let authority = Authority::open(&self.dir, self.days).map_err(|error| usage(format!("{error:#}")))?;
        print(&format!("{:<20} {}\n", "CA", authority.ca().display()))?;
        for host in &self.hosts {
            let issued = authority.issue(host)?;
            print(&format!("{:<20} {} {}\n", issued.host, issued.cert.display(), issued.key.display()))?;
        }
        Ok(())
    }
}
