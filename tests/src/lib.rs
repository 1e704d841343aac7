//! The lab: two "nodes" as network namespaces, a VXLAN between them, kube-proxy's rules, traffic, and what watches it.
//!
//! It is used by the privileged tests in `tests/tests`, and by `cargo xtask demo` and `bench`. It never depends on the
//! `vxmon` crate: the daemon is started as a process, from its binary. Everything needs root.
//!
//! # Layout
//! - [`netns`]: a namespace that is deleted when dropped; [`Netns::command`] runs a program in it, [`Netns::enter`] a
//!   closure.
//! - [`cleanup`]: what is left to do when the process is interrupted.
//! - [`lab`]: the two nodes and how they are wired. [`topology`]: devices stacked on the wire. [`rules`]: the NAT rules of node a.
//! - [`ipvs`]: a service as kube-proxy's ipvs mode makes it.
//! - [`traffic`]: HTTP, bulk TCP, UDP, ICMP echo, iperf3, and frames sent as they are.
//! - [`capture`]: tcpdump's verdict on checksums, pcap files. [`counters`]: conntrack entries, `UdpInCsumErrors`, and big
//!   packets at TC egress.
//! - [`vxmon`]: a running `vxmon attach`.
//! - [`container`]: vxmon's image, run by runc.
//! - [`skip`]: how a test says that it cannot run here. [`pace`]: limits on slow machines. [`facts`]: what goes into the table
//!   of kernels.
//! - [`scratch`]: a file for one test.
//! - [`cmd`]: programs run to their end, with errors that say which one failed and why.
//!
//! # Use
//! ```no_run
//! # use std::time::Duration;
//! # use vxmon_tests::{Capture, Family, LabOptions, Rules, traffic};
//! # fn main() -> anyhow::Result<()> {
//! let lab = LabOptions { underlay: Family::V6, ..LabOptions::default() }.build()?;
//! lab.rules(&Rules::default())?;
//! let _server = traffic::HttpServer::start(&lab.b, lab.pod_socket(Family::V4))?;
//! let capture = Capture::vxlan(&lab)?;
//! let connect = traffic::http_get(&lab.a, lab.service_socket(Family::V4), Duration::from_secs(5))?;
//! let bad = capture.stop()?.into_iter().filter(|packet| packet.bad).count();
//! # let _ = (connect, bad);
//! # Ok(())
//! # }
//! ```
//! Sockets stay in the namespace they were made in, so servers and clients run in threads of this process. Programs that
//! are started die with the *thread* that started them (`PR_SET_PDEATHSIG`): start them where they are to live.

pub mod capture;
pub mod cleanup;
pub mod cmd;
pub mod container;
pub mod counters;
pub mod facts;
pub mod ipvs;
pub mod lab;
pub mod netns;
pub mod pace;
pub mod rules;
pub mod scratch;
pub mod skip;
pub mod topology;
pub mod traffic;
pub mod vxmon;

pub use capture::{Capture, Captured};
pub use lab::{Family, Lab, LabOptions};
pub use netns::Netns;
pub use rules::{Backend, RuleForm, Rules};
pub use scratch::Scratch;
pub use topology::Topology;
pub use vxmon::Vxmon;
