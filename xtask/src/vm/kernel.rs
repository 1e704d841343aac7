//! The kernels of the lab: where each comes from, and how it gets into the cache. None is ever installed on this machine.
//!
//! Debian's come from its packages, by an apt configuration of its own that knows other suites of the same mirror.

use std::{
    collections::BTreeSet,
    env, fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};

use super::{cache::Cache, fault_a};
use crate::proc;

/// Fetching package lists, or a kernel of about 100 MiB.
const DOWNLOAD_LIMIT: Duration = Duration::from_secs(600);
const MIRROR: &str = "http://deb.debian.org/debian";
const SECURITY_MIRROR: &str = "http://deb.debian.org/debian-security";

/// Where a kernel comes from.
#[derive(Clone, Copy, Debug)]
pub enum Origin {
    /// The newest `linux-image-amd64` of these suites, of a release that starts so.
    Debian {
        /// Suites of the main archive and of the security archive.
        suites: &'static [&'static str],
        /// Start of the release, `6.1.` for instance; empty for any.
        release: &'static str,
    },
    /// Debian's linux-source-6.1 with the fix of fault A taken out.
    FaultA,
}

/// One kernel of the lab.
#[derive(Clone, Copy, Debug)]
pub struct Kernel {
    /// How it is called on the command line and in the table.
    pub name: &'static str,
    /// Where it comes from.
    pub origin: Origin,
}

/// All of them, in the table's order.
pub const KERNELS: [Kernel; 6] = [
    Kernel { name: "4.19", origin: Origin::Debian { suites: &["buster", "buster/updates"], release: "4.19." } },
    Kernel { name: "5.10", origin: Origin::Debian { suites: &["bullseye", "bullseye-security"], release: "5.10." } },
    Kernel { name: "6.1", origin: Origin::Debian { suites: &["bookworm", "bookworm-security"], release: "6.1." } },
    Kernel { name: "6.12", origin: Origin::Debian { suites: &["trixie", "trixie-security"], release: "6.12." } },
    Kernel { name: "newest", origin: Origin::Debian { suites: &["sid"], release: "" } },
    Kernel { name: "fault-a", origin: Origin::FaultA },
];

/// A kernel that can be booted.
#[derive(Clone, Debug)]
pub struct Image {
    /// The kernel image.
    pub vmlinuz: PathBuf,
    /// The directory that has a directory of modules for the release; none if everything is built in.
    pub modules: Option<PathBuf>,
}

impl Kernel {
    /// Gets it, unless it is there already. An error is a kernel that cannot be had here.
    pub fn image(&self, update: bool) -> Result<Image> {
        let cache = Cache::open()?;
        match self.origin {
            Origin::Debian { suites, release } => debian(&cache, suites, release, update),
            Origin::FaultA => fault_a::image(&cache),
        }
    }

    /// In a few words, for `--list`.
    pub fn describe(&self) -> String {
        match self.origin {
            Origin::Debian { suites, .. } => format!("Debian's kernel package of {}", suites.join(", ")),
            Origin::FaultA => "Linux 6.1 from Debian's source, with the fix of fault A taken out".to_owned(),
        }
    }
}

/// The kernel of these suites: an entry named by package and version, which is found by a link named by the suites.
fn debian(cache: &Cache, suites: &[&str], release: &str, update: bool) -> Result<Image> {
    let link = format!("debian-{}-{release}newest", suites.join("+").replace('/', "-"));
    if !update && let Some(entry) = cache.find(&link) {
        return unpacked(&entry);
    }
    let _lock = cache.lock(&link)?;
    let found = cache.find(&link);
    if !update && let Some(entry) = found {
        return unpacked(&entry);
    }
    match fetch(cache, &link, suites, release) {
        Ok(entry) => unpacked(&entry),
        Err(error) => {
            let Some(entry) = found else { return Err(error) };
            eprintln!("vm: {error:#}; going on with {}", entry.display());
            unpacked(&entry)
        }
    }
}

fn fetch(cache: &Cache, link: &str, suites: &[&str], release: &str) -> Result<PathBuf> {
    eprintln!("vm: fetching the kernel of Debian {}", suites.join(", "));
    let scratch = cache.scratch(link)?;
    let apt = Apt::new(&scratch.0, suites)?;
    let Packages { title, names } = apt.kernel_packages(release)?;
    let entry = cache.entry(&title, |root| {
        apt.unpack(&names, root)?;
        for base in module_bases(root) {
            // `lib` may hold firmware only; depmod wants the directory above lib/modules.
            for version in file_names(&base) {
                let above = base.ancestors().nth(2).context("no directory above lib/modules")?;
                proc::run(Command::new("/sbin/depmod").arg("-b").arg(above).arg(&version))?;
            }
        }
        Ok(())
    })?;
    cache.link(link, &title)?;
    Ok(entry)
}

fn unpacked(root: &Path) -> Result<Image> {
    let modules = module_bases(root).into_iter().next().context("the packages have no modules")?;
    let version = file_names(&modules).into_iter().next().context("the packages have no modules")?;
    let places = [root.join("boot").join(format!("vmlinuz-{version}")), modules.join(&version).join("vmlinuz")];
    let vmlinuz = places.into_iter().find(|path| path.exists()).context("the packages have no kernel image")?;
    Ok(Image { vmlinuz, modules: Some(modules) })
}

/// `lib/modules` or `usr/lib/modules`, whichever the packages have.
fn module_bases(root: &Path) -> Vec<PathBuf> {
    let bases = ["lib/modules", "usr/lib/modules"].map(|path| root.join(path));
    bases.into_iter().filter(|path| path.is_dir()).collect()
}

fn file_names(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

/// A kernel's packages.
struct Packages {
    /// Name and version of the first, by which the kernel is kept.
    title: String,
    names: Vec<String>,
}

/// apt with lists, sources and state of its own.
struct Apt {
    directory: PathBuf,
    config: PathBuf,
}

impl Apt {
    /// Fetches the package lists of `suites`.
    fn new(directory: &Path, suites: &[&str]) -> Result<Self> {
        for part in ["lists/partial", "cache/archives/partial", "packages"] {
            fs::create_dir_all(directory.join(part))?;
        }
        fs::write(directory.join("status"), "")?;
        let mut sources = String::new();
        for suite in suites {
            let security = suite.ends_with("-security") || suite.ends_with("/updates");
            let (variable, default) = if security {
                ("VXMON_DEBIAN_SECURITY_MIRROR", SECURITY_MIRROR)
            } else {
                ("VXMON_DEBIAN_MIRROR", MIRROR)
            };
            let mirror = env::var(variable).unwrap_or_else(|_| default.to_owned());
            sources += &format!(
                "deb [arch=amd64 signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] {mirror} {suite} main\n"
            );
        }
        fs::write(directory.join("sources.list"), sources)?;
        let config = directory.join("apt.conf");
        let at = directory.display();
        fs::write(
            &config,
            format!(
                "Dir::State \"{at}\";\nDir::State::lists \"{at}/lists\";\nDir::State::status \"{at}/status\";\n\
                 Dir::Cache \"{at}/cache\";\nDir::Etc::sourcelist \"{at}/sources.list\";\nDir::Etc::sourceparts \"-\";\n\
                 Acquire::Languages \"none\";\nAcquire::Retries \"1\";\nAPT::Sandbox::User \"\";\n"
            ),
        )?;
        let apt = Self { directory: directory.to_owned(), config };
        let mut update = apt.command("apt-get");
        update.args(["-qq", "update", "--error-on=any"]);
        proc::run_within(&mut update, DOWNLOAD_LIMIT)
            .with_context(|| format!("the mirror does not have the suites {}", suites.join(", ")))?;
        Ok(apt)
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.env("APT_CONFIG", &self.config).env("LC_ALL", "C").current_dir(self.directory.join("packages"));
        command
    }

    /// The newest kernel package whose release starts with `release`.
    fn kernel_packages(&self, release: &str) -> Result<Packages> {
        let pattern = format!("^linux-image-{}[0-9].*-amd64$", release.replace('.', "\\."));
        let found = proc::output(self.command("apt-cache").args(["search", "--names-only", &pattern]))
            .context("apt-cache does not run")?;
        let plain = |name: &&str| !["-cloud-", "-rt-", "-unsigned", "-dbg"].iter().any(|part| name.contains(part));
        // Debian's ABI names sort by number: 6.1.0-9 before 6.1.0-10.
        let number = |name: &str| -> Vec<u64> {
            name.split(|c: char| !c.is_ascii_digit()).filter_map(|part| part.parse().ok()).collect()
        };
        let newest = found.lines().filter_map(|line| line.split_whitespace().next()).filter(plain);
        let newest = newest.max_by_key(|name| number(name)).context("the suites have no such kernel package")?;
        let depends =
            proc::output(self.command("apt-cache").args(["depends", "--no-recommends", "--no-suggests", newest]))
                .context("apt-cache does not run")?;
        let suffix = newest.trim_start_matches("linux-image-");
        let parts = ["linux-binary-", "linux-modules-", "linux-base-"].map(|start| format!("{start}{suffix}"));
        let needed =
            |line: &&str| line.trim().strip_prefix("Depends: ").is_some_and(|name| parts.iter().any(|p| p == name));
        let mut packages: BTreeSet<String> = BTreeSet::from([newest.to_owned()]);
        packages
            .extend(depends.lines().filter(needed).filter_map(|line| Some(line.trim().split_once(": ")?.1.to_owned())));
        let details = proc::output(self.command("apt-cache").args(["show", "--no-all-versions", newest]));
        let version = details.as_deref().and_then(|text| text.lines().find_map(|line| line.strip_prefix("Version: ")));
        let version = version.with_context(|| format!("apt-cache tells no version of {newest}"))?;
        Ok(Packages { title: format!("{newest}_{version}"), names: packages.into_iter().collect() })
    }

    /// Downloads `packages` and unpacks them into `root`.
    fn unpack(&self, packages: &[String], root: &Path) -> Result<()> {
        eprintln!("vm: {}", packages.join(" "));
        proc::run_within(self.command("apt-get").args(["-qq", "download"]).args(packages), DOWNLOAD_LIMIT)?;
        let downloads = self.directory.join("packages");
        for file in file_names(&downloads).iter().filter(|name| name.ends_with(".deb")) {
            proc::run(Command::new("dpkg-deb").arg("-x").arg(downloads.join(file)).arg(root))?;
            fs::remove_file(downloads.join(file))?;
        }
        if file_names(root).is_empty() {
            bail!("apt-get downloaded nothing");
        }
        Ok(())
    }
}
