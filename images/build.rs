//! Builds the ledger (`images/ledger`), which the library embeds: a cargo of its own with its own
//! flags, as the ledger runs on a machine without an operating system.

use std::path::{Path, PathBuf};
use std::process::{Command, exit};
use std::{env, fs};

/// The target whose prebuilt `core` and `alloc` the ledger is linked with: the one everybody has.
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// What of the environment reaches the inner cargo: where its tools and registries are, not how
/// the outer one was asked to build.
const KEPT: [&str; 7] = [
    "PATH",
    "HOME",
    "CARGO_HOME",
    "RUSTUP_HOME",
    "RUSTUP_TOOLCHAIN",
    "TMPDIR",
    "USER",
];
const KEPT_PREFIXES: [&str; 7] = [
    "CARGO_HTTP_",
    "CARGO_NET_",
    "CARGO_REGISTR",
    "CARGO_SOURCE_",
    "SSL_CERT_",
    "HTTP",
    "http",
];

fn main() {
    let root = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("cargo says where we are"));
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo says where to build"));
    let ledger = root.join("images/ledger");
    println!("cargo::rerun-if-changed=images/build.rs");
    for part in ["Cargo.toml", "Cargo.lock", "ledger.ld", "src"] {
        println!("cargo::rerun-if-changed={}", ledger.join(part).display());
    }
    let target_dir = out.join("ledger-target");
    let status = cargo(&ledger, &target_dir).status();
    if !status.is_ok_and(|status| status.success()) {
        eprintln!("images/ledger does not build: see above; it needs the target {TARGET}");
        exit(1);
    }
    // Copied only when it differs, so that what embeds it is not built again for nothing.
    let built = fs::read(target_dir.join(TARGET).join("release/ledger"));
    let built = built.expect("cargo has just built the ledger");
    let elf = out.join("ledger.elf");
    if fs::read(&elf).ok().as_ref() != Some(&built) {
        fs::write(&elf, built).expect("the build folder can be written");
    }
}

fn cargo(ledger: &Path, target_dir: &Path) -> Command {
    let cargo = env::var_os("CARGO").expect("cargo says who it is");
    let mut command = Command::new(cargo);
    command
        .args([
            "build",
            "--release",
            "--locked",
            "--bin",
            "ledger",
            "--target",
            TARGET,
        ])
        .arg("--manifest-path")
        .arg(ledger.join("Cargo.toml"))
        .arg("--target-dir")
        .arg(target_dir)
        .env_clear()
        .envs(env::vars_os().filter(|(name, _)| {
            name.to_str().is_some_and(|name| {
                KEPT.contains(&name) || KEPT_PREFIXES.iter().any(|it| name.starts_with(it))
            })
        }))
        .env("CARGO_ENCODED_RUSTFLAGS", flags(ledger).join("\x1f"));
    command
}

/// A static image at fixed addresses, without a C library, the same wherever it is built.
fn flags(ledger: &Path) -> Vec<String> {
    let mut flags: Vec<String> = [
        "-Cpanic=abort",
        "-Crelocation-model=static",
        "-Cforce-unwind-tables=no",
        "-Clink-arg=-nostartfiles",
        "-Clink-arg=-nostdlib",
        "-Clink-arg=-static",
        "-Clink-arg=-no-pie",
        "-Clink-arg=-Wl,--build-id=none",
        "-Clink-arg=-Wl,-z,max-page-size=4096",
    ]
    .map(String::from)
    .into();
    flags.push(format!(
        "-Clink-arg=-Wl,-T,{}",
        ledger.join("ledger.ld").display()
    ));
    flags.push(format!("--remap-path-prefix={}=ledger", ledger.display()));
    let home = env::var_os("CARGO_HOME").map(PathBuf::from).or_else(|| {
        let home = env::var_os("HOME")?;
        Some(Path::new(&home).join(".cargo"))
    });
    if let Some(home) = home {
        flags.push(format!("--remap-path-prefix={}=cargo", home.display()));
    }
    flags
}
