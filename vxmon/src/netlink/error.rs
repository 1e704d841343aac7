//! What can go wrong between vxmon and the kernel over netlink. An error names the request in words.

use std::io;

use nix::errno::Errno;

/// A netlink request that failed, or could not be made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The socket could not be opened or set up.
    #[error("cannot open a {protocol} netlink socket: {source}")]
    Open {
        /// `route` or `netfilter`.
        protocol: &'static str,
        /// What the system call said.
        source: io::Error,
    },
    /// The request could not be sent, or its answer not be received.
    #[error("cannot {request}: {source}")]
    Transfer {
        /// The request as an infinitive: "list links".
        request: String,
        /// What the system call said.
        source: io::Error,
    },
    /// The kernel answered with an error.
    #[error("cannot {request}: {}{}", errno.desc(), detail.as_deref().map(|text| format!(" ({text})")).unwrap_or_default())]
    Refused {
        /// The request as an infinitive: "list links".
        request: String,
        /// The kernel's answer.
        errno: Errno,
        /// The kernel's own words (`NLMSGERR_ATTR_MSG`, since 4.12), when it gave any.
        detail: Option<String>,
    },
    /// No answer came in time.
    #[error("cannot {request}: the kernel did not answer in {seconds} s")]
    Timeout {
        /// The request as an infinitive: "list links".
        request: String,
        /// How long was waited.
        seconds: u64,
    },
    /// The answer breaks netlink's own framing.
    #[error("cannot {request}: malformed answer: {detail}")]
    Malformed {
        /// The request as an infinitive: "list links".
        request: String,
        /// What is wrong with it.
        detail: String,
    },
    /// What was asked for changed each time before all of it was there.
    #[error("cannot {request}: it changed during each of {attempts} attempts")]
    Unsteady {
        /// The request as an infinitive: "list links".
        request: String,
        /// How often it was tried.
        attempts: u32,
    },
}

impl Error {
    /// The error number that the kernel answered with, if it did answer.
    pub fn errno(&self) -> Option<Errno> {
        match self {
            Self::Refused { errno, .. } => Some(*errno),
            Self::Open { source, .. } | Self::Transfer { source, .. } => source.raw_os_error().map(Errno::from_raw),
            Self::Timeout { .. } | Self::Malformed { .. } | Self::Unsteady { .. } => None,
        }
    }

    /// The kernel lacks what was asked about: an address family, a subsystem or a message type that is not built in.
    pub(super) fn is_unsupported(&self) -> bool {
        matches!(self.errno(), Some(Errno::EOPNOTSUPP | Errno::EAFNOSUPPORT | Errno::EPROTONOSUPPORT))
    }
}
