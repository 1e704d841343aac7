//! What `vxmon` says of itself: version, completions, manual pages, and its flags by the environment.

#![expect(clippy::unwrap_used, reason = "a test may fail loudly")]

use std::{
    io::Write as _,
    process::{Command, Output, Stdio},
};

fn vxmon() -> Command {
    Command::new(env!("CARGO_BIN_EXE_vxmon"))
}

fn text(output: &Output) -> String {
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    String::from_utf8(output.stdout.clone()).unwrap()
}

#[test]
fn the_version_names_commit_and_objects() {
    let version = text(&vxmon().arg("--version").output().unwrap());
    let (number, rest) = version.trim_end().strip_prefix("vxmon ").unwrap().split_once(" (commit ").unwrap();
    let (commit, id) = rest.strip_suffix(')').unwrap().split_once(", eBPF ").unwrap();
    assert_eq!(number, env!("CARGO_PKG_VERSION"));
    let hex = |text: &str| text.len() == 12 && text.chars().all(|c| c.is_ascii_hexdigit());
    assert!(hex(commit) || commit == "unknown", "{version}");
    // Built without the objects (AYA_BUILD_SKIP), there is nothing to identify.
    assert!(if vxmon::source::object::MAIN.is_empty() { id == "none" } else { hex(id) }, "{version}");
}

#[test]
fn completions_are_what_the_shells_take() {
    for (shell, checks) in
        [("bash", Some("bash")), ("zsh", None), ("fish", None), ("elvish", None), ("powershell", None)]
    {
        let script = text(&vxmon().args(["completions", shell]).output().unwrap());
        assert!(script.contains("tail") && script.contains("socket-group"), "{shell}");
        if let Some(shell) = checks {
            let mut child = Command::new(shell).arg("-n").stdin(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
            child.stdin.take().unwrap().write_all(script.as_bytes()).unwrap();
            let output = child.wait_with_output().unwrap();
            assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
        }
    }
    assert_eq!(vxmon().args(["completions", "cmd.exe"]).output().unwrap().status.code(), Some(2));
}

#[test]
fn there_is_a_page_for_each_verb() {
    let page = text(&vxmon().arg("man").output().unwrap());
    assert!(page.contains(".TH vxmon 1") && page.contains("vxmon\\-attach(1)"), "{page}");
    let page = text(&vxmon().args(["man", "attach"]).output().unwrap());
    assert!(page.contains(".TH vxmon-attach 1") && page.contains("VXMON_METRICS"), "{page}");
    let unknown = vxmon().args(["man", "detach"]).output().unwrap();
    assert_eq!(unknown.status.code(), Some(2));
    assert!(String::from_utf8(unknown.stderr).unwrap().contains("there are: attach, "));

    let directory = std::env::temp_dir().join(format!("vxmon-man-{}", std::process::id()));
    std::fs::create_dir_all(&directory).unwrap();
    text(&vxmon().args(["man", "--dir"]).arg(&directory).output().unwrap());
    let mut names: Vec<String> =
        std::fs::read_dir(&directory).unwrap().map(|file| file.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    std::fs::remove_dir_all(&directory).unwrap();
    for name in ["vxmon.1", "vxmon-attach.1", "vxmon-tail.1", "vxmon-man.1", "vxmon-completions.1"] {
        assert!(names.iter().any(|file| file == name), "{name} is not in {names:?}");
    }
    assert!(!names.iter().any(|name| name.contains("help")), "{names:?}");
}

/// A flag beats the environment, and a wrong value is refused, whichever way it came.
#[test]
fn flags_can_be_set_in_the_environment() {
    let said = |command: &mut Command| {
        let output = command.output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{output:?}");
        String::from_utf8(output.stderr).unwrap()
    };
    let by_environment = said(vxmon().arg("tail").env("VXMON_SOCKET", "/no/such/socket"));
    assert!(by_environment.contains("/no/such/socket"), "{by_environment}");
    let by_flag = said(vxmon().args(["tail", "--socket", "/another"]).env("VXMON_SOCKET", "/no/such/socket"));
    assert!(by_flag.contains("/another") && !by_flag.contains("/no/such"), "{by_flag}");
    for (name, value) in
        [("VXMON_SAMPLE", "0"), ("VXMON_METRICS", "host:x"), ("VXMON_PORT", "1,x"), ("VXMON_SOCKET", "eth0")]
    {
        let refused = said(vxmon().arg("attach").env(name, value));
        assert!(refused.contains(value.rsplit(',').next().unwrap()), "{name}: {refused}");
    }
}
