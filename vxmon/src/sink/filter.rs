//! Which lines a reader wants: the filters of `vxmon tail`, as they cross the socket. Only comparisons; what is to be said
//! to a reader in any case (what it lost, the summary) passes every filter.

use std::{fmt, net::IpAddr, str::FromStr};

use serde::{Deserialize, Serialize};

use crate::event::{Endpoints, Inner, Line, Record};

/// Lines pass that fit one value of each list that is not empty.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Filter {
    /// Verdicts by name.
    pub verdict: Vec<String>,
    /// Devices by name.
    pub dev: Vec<String>,
    /// One end of the packet inside.
    pub inner: Vec<End>,
    /// One end of the outer packet.
    pub outer: Vec<End>,
}

impl Filter {
    /// Whether a line passes.
    #[must_use]
    pub fn passes(&self, line: &Line) -> bool {
        match &line.record {
            Record::Anomaly(anomaly) => {
                let sides = |Endpoints { src, sport, dst, dport }: &Endpoints| {
                    [(src.clone(), Some(*sport)), (dst.clone(), Some(*dport))]
                };
                one_of(&self.verdict, |verdict| verdict == anomaly.verdict)
                    && one_of(&self.dev, |dev| *dev == anomaly.dev)
                    && one_of(&self.inner, |end| {
                        anomaly.inner.as_ref().is_some_and(|inner| end.fits(inner_sides(inner)))
                    })
                    && one_of(&self.outer, |end| anomaly.outer.as_ref().is_some_and(|outer| end.fits(sides(outer))))
            }
            // Of a connection, not of one packet.
            Record::Recovered(ending) | Record::NotRecovered(ending) => {
                self.verdict.is_empty()
                    && self.outer.is_empty()
                    && one_of(&self.dev, |dev| *dev == ending.dev)
                    && one_of(&self.inner, |end| end.fits(inner_sides(&ending.inner)))
            }
            Record::Attached(attached) => self.passes_device(&attached.dev),
            Record::Detached(detached) => self.passes_device(&detached.dev),
            Record::Offload(offload) => self.passes_device(&offload.dev),
            Record::Lost(_) | Record::Missed(_) | Record::Summary(_) => true,
        }
    }

    /// What tells of a device and not of a packet.
    fn passes_device(&self, name: &str) -> bool {
        let about_packets = !self.verdict.is_empty() || !self.inner.is_empty() || !self.outer.is_empty();
        !about_packets && one_of(&self.dev, |dev| dev == name)
    }
}

/// Both ends of a packet inside.
fn inner_sides(inner: &Inner) -> [(String, Option<u16>); 2] {
    [(inner.src.clone(), inner.sport), (inner.dst.clone(), inner.dport)]
}

fn one_of<T>(wanted: &[T], fits: impl Fn(&T) -> bool) -> bool {
    wanted.is_empty() || wanted.iter().any(fits)
}

/// One end of a packet: an address or prefix, a port, or both.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct End {
    /// Address, and how many of its leading bits count.
    prefix: Option<(IpAddr, u8)>,
    /// Port, host byte order.
    port: Option<u16>,
}

impl End {
    /// Whether one of the two sides is this end.
    fn fits(&self, sides: [(String, Option<u16>); 2]) -> bool {
        sides.iter().any(|(address, port)| {
            self.port.is_none_or(|wanted| *port == Some(wanted))
                && self.prefix.is_none_or(|prefix| address.parse().is_ok_and(|address| covers(prefix, address)))
        })
    }
}

/// Whether an address is in a prefix; never, if they are of two families.
fn covers((prefix, length): (IpAddr, u8), address: IpAddr) -> bool {
    let bits = |address: IpAddr| match address {
        IpAddr::V4(address) => (u128::from(address.to_bits()) << 96, true),
        IpAddr::V6(address) => (address.to_bits(), false),
    };
    let ((prefix, is_v4), (address, also_v4)) = (bits(prefix), bits(address));
    is_v4 == also_v4 && (length == 0 || (prefix ^ address) >> (128 - u32::from(length)) == 0)
}

impl FromStr for End {
    type Err = String;

    /// `10.244.2.73`, `10.244.0.0/16`, `10.244.2.73:9153`, `[fd00::1]:53`, `fd00::/64`, `:9153`.
    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("`{text}` is not an ADDRESS, ADDRESS/LENGTH, ADDRESS:PORT, [ADDRESS]:PORT or :PORT");
        let port = |text: &str| text.parse::<u16>().map_err(|_| wrong());
        if let Some(text) = text.strip_prefix(':').filter(|rest| !rest.contains(':')) {
            return Ok(Self { prefix: None, port: Some(port(text)?) });
        }
        let (address, rest) = match text.strip_prefix('[') {
            Some(bracketed) => bracketed.split_once(']').ok_or_else(wrong)?,
            None => {
                // A single colon comes before a port; an IPv6 address has two at least.
                let is_v6 = text.matches(':').count() > 1;
                let cut = text.find(|c| c == '/' || (c == ':' && !is_v6)).unwrap_or(text.len());
                text.split_at(cut)
            }
        };
        let address: IpAddr = address.parse().map_err(|_| wrong())?;
        let whole = if address.is_ipv4() { 32 } else { 128 };
        if let Some(length) = rest.strip_prefix('/') {
            let length = length.parse().ok().filter(|length| *length <= whole).ok_or_else(wrong)?;
            return Ok(Self { prefix: Some((address, length)), port: None });
        }
        let port = match rest.strip_prefix(':') {
            Some(text) => Some(port(text)?),
            None if rest.is_empty() => None,
            None => return Err(wrong()),
        };
        Ok(Self { prefix: Some((address, whole)), port })
    }
}

impl fmt::Display for End {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.prefix, self.port) {
            (Some((address, _)), Some(port)) if address.is_ipv6() => write!(formatter, "[{address}]:{port}"),
            (Some((address, _)), Some(port)) => write!(formatter, "{address}:{port}"),
            (Some((address, length)), None) => write!(formatter, "{address}/{length}"),
            (None, Some(port)) => write!(formatter, ":{port}"),
            (None, None) => Ok(()),
        }
    }
}

impl From<End> for String {
    fn from(end: End) -> Self {
        end.to_string()
    }
}

impl TryFrom<String> for End {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fits(end: &str, address: &str, port: u16) -> bool {
        let other = ("192.0.2.1".to_owned(), Some(1));
        end.parse::<End>().unwrap().fits([other, (address.to_owned(), Some(port))])
    }

    #[test]
    fn ends_are_read_as_people_write_them() {
        for text in ["10.0.0.1", "10.0.0.0/8", "10.0.0.1:53", "[fd00::1]:53", "[fd00::1]", "fd00::/64", "::1", ":53"] {
            let end: End = text.parse().unwrap();
            assert_eq!(end.to_string().parse(), Ok(end), "{text}");
        }
        for bad in ["", ":", "10.0.0", "10.0.0.0/33", "10.0.0.1:70000", "10.0.0.1 ", "fd00::/129", "[fd00::1", "x:53"] {
            assert!(bad.parse::<End>().is_err(), "{bad}");
        }
    }

    #[test]
    fn an_end_fits_by_prefix_and_port() {
        assert!(fits("10.244.2.73", "10.244.2.73", 9153) && !fits("10.244.2.73", "10.244.2.74", 9153));
        assert!(fits("10.244.0.0/16", "10.244.2.73", 9153) && !fits("10.244.0.0/16", "10.245.2.73", 9153));
        assert!(fits("10.244.2.73:9153", "10.244.2.73", 9153) && !fits("10.244.2.73:53", "10.244.2.73", 9153));
        assert!(fits(":9153", "fd00::1", 9153) && !fits(":53", "fd00::1", 9153));
        assert!(fits("fd00::/8", "fd12::1", 1) && !fits("fd00::/8", "10.0.0.1", 9));
        assert!(fits("0.0.0.0/0", "10.0.0.1", 2) && !fits("::/0", "10.0.0.1", 2));
        // Address and port of the same end.
        assert!(!fits("192.0.2.1:9153", "10.0.0.1", 9153));
    }
}
