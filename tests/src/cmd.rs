//! Programs run to their end. An error names the command, how it ended, and what it wrote to stderr.

use std::{
    io::Write,
    process::{Command, Output, Stdio},
    thread,
};

use anyhow::{Context, Result, bail};

/// Runs `command` and returns its standard output; fails if its exit status is not 0.
pub fn run(command: &mut Command) -> Result<String> {
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("cannot run `{}`", line(command)))?;
    checked(command, None, &output)
}

/// Runs `command` with `input` on its standard input; otherwise as [`run`].
pub fn run_with_input(command: &mut Command, input: &str) -> Result<String> {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot run `{}`", line(command)))?;
    let stdin = child.stdin.take();
    let output = thread::scope(|scope| {
        // In a thread of its own, so that neither side waits for the other with a full pipe. A write error means that the
        // program did not read to the end, of which its exit status tells more.
        scope.spawn(move || stdin.map(|mut pipe| pipe.write_all(input.as_bytes())));
        child.wait_with_output()
    })?;
    checked(command, Some(input), &output)
}

/// Whether a program of that name is on `PATH`.
#[must_use]
pub fn exists(program: &str) -> bool {
    std::env::var_os("PATH").is_some_and(|path| std::env::split_paths(&path).any(|dir| dir.join(program).is_file()))
}

/// The command line, for messages.
#[must_use]
pub fn line(command: &Command) -> String {
    let mut words = vec![command.get_program().to_string_lossy().into_owned()];
    words.extend(command.get_args().map(|arg| {
        let arg = arg.to_string_lossy();
        if arg.is_empty() || arg.contains(char::is_whitespace) { format!("'{arg}'") } else { arg.into_owned() }
    }));
    words.join(" ")
}

fn checked(command: &Command, input: Option<&str>, output: &Output) -> Result<String> {
    if !output.status.success() {
        let input = input.map(|input| format!(", given:\n{}\n", input.trim_end())).unwrap_or_default();
        bail!(
            "`{}` ended with {}{input}: {}{}",
            line(command),
            output.status,
            String::from_utf8_lossy(&output.stderr).trim_end(),
            String::from_utf8_lossy(&output.stdout).trim_end(),
        );
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
