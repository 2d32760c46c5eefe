use std::error::Error;

use super::*;

fn message(error: &ImageError) -> String {
    let source = error.source().map(ToString::to_string);
    format!("{error}: {}", source.unwrap_or_default())
}

#[test]
fn embedded_images_can_be_had() {
    let images = embedded().unwrap();
    assert_eq!(images.len(), EMBEDDED.len());
    for image in &images {
        assert_eq!(&find(&image.name).unwrap(), image);
        assert!(image.kernel.starts_with(b"\x7fELF"));
    }
    let ledger = find("ledger").unwrap();
    assert_eq!(ledger.modes, [Mode::Replayed]);
    assert_eq!(ledger.digest(), ledger.boot().digest());
    let network = ledger.network.as_ref().unwrap();
    assert_eq!(network.ports, [6379]);
    let told = format!("ip={}/{}", network.address, network.prefix);
    assert_eq!(ledger.machine().command_line, told);
}

#[test]
fn a_misspelt_name_gets_the_closest() {
    let error = find("leger").unwrap_err();
    assert!(
        error.to_string().contains("did you mean 'ledger'?"),
        "{error}"
    );
}

#[test]
fn a_folder_with_a_manifest_is_an_image() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().to_str().unwrap();
    assert!(message(&find(path).unwrap_err()).contains(MANIFEST));
    let manifest =
        "name = 'mine'\nkernel = 'k'\ninitrd = 'i'\nmemory = 8192\nmodes = ['checkpointed']\n";
    fs::write(folder.path().join(MANIFEST), manifest).unwrap();
    assert!(matches!(find(path), Err(ImageError::Read { path, .. }) if path.ends_with("k")));
    fs::write(folder.path().join("k"), "kernel").unwrap();
    fs::write(folder.path().join("i"), "initrd").unwrap();
    let image = find(path).unwrap();
    assert_eq!((image.memory, image.disks.len()), (8192, 0));
    assert_eq!(image.initrd.as_deref(), Some(&b"initrd"[..]));
    let without = BootImage::new(image.kernel.clone());
    assert_ne!(image.digest(), without.digest());
    assert_eq!(image.machine().mac, None);
}

#[test]
fn a_wrong_manifest_is_explained() {
    let image = |lines: &str| {
        let text = format!("name = 'x'\nkernel = 'k'\nmodes = ['replayed']\n{lines}\n");
        let read = |_: PathBuf| Ok(Bytes::new());
        Image::from_manifest(&text, "here", &|file| Ok(file.into()), &read)
    };
    assert!(image("memory = '1 MiB'").is_ok());
    let network = "memory = '1 MiB'\n[network]\n";
    for (lines, wanted) in [
        ("", "missing field `memory`"),
        ("memory = '1 MiB'\ncolour = 1", "unknown field `colour`"),
        ("memory = 1000", "multiple of 4096 bytes"),
        ("memory = -4096", "multiple of 4096 bytes"),
        ("memory = '1 MB'", "multiple of 4096 bytes"),
        ("memory = '99999999999999 GiB'", "multiple of 4096 bytes"),
        ("memory = '1 MiB'\ndisks = [100]", "multiple of 512 bytes"),
        (
            "memory = '1 MiB'\ndisks = [512, 512, 512, 512, 512]",
            "at most 4",
        ),
        (
            &format!("{network}mac = '01:00:00:00:00:00'\naddress = '10.0.0.2/8'"),
            "unicast",
        ),
        (
            &format!("{network}mac = '02:00:00:00:00'\naddress = '10.0.0.2/8'"),
            "unicast",
        ),
        (
            &format!("{network}mac = '02:00:00:00:00:00'\naddress = '10.0.0.2'"),
            "prefix",
        ),
    ] {
        let told = message(&image(lines).unwrap_err());
        assert!(told.contains(wanted), "{lines}: {told}");
    }
}

#[test]
fn files_outside_the_folder_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    for file in ["../k", "/etc/passwd", "a/b", "", ".."] {
        let manifest = format!("name = 'x'\nkernel = '{file}'\nmemory = 4096\nmodes = []\n");
        fs::write(folder.path().join(MANIFEST), manifest).unwrap();
        let error = find(folder.path().to_str().unwrap()).unwrap_err();
        assert!(matches!(error, ImageError::Outside { .. }), "{file}");
    }
}
