//! `vxmon completions` and `vxmon man`: made from the command line's own definition, so they never tell anything else.

use std::{
    fs,
    io::{self, Write as _},
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context as _, Result, bail};
use clap::Command;
use clap_complete::Shell;
use clap_mangen::Man;

/// Flags of `completions`.
#[derive(Debug, clap::Args)]
pub struct Completions {
    /// For this shell.
    #[arg(value_enum, value_name = "SHELL")]
    shell: Shell,
}

/// Flags of `man`.
#[derive(Debug, clap::Args)]
pub struct ManPages {
    /// The page of this verb; without it, the page of vxmon itself.
    #[arg(value_name = "VERB")]
    verb: Option<String>,
    /// Write all pages into this directory instead: vxmon.1, vxmon-attach.1, …
    #[arg(long, env = "VXMON_MAN_DIR", value_name = "DIR", conflicts_with = "verb")]
    dir: Option<PathBuf>,
}

/// Runs `completions`.
pub fn completions(args: &Completions, mut command: Command) -> Result<ExitCode> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut command, "vxmon", &mut script);
    print(&script)
}

/// Runs `man`.
pub fn man(args: &ManPages, mut command: Command) -> Result<ExitCode> {
    command.build();
    if let Some(directory) = &args.dir {
        write_all(&command, directory)?;
        return Ok(ExitCode::SUCCESS);
    }
    let command = match &args.verb {
        None => command,
        Some(verb) => match command.find_subcommand(verb) {
            Some(found) => found.clone(),
            None => {
                let verbs: Vec<&str> = command.get_subcommands().map(Command::get_name).collect();
                bail!("no verb `{verb}`; there are: {}", verbs.join(", "));
            }
        },
    };
    print(&page(command)?)
}

/// A page.
fn page(command: Command) -> Result<Vec<u8>> {
    let mut page = Vec::new();
    let version = concat!("vxmon ", env!("CARGO_PKG_VERSION"));
    Man::new(command).source(version).manual("vxmon").render(&mut page).context("cannot write a page")?;
    Ok(page)
}

fn write_all(command: &Command, directory: &Path) -> Result<()> {
    for verb in std::iter::once(command).chain(command.get_subcommands().filter(|verb| verb.get_name() != "help")) {
        let file = directory.join(format!("{}.1", verb.get_display_name().unwrap_or("vxmon")));
        fs::write(&file, page(verb.clone())?).with_context(|| format!("cannot write {}", file.display()))?;
    }
    Ok(())
}

/// Writes to standard output; one that is closed has got what it wanted.
fn print(bytes: &[u8]) -> Result<ExitCode> {
    let mut stdout = io::stdout().lock();
    match stdout.write_all(bytes).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(error).context("cannot write the output"),
        Ok(()) | Err(_) => Ok(ExitCode::SUCCESS),
    }
}
