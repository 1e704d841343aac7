//! Reads a device's features, as `ethtool -k` shows them, and switches them, as `ethtool -K` does, by the SIOCETHTOOL ioctl:
//! every kernel has it, and it needs no netlink family. Reading needs no privilege, switching CAP_NET_ADMIN.

use std::{io, os::fd::OwnedFd};

use nix::{
    libc,
    sys::socket::{AddressFamily, SockFlag, SockType, socket},
};

/// Commands and the set of features, include/uapi/linux/ethtool.h.
const ETHTOOL_GSTRINGS: u32 = 0x1b;
const ETHTOOL_GSSET_INFO: u32 = 0x37;
const ETHTOOL_GFEATURES: u32 = 0x3a;
const ETHTOOL_SFEATURES: u32 = 0x3b;
const ETH_SS_FEATURES: u32 = 4;
/// Bytes of a name (ETH_GSTRING_LEN).
const NAME: usize = 32;
/// More features than any kernel has: what a driver or kernel claims beyond is not believed.
const MOST: usize = 1024;

/// Why a feature is not known, or not switched.
#[derive(Debug, thiserror::Error)]
pub enum EthtoolError {
    /// No socket to ask by.
    #[error("cannot open a socket to ask for device features: {0}")]
    Open(io::Error),
    /// The kernel did not answer.
    #[error("cannot {what} of {device}: {source}")]
    Ask {
        /// What was asked, as an infinitive.
        what: &'static str,
        /// Of which device.
        device: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// The device does not let it be switched.
    #[error(
        "{feature} of {device} stays as it is: the device does not let it be switched, or somebody switched it back"
    )]
    Fixed {
        /// The feature, as ethtool names it.
        feature: &'static str,
        /// The device.
        device: String,
    },
    /// A feature that this kernel does not know.
    #[error("this kernel has no device feature {0}")]
    Unknown(&'static str),
}

/// Asks in the network namespace of the thread that opened it.
#[derive(Debug)]
pub struct Features {
    socket: OwnedFd,
    feature: &'static str,
    /// The feature's number, once known; it is the same for all devices.
    number: Option<usize>,
}

impl Features {
    /// For asking about one feature.
    ///
    /// # Errors
    /// If there is no socket to be had.
    pub fn open(feature: &'static str) -> Result<Self, EthtoolError> {
        let socket = socket(AddressFamily::Unix, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)
            .map_err(|error| EthtoolError::Open(error.into()))?;
        Ok(Self { socket, feature, number: None })
    }

    /// Whether the feature is on.
    ///
    /// # Errors
    /// [`EthtoolError::Ask`] with ENODEV if there is no such device; [`EthtoolError::Unknown`] on kernels without the
    /// feature.
    pub fn is_on(&mut self, device: &str) -> Result<bool, EthtoolError> {
        let (number, count) = self.number(device)?;
        let blocks = count.div_ceil(32);
        // struct ethtool_gfeatures: cmd, size, then available, requested, active, never_changed for each block.
        let mut words = vec![0_u32; 2 + 4 * blocks];
        words[..2].copy_from_slice(&[ETHTOOL_GFEATURES, blocks as u32]);
        self.ask(device, &mut words, "read the features")?;
        let active = words.get(2 + 4 * (number / 32) + 2).copied().unwrap_or(0);
        Ok(active >> (number % 32) & 1 != 0)
    }

    /// Switches the feature.
    ///
    /// # Errors
    /// As [`Features::is_on`]; [`EthtoolError::Ask`] with EPERM without CAP_NET_ADMIN in the device's namespace;
    /// [`EthtoolError::Fixed`] if the feature is not, or not fully, switched.
    pub fn switch(&mut self, device: &str, on: bool) -> Result<(), EthtoolError> {
        let (number, count) = self.number(device)?;
        let blocks = count.div_ceil(32);
        let bit = 1 << (number % 32);
        // struct ethtool_sfeatures: cmd, size, then valid and requested for each block.
        let mut words = vec![0_u32; 2 + 2 * blocks];
        words[..2].copy_from_slice(&[ETHTOOL_SFEATURES, blocks as u32]);
        words[2 + 2 * (number / 32)..][..2].copy_from_slice(&[bit, if on { bit } else { 0 }]);
        self.ask(device, &mut words, "switch a feature")?;
        // A fixed feature is no error to the kernel, but a bit of the ioctl's result (ETHTOOL_F_UNSUPPORTED); what counts is
        // what became of it.
        let switched = self.is_on(device)? == on;
        switched.then_some(()).ok_or_else(|| EthtoolError::Fixed { feature: self.feature, device: device.to_owned() })
    }

    /// The feature's number and how many there are.
    fn number(&mut self, device: &str) -> Result<(usize, usize), EthtoolError> {
        // struct ethtool_sset_info: cmd, reserved, a mask of 64 bits, then a word for each bit of it.
        let mut words = [ETHTOOL_GSSET_INFO, 0, 0, 0, 0];
        words[2..4].copy_from_slice(&halves(1 << ETH_SS_FEATURES));
        self.ask(device, &mut words, "count the features")?;
        let count = (words[4] as usize).min(MOST);
        if let Some(number) = self.number {
            return Ok((number, count));
        }
        // struct ethtool_gstrings: cmd, set, number of names, then the names.
        let mut words = vec![0_u32; 3 + count * NAME / size_of::<u32>()];
        words[..3].copy_from_slice(&[ETHTOOL_GSTRINGS, ETH_SS_FEATURES, count as u32]);
        self.ask(device, &mut words, "name the features")?;
        let names: Vec<u8> = words.iter().skip(3).flat_map(|word| word.to_ne_bytes()).collect();
        let number = names
            .chunks(NAME)
            .position(|name| name.split(|byte| *byte == 0).next().is_some_and(|name| name == self.feature.as_bytes()));
        self.number = number;
        number.map(|number| (number, count)).ok_or(EthtoolError::Unknown(self.feature))
    }

    fn ask(&self, device: &str, words: &mut [u32], what: &'static str) -> Result<(), EthtoolError> {
        let failed = |source| EthtoolError::Ask { what, device: device.to_owned(), source };
        ioctl(&self.socket, device, words).map_err(failed)
    }
}

/// A 64-bit word as the two of 32 bits that lie in its place.
fn halves(word: u64) -> [u32; 2] {
    let bytes = word.to_ne_bytes();
    [[0, 1, 2, 3], [4, 5, 6, 7]].map(|half| u32::from_ne_bytes(half.map(|index: usize| bytes[index])))
}

/// One SIOCETHTOOL with `words` as its command, in and out.
fn ioctl(socket: &OwnedFd, device: &str, words: &mut [u32]) -> io::Result<()> {
    use std::os::fd::AsRawFd as _;
    // SAFETY: a structure of integers, arrays and unions of them, for which zeros are a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if device.len() >= request.ifr_name.len() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (to, from) in request.ifr_name.iter_mut().zip(device.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_data = words.as_mut_ptr().cast();
    // SAFETY: the request is a whole ifreq. The kernel reads and writes as much behind `ifru_data` as the command and the
    // counts in it say (net/ethtool/ioctl.c), and `words` was made that long; both outlive the call.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCETHTOOL, &raw mut request) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_has_features() {
        // Of loopback, both are fixed: gen_lo_setup(), drivers/net/loopback.c.
        assert!(Features::open("tx-checksum-ip-generic").unwrap().is_on("lo").unwrap());
        assert!(!Features::open("rx-vlan-filter").unwrap().is_on("lo").unwrap());
    }

    #[test]
    fn what_is_fixed_is_not_switched() {
        let mut features = Features::open("tx-checksum-ip-generic").unwrap();
        let error = features.switch("lo", false).unwrap_err();
        // Without the privilege it does not come so far.
        let refused =
            matches!(&error, EthtoolError::Ask { source, .. } if source.kind() == io::ErrorKind::PermissionDenied);
        assert!(refused || matches!(error, EthtoolError::Fixed { .. }), "{error}");
        assert!(features.is_on("lo").unwrap());
    }

    #[test]
    fn what_is_not_there_is_said() {
        let unknown = Features::open("no-such-feature").unwrap().is_on("lo");
        assert!(matches!(unknown, Err(EthtoolError::Unknown("no-such-feature"))), "{unknown:?}");
        for device in ["nosuchdevice0", "a name that is too long for a device"] {
            let error = Features::open("rx-vlan-filter").unwrap().is_on(device);
            assert!(matches!(error, Err(EthtoolError::Ask { .. })), "{error:?}");
        }
    }
}
