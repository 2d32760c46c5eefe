//! A cluster on the hosts of a lab, with the Linux image on each of them: the agents in the hosts, the
//! witness and the gateways on the lab's fourth machine.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;
use understudy::lab::{End, Lab};

use super::common::{host, program, run};
use super::linux::told;

/// How long an emulated host may take for one step. Busy machines take their time.
pub const PATIENCE: Duration = Duration::from_mins(8);
pub const LOOK_EVERY: Duration = Duration::from_millis(200);
/// Between two looks there is so much time as the look took, times this: emulated hosts work on each for
/// a good part of a second.
const REST: u32 = 4;
pub const HOSTS: [&str; 3] = ["h1", "h2", "h3"];
pub const MACHINE: &str = "10.88.0.254";
/// The disk of a guest that [`Site::put_image`] makes.
const DISK: &str = "8 MiB";
/// Where a host has its images.
const IMAGES: &str = "/data/config/data/images";

/// A cluster in a lab.
pub struct Site {
    pub lab: Lab,
    folder: TempDir,
    manifest: String,
    /// The witness and the gateway, which end with the lab.
    processes: Vec<Child>,
}

impl Site {
    /// Three hosts with the image `linux`, each with its agent; a witness on the fourth machine.
    pub fn open(lab: Lab, folder: TempDir, image: &Path) -> Self {
        let manifest = std::fs::read_to_string(image.join("manifest.toml")).expect("a manifest");
        let mut site = Self {
            lab,
            folder,
            manifest,
            processes: Vec::new(),
        };
        let mut init = Command::new(program());
        init.arg("init").arg(site.cluster());
        for name in HOSTS {
            let address = end(name).address();
            init.args(["--host", &format!("{name}={address}:7400")]);
        }
        init.args(["--witness", &format!("w={MACHINE}:7300")]);
        let made = init.output().expect("it starts");
        assert!(made.status.success(), "{made:?}");
        for name in HOSTS {
            site.start_agent(name, image);
        }
        let witness = site.cluster().join("witnesses/w");
        site.beside(&["witness", "--config", text(&witness)]);
        site.until("all hosts meet", |status| {
            let met = |host: &str| {
                let peers = status["hosts"][host]["peers"].as_object();
                peers.is_some_and(|peers| peers.values().all(|met| met == true))
            };
            HOSTS.iter().all(|host| met(host)).then_some(())
        });
        site
    }

    pub fn cluster(&self) -> PathBuf {
        self.folder.path().join("cluster")
    }

    fn start_agent(&self, name: &str, image: &Path) {
        let host = host(&self.lab, name);
        let put = |from: &Path, to: &str| {
            for file in std::fs::read_dir(from).expect("a folder").flatten() {
                let there = Path::new(to).join(file.file_name());
                host.put(&file.path(), &there).expect("put");
            }
        };
        put(&self.cluster().join("hosts").join(name), "/data/config");
        put(image, &format!("{IMAGES}/linux"));
        host.detach(&["understudy", "agent", "--config", "/data/config"])
            .expect("it starts");
    }

    /// Puts another image beside the first one, whose guest runs this command. Its disk is small: what
    /// fills it passes through emulated hosts.
    #[allow(dead_code, reason = "not every test has a use for it")]
    pub fn put_image(&self, name: &str, command: &str) {
        let manifest = self.folder.path().join("manifest.toml");
        let (before, after) = self.manifest.split_once("64 MiB").expect("a disk");
        let small = format!("{before}{DISK}{after}");
        std::fs::write(&manifest, told(&small, command)).expect("written");
        let folder = format!("{IMAGES}/{name}");
        for host in HOSTS.map(|name| host(&self.lab, name)) {
            run(&host, &["mkdir", "-p", &folder]);
            for file in ["vmlinux", "initrd.img"] {
                run(&host, &["ln", &format!("{IMAGES}/linux/{file}"), &folder]);
            }
            let there = Path::new(&folder).join("manifest.toml");
            host.put(&manifest, &there).expect("put");
        }
    }

    /// Starts a process of this program on the fourth machine.
    pub fn beside(&mut self, words: &[&str]) {
        let words = [&[text(program())], words].concat();
        let child = self.lab.machine(&words).spawn().expect("it starts");
        self.processes.push(child);
    }

    /// An operator's command; what it prints.
    pub fn operate(&self, words: &[&str]) -> Result<String, String> {
        let words = [&[text(program())], words].concat();
        let mut command = self.lab.machine(&words);
        let output = command.env("UNDERSTUDY_CLUSTER", self.cluster()).output();
        let output = output.expect("it starts");
        let said = |bytes| String::from_utf8_lossy(bytes).into_owned();
        if output.status.success() {
            Ok(said(&output.stdout))
        } else {
            Err(said(&output.stderr))
        }
    }

    /// All that can be known of it, for a test that fails.
    pub fn tell(&self) -> String {
        let mut told = String::new();
        for words in [&["status", "--json"][..], &["events"]] {
            let (Ok(said) | Err(said)) = self.operate(words);
            writeln!(told, "{words:?}:\n{said}").expect("memory");
        }
        for name in HOSTS {
            let words = ["sh", "-c", "tail -n 40 /data/config/data/vms/*/console.log"];
            match host(&self.lab, name).run(&words) {
                Ok(console) => writeln!(told, "consoles on {name}:\n{}", console.text()),
                Err(error) => writeln!(told, "{name} tells nothing: {error}"),
            }
            .expect("memory");
        }
        told
    }

    /// Looks at the status until something is there.
    pub fn until<T>(&self, what: &str, mut look: impl FnMut(&Value) -> Option<T>) -> T {
        let began = Instant::now();
        loop {
            let looked = Instant::now();
            // A host that has died makes the command fail, and the others are shown all the same.
            let words = [text(program()), "status", "--json"];
            let mut command = self.lab.machine(&words);
            let said = command.env("UNDERSTUDY_CLUSTER", self.cluster()).output();
            let said = said.expect("it starts");
            let status = serde_json::from_slice(&said.stdout).unwrap_or_default();
            if let Some(seen) = look(&status) {
                println!("{what}: after {:?}", began.elapsed());
                return seen;
            }
            let patient = began.elapsed() < PATIENCE;
            assert!(patient, "{what} has not happened:\n{}", self.tell());
            std::thread::sleep(LOOK_EVERY.max(looked.elapsed() * REST));
        }
    }
}

pub fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

pub fn end(name: &str) -> End {
    name.parse().expect("the name of an end")
}

/// What a host says of a VM; nothing that is there if it does not know it.
pub fn of<'a>(status: &'a Value, host: &str, vm: &str) -> &'a Value {
    const NOTHING: &Value = &Value::Null;
    let vms = status["hosts"][host]["vms"].as_array();
    let found = vms.and_then(|vms| vms.iter().find(|one| one["vm"] == vm));
    found.unwrap_or(NOTHING)
}
