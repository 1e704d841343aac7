//! What is in `deploy`: the Kubernetes manifests are as the schemas say, the systemd unit is as tight as it claims, and vxmon
//! works under what they ask for.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use vxmon_tests::{
    Family, Lab, LabOptions, Rules, cmd,
    container::{CAPABILITIES, Container},
    skip, traffic, vxmon,
};

const LIMIT: Duration = Duration::from_secs(10);
const A_MOMENT: Duration = Duration::from_millis(150);
/// The oldest and the newest Kubernetes whose schemas are asked.
const KUBERNETES: [&str; 2] = ["1.25", "1.37"];
/// What `systemd-analyze security` may say at most; 10 is no sandbox at all.
const EXPOSURE: f64 = 2.2;

fn deploy(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy").join(path)
}

/// A program of the validator's environment, where `cargo xtask test` puts it.
fn validator(program: &str) -> Option<PathBuf> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/tools/kubernetes-validate/bin").join(program);
    path.exists().then_some(path)
}

/// The documents of a YAML text.
fn documents(yaml: &str) -> Result<Vec<Value>> {
    const CONVERT: &str = "import json, sys, yaml; print(json.dumps(list(yaml.safe_load_all(sys.stdin))))";
    let python = validator("python").context("no validator")?;
    Ok(serde_json::from_str(&cmd::run_with_input(Command::new(python).args(["-c", CONVERT]), yaml)?)?)
}

/// What the schemas of a Kubernetes version have against a text; unknown fields are an error.
fn complaint(yaml: &str, version: &str) -> Result<Option<String>> {
    static NEXT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
    let number = NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    let file = std::env::temp_dir().join(format!("vxmon-deploy-{}-{number}.yaml", std::process::id()));
    fs::write(&file, yaml)?;
    let mut command = Command::new(validator("kubernetes-validate").context("no validator")?);
    let output = command.args(["--strict", "--no-warn", "-k", version]).arg(&file).output();
    fs::remove_file(&file)?;
    let output = output?;
    let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    ensure!(text.contains("version"), "{text}");
    Ok((!output.status.success()).then_some(text))
}

/// A directory as kustomize renders it; `None` where there is no kubectl whose kustomize is new enough.
fn kustomize(directory: &str) -> Result<Option<String>> {
    let mut command = Command::new("kubectl");
    let Ok(version) = command.args(["version", "--client"]).stderr(Stdio::null()).output() else {
        return Ok(None);
    };
    // "Kustomize Version: v5.5.0"; before 1.28 it is not named, and may be of 2019.
    let version = String::from_utf8_lossy(&version.stdout).into_owned();
    if !version.lines().any(|line| line.starts_with("Kustomize Version: v5")) {
        return Ok(None);
    }
    cmd::run(Command::new("kubectl").arg("kustomize").arg(deploy(directory))).map(Some)
}

/// All manifests by name: rendered where they are kustomizations.
fn manifests() -> Result<Vec<(String, String)>> {
    let mut all = Vec::new();
    for file in ["kubernetes/base/namespace.yaml", "kubernetes/base/daemonset.yaml", "kubernetes/debug/pod.yaml"] {
        all.push((file.to_owned(), fs::read_to_string(deploy(file))?));
    }
    all.push(("kubernetes/debug/profile.json".to_owned(), pod_of_profile()?));
    for directory in ["kubernetes/base", "kubernetes/overlays/old-kernels"] {
        if let Some(text) = kustomize(directory)? {
            all.push((directory.to_owned(), text));
        }
    }
    Ok(all)
}

/// The profile of `kubectl debug` is a part of a container: here with what kubectl adds.
fn pod_of_profile() -> Result<String> {
    let mut container: Value = serde_json::from_str(&fs::read_to_string(deploy("kubernetes/debug/profile.json"))?)?;
    for field in ["name", "image", "command", "lifecycle", "volumeDevices"] {
        ensure!(container.get(field).is_none(), "kubectl refuses {field} in a profile");
    }
    container["name"] = "debugger".into();
    container["image"] = "localhost/vxmon:0.1.0".into();
    let pod = json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": { "name": "node-debugger" },
        "spec": { "containers": [container] },
    });
    Ok(pod.to_string())
}

/// The container named `vxmon`, of a DaemonSet or a pod.
fn container(manifest: &Value) -> Option<&Value> {
    let spec = if manifest["kind"] == "Pod" { &manifest["spec"] } else { &manifest["spec"]["template"]["spec"] };
    spec["containers"].as_array()?.iter().find(|container| container["name"] == "vxmon")
}

fn words(value: &Value) -> Vec<&str> {
    value.as_array().into_iter().flatten().filter_map(Value::as_str).collect()
}

/// True if the schemas are there; else skips the test.
fn schemas(test: &str) -> bool {
    let there = validator("kubernetes-validate").is_some();
    if !there {
        skip::skip(test, "there is no target/tools/kubernetes-validate: `cargo xtask test` installs it");
    }
    there
}

#[test]
fn manifests_are_as_the_schemas_say() -> Result<()> {
    if !schemas("manifests_are_as_the_schemas_say") {
        return Ok(());
    }
    for (name, text) in manifests()? {
        for version in KUBERNETES {
            if let Some(complaint) = complaint(&text, version)? {
                bail!("{name}: {complaint}");
            }
        }
    }
    // And the schemas would have said so.
    let text = fs::read_to_string(deploy("kubernetes/base/daemonset.yaml"))?;
    for (right, wrong) in [
        ("hostNetwork: true", "hostNetwrok: true"),
        ("hostNetwork: true", "hostNetwork: sometimes"),
        ("readOnlyRootFilesystem: true", "readonlyRootFilesystem: true"),
        ("    matchLabels:", "    matchLables:"),
        ("        - name: vxmon\n          image: vxmon\n", "        - image: vxmon\n"),
    ] {
        let changed = text.replacen(right, wrong, 1);
        ensure!(changed != text, "{right} is not there");
        ensure!(complaint(&changed, KUBERNETES[1])?.is_some(), "not noticed: {wrong}");
    }
    Ok(())
}

/// Names that two files share are the same in both; kustomize passes over a patch's misspelt list item in silence.
#[test]
fn the_kustomizations_are_what_they_say() -> Result<()> {
    let test = "the_kustomizations_are_what_they_say";
    if !schemas(test) {
        return Ok(());
    }
    let (Some(base), Some(old)) = (kustomize("kubernetes/base")?, kustomize("kubernetes/overlays/old-kernels")?) else {
        skip::skip(test, "there is no kubectl with kustomize 5");
        return Ok(());
    };
    let daemon_set = |text: &str| -> Result<Value> {
        documents(text)?.into_iter().find(|document| document["kind"] == "DaemonSet").context("no DaemonSet")
    };
    let (base, mut old) = (daemon_set(&base)?, daemon_set(&old)?);
    ensure!(base["metadata"]["namespace"] == "vxmon", "{base}");
    let image = container(&base).and_then(|container| container["image"].as_str()).context("no image")?;
    ensure!(image == concat!("localhost/vxmon:", env!("CARGO_PKG_VERSION")), "{image}");
    let path = "/spec/template/spec/containers/0/securityContext/capabilities/add";
    let add = old.pointer_mut(path).context("no capabilities")?;
    ensure!(words(add) == ["SYS_ADMIN", "NET_ADMIN", "SYS_RESOURCE"], "{add}");
    *add = json!(CAPABILITIES);
    ensure!(old == base, "the overlay changes more than capabilities");
    Ok(())
}

/// What the manifests ask for is what the tests of the container run with, and their variables exist.
#[test]
fn manifests_ask_for_what_is_documented() -> Result<()> {
    if !schemas("manifests_ask_for_what_is_documented") {
        return Ok(());
    }
    let help = cmd::run(Command::new(vxmon::binary()?).args(["attach", "--help"]))?;
    let profile: Value = serde_json::from_str(&pod_of_profile()?)?;
    let mut containers = vec![profile["spec"]["containers"][0].clone()];
    for file in ["kubernetes/base/daemonset.yaml", "kubernetes/debug/pod.yaml"] {
        let documents = documents(&fs::read_to_string(deploy(file))?)?;
        let container = container(&documents[0]).with_context(|| format!("{file} has no container vxmon"))?;
        ensure!(container["securityContext"]["readOnlyRootFilesystem"] == true, "{container}");
        ensure!(container["args"] == json!(["attach"]), "{container}");
        containers.push(container.clone());
    }
    for container in &containers {
        let security = &container["securityContext"];
        ensure!(security["capabilities"] == json!({ "drop": ["ALL"], "add": CAPABILITIES }), "{security}");
        ensure!(security["allowPrivilegeEscalation"] == false && security["privileged"] == false, "{security}");
        for variable in container["env"].as_array().into_iter().flatten() {
            let name = variable["name"].as_str().context("a variable without a name")?;
            ensure!(help.contains(&format!("[env: {name}=")), "`vxmon attach --help` does not name {name}");
        }
    }
    Ok(())
}

fn lab() -> Result<Lab> {
    let lab = LabOptions::default().build()?;
    lab.rules(&Rules::default())?;
    Ok(lab)
}

fn runnable(test: &str) -> bool {
    let found = Command::new("runc").arg("--version").output().is_ok();
    if !found {
        skip::skip(test, "there is no runc: `cargo xtask setup` installs it");
    }
    found && skip::root_or_skip(test)
}

/// Makes the fault show once.
fn ask(lab: &Lab) -> Result<()> {
    let _server = traffic::HttpServer::start(&lab.b, lab.pod_socket(Family::V4))?;
    let asked = traffic::http_get(&lab.a, lab.service_socket(Family::V4), A_MOMENT);
    ensure!(asked.is_err(), "the service answered: there is no fault to see");
    Ok(())
}

fn push_env(container: &mut Container, variables: &[(&str, &str)]) {
    if let Some(env) = container.config["process"]["env"].as_array_mut() {
        env.extend(variables.iter().map(|(name, value)| Value::from(format!("{name}={value}"))));
    }
}

/// The DaemonSet's container: its environment, its probes, and `kubectl exec … vxmon tail`.
#[test]
fn the_daemon_set_container_works() -> Result<()> {
    let test = "the_daemon_set_container_works";
    if !runnable(test) || !schemas(test) {
        return Ok(());
    }
    let manifest = documents(&fs::read_to_string(deploy("kubernetes/base/daemonset.yaml"))?)?;
    let wanted = container(&manifest[0]).context("no container")?;
    let lab = lab()?;
    let mut container =
        Container::new(&lab.a, &words(&wanted["securityContext"]["capabilities"]["add"]), &words(&wanted["args"]))?;
    for variable in wanted["env"].as_array().context("no env")? {
        // From the node's name in a cluster.
        let value = variable["value"].as_str().unwrap_or("worker-1");
        push_env(&mut container, &[(variable["name"].as_str().context("no name")?, value)]);
    }
    let vxmon = container.start()?;
    ensure!(vxmon.wait_type("attached", 2, LIMIT).len() == 2, "not attached: {}", vxmon.stderr());
    for probe in ["startupProbe", "livenessProbe", "readinessProbe"] {
        let get = &wanted[probe]["httpGet"];
        let (host, path) = (get["host"].as_str().context("host")?, get["path"].as_str().context("path")?);
        let url = format!("http://{host}:{}{path}", get["port"]);
        lab.a.run("curl", &["-fsS", "--max-time", "5", &url]).with_context(|| probe.to_owned())?;
    }
    ask(&lab)?;
    let events = vxmon.wait_events(1, LIMIT);
    ensure!(events.len() == 1 && events[0]["node"] == "worker-1", "{events:#?} {}", vxmon.stderr());
    let tail = cmd::run(&mut container.exec(&["vxmon", "tail", "--format", "json", "--no-wait"]))?;
    ensure!(tail.lines().any(|line| line.contains("nat-stale-port")), "tail shows no anomaly: {tail}");

    // The limit in the manifest has room for what it uses.
    let (resident, maps) = memory(container.pid()?)?;
    let limit = wanted["resources"]["limits"]["memory"].as_str().and_then(|text| text.strip_suffix("Mi"));
    let limit: u64 = limit.context("no limit in Mi")?.parse()?;
    vxmon_tests::cleanup::note(&format!("{test}: {} KiB resident, {} KiB of maps", resident >> 10, maps >> 10));
    ensure!(2 * (resident + maps) < limit << 20, "{resident} + {maps} bytes leave no room below {limit} MiB");
    vxmon.stop()?.adds_up()
}

/// Resident memory of a process, and that of the eBPF maps it holds, in bytes.
fn memory(pid: u32) -> Result<(u64, u64)> {
    let number = |text: &str, name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name))?;
        line.split_whitespace().next()?.parse::<u64>().ok()
    };
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let mut maps = 0;
    for entry in fs::read_dir(format!("/proc/{pid}/fdinfo"))? {
        let info = fs::read_to_string(entry?.path()).unwrap_or_default();
        if number(&info, "map_id:").is_some() {
            maps += number(&info, "memlock:").unwrap_or(0);
        }
    }
    ensure!(maps > 0, "it holds no map");
    Ok((number(&status, "VmRSS:").context("no VmRSS")? << 10, maps))
}

fn unit() -> Result<String> {
    Ok(fs::read_to_string(deploy("systemd/vxmon.service"))?)
}

/// The words of a setting in the unit, all lines of it.
fn setting<'unit>(unit: &'unit str, name: &str) -> Vec<&'unit str> {
    let lines = unit.lines().filter_map(|line| line.strip_prefix(name)?.strip_prefix('='));
    lines.flat_map(str::split_whitespace).collect()
}

#[test]
fn the_unit_is_right_and_tight() -> Result<()> {
    let test = "the_unit_is_right_and_tight";
    if Command::new("systemd-analyze").arg("--version").output().is_err() {
        skip::skip(test, "there is no systemd-analyze: `cargo xtask setup` installs it");
        return Ok(());
    }
    // `verify` looks for the program: it gets the one under test.
    let directory = std::env::temp_dir().join(format!("vxmon-unit-{}", std::process::id()));
    fs::create_dir_all(&directory)?;
    let file = directory.join("vxmon.service");
    let program = vxmon::binary()?.display().to_string();
    let text = unit()?.replace("/usr/local/bin/vxmon", &program);
    // There need be no man here.
    fs::write(&file, text.replace("Documentation=man:vxmon(1)\n", ""))?;
    let verified = Command::new("systemd-analyze").args(["verify", "--man=no"]).arg(&file).output()?;
    let said = String::from_utf8_lossy(&verified.stderr).into_owned();
    ensure!(verified.status.success() && !said.contains("vxmon"), "{said}");
    // It would have said so.
    fs::write(&file, text.replace("ProtectSystem=strict", "ProtectSystm=strict"))?;
    let verified = Command::new("systemd-analyze").args(["verify", "--man=no"]).arg(&file).output()?;
    ensure!(String::from_utf8_lossy(&verified.stderr).contains("ProtectSystm"), "a misspelt setting was not noticed");
    fs::remove_dir_all(&directory)?;

    let said = cmd::run(
        Command::new("systemd-analyze").args(["security", "--offline=true"]).arg(deploy("systemd/vxmon.service")),
    )?;
    let last = said.lines().last().unwrap_or_default();
    vxmon_tests::cleanup::note(&format!("{test}: {last}"));
    let score = last.split("vxmon.service: ").nth(1).and_then(|rest| rest.split(' ').next()).context("no score")?;
    ensure!(score.parse::<f64>()? <= EXPOSURE, "{said}");
    Ok(())
}

/// System calls by name, groups of systemd expanded.
fn system_calls(names: &[&str]) -> Result<BTreeSet<String>> {
    let mut calls = BTreeSet::new();
    for name in names {
        if !name.starts_with('@') {
            calls.insert((*name).to_owned());
            continue;
        }
        let list = cmd::run(Command::new("systemd-analyze").args(["syscall-filter", name]))?;
        let members = list.lines().skip(1).map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
        calls.extend(system_calls(&members.collect::<Vec<_>>())?);
    }
    Ok(calls)
}

/// The unit's sandbox as far as a container runtime knows it: root without its capabilities, the system call filter, the address families, a file system of which only the runtime directory can be written.
#[test]
fn works_in_the_units_sandbox() -> Result<()> {
    let test = "works_in_the_units_sandbox";
    if !runnable(test) {
        return Ok(());
    }
    let unit = unit()?;
    let mut allowed = BTreeSet::new();
    for line in unit.lines().filter_map(|line| line.strip_prefix("SystemCallFilter=")) {
        match line.strip_prefix('~') {
            Some(denied) => {
                let denied = system_calls(&denied.split_whitespace().collect::<Vec<_>>())?;
                allowed.retain(|call| !denied.contains(call));
            }
            None => allowed.extend(system_calls(&line.split_whitespace().collect::<Vec<_>>())?),
        }
    }
    ensure!(allowed.contains("bpf") && !allowed.contains("mount"), "{allowed:?}");
    allowed.remove("socket");
    let mut rules = vec![json!({ "names": allowed, "action": "SCMP_ACT_ALLOW" })];
    for family in setting(&unit, "RestrictAddressFamilies") {
        let number = match family {
            "AF_UNIX" => 1,
            "AF_INET" => 2,
            "AF_INET6" => 10,
            "AF_NETLINK" => 16,
            other => bail!("what number has {other}?"),
        };
        let argument = json!({ "index": 0, "value": number, "op": "SCMP_CMP_EQ" });
        rules.push(json!({ "names": ["socket"], "action": "SCMP_ACT_ALLOW", "args": [argument] }));
    }
    let capabilities = setting(&unit, "CapabilityBoundingSet");
    let capabilities: Vec<&str> = capabilities.iter().filter_map(|name| name.strip_prefix("CAP_")).collect();
    ensure!(capabilities == CAPABILITIES, "{capabilities:?}");

    let lab = lab()?;
    let mut container = Container::new(&lab.a, &capabilities, &["attach"])?;
    for variable in setting(&unit, "Environment") {
        let (name, value) = variable.split_once('=').context("no value")?;
        push_env(&mut container, &[(name, value)]);
    }
    container.config["linux"]["seccomp"] =
        json!({ "defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 1, "syscalls": rules });
    for mount in container.config["mounts"].as_array_mut().context("no mounts")? {
        if mount["destination"] == "/run/vxmon" {
            mount["options"] = json!(["nosuid", "nodev", "noexec", "mode=700"]);
        }
    }
    let vxmon = container.start()?;
    ensure!(vxmon.wait_type("attached", 2, LIMIT).len() == 2, "not attached: {}", vxmon.stderr());
    ask(&lab)?;
    let events = vxmon.wait_events(1, LIMIT);
    ensure!(events.len() == 1 && events[0]["cause"]["proved"] == true, "{events:#?} {}", vxmon.stderr());
    ensure!(vxmon.stderr().lines().all(|line| !line.contains("cannot")), "{}", vxmon.stderr());
    vxmon.stop()?.adds_up()
}

/// README's commands name files that are there, and options that exist.
#[test]
fn readme_names_what_is_there() -> Result<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let readme = fs::read_to_string(root.join("README.md"))?;
    let section =
        readme.split("\n## Deploy\n").nth(1).and_then(|rest| rest.split("\n## ").next()).context("no section")?;
    let words = || section.split(|c: char| c.is_whitespace() || "`=(),".contains(c));
    let files: BTreeSet<&str> = words().filter(|word| word.starts_with("deploy/")).collect();
    ensure!(files.len() >= 6, "{files:?}");
    for file in files {
        ensure!(root.join(file.trim_end_matches('.')).exists(), "README names {file}");
    }
    let help = cmd::run(Command::new(vxmon::binary()?).args(["tail", "--help"]))?;
    ensure!(section.contains("vxmon tail --follow") && help.contains("--follow"), "{help}");
    let metrics = words().find(|word| word.starts_with("127.0.0.1:")).context("no address of metrics")?;
    let manifest = fs::read_to_string(deploy("kubernetes/base/daemonset.yaml"))?;
    ensure!(manifest.contains(metrics), "the DaemonSet serves metrics elsewhere than at {metrics}");
    Ok(())
}
