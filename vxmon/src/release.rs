//! The kernel's release, for what no feature tells. Distributions put newer code into old releases, so nothing that can be
//! tried is decided by it.

/// As uname(2) tells it, `6.1.0-56-amd64` for instance.
#[must_use]
pub fn release() -> Option<String> {
    let names = nix::sys::utsname::uname().ok()?;
    Some(names.release().to_string_lossy().into_owned())
}

/// Its first three numbers; the third is 0 if there is none.
#[must_use]
pub fn version(release: &str) -> Option<(u32, u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|number| number.parse().ok());
    Some((numbers.next()??, numbers.next()??, numbers.next().flatten().unwrap_or(0)))
}

#[cfg(test)]
mod tests {
    use super::{release, version};

    #[test]
    fn numbers_are_read() {
        assert_eq!(version("6.1.0-56-amd64"), Some((6, 1, 0)));
        assert_eq!(version("4.18.0-553.el8_10.x86_64"), Some((4, 18, 0)));
        assert_eq!(version("6.18-rc1"), Some((6, 18, 0)));
        assert_eq!((version("6"), version("mainline")), (None, None));
        assert!(version(&release().unwrap()).is_some());
    }
}
