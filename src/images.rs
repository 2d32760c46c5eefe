//! Guest images: the ones that are embedded, and folders with a manifest.
//!
//! ```toml
//! name = "ledger"
//! description = "what it is, in a line"
//! kernel = "ledger"                  # a file of the folder, like initrd
//! initrd = "initrd.img"              # optional
//! command-line = "ip=10.77.0.2/8"
//! memory = "64 MiB"
//! disks = ["64 MiB"]                 # or { size = "64 MiB", content = "a file of the folder" }
//! acpi = true                        # optional: tell the kernel of its devices by ACPI tables
//! modes = ["replayed"]               # also "checkpointed", "none" (it runs, and nothing protects it)
//! needs = ["native-ring-0"]          # optional: what a host must have (here VMX or SVM)
//!
//! [network]                          # optional
//! mac = "02:75:64:00:00:02"
//! address = "10.77.0.2/8"            # what the guest configures itself; gateways share the subnet
//! ports = [6379]                     # the TCP ports it serves
//! ```

mod disk;

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::{fmt, fs, io};

use bytes::Bytes;
use replay_log::ImageDigest;
use serde::{Deserialize, Deserializer, Serialize, de};
use thiserror::Error;
use vmm::boot::BootImage;
use vmm::config::MachineConfig;

use disk::DiskManifest;
pub use disk::{DiskSpec, FillError};

/// The file that makes a folder an image.
const MANIFEST: &str = "manifest.toml";

/// The most disks a machine has.
const MAX_DISKS: usize = vmm::devices::layout::DISK_IRQS.len();

/// The longest kernel or initrd in bytes; both together are one message to a VMM process.
const FILE_MAX: u64 = 240 << 20;

/// Everything embedded: manifest and kernel.
const EMBEDDED: [(&str, &str, &[u8]); 1] = [(
    "ledger",
    include_str!("../images/ledger/manifest.toml"),
    include_bytes!(concat!(env!("OUT_DIR"), "/ledger.elf")),
)];

/// Images of this repository that are not embedded: manifest, and how they are had.
const BUILT_ELSEWHERE: [(&str, &str); 1] = [(
    include_str!("../images/linux/manifest.toml"),
    "build it with images/linux/build and name its folder",
)];

/// How a guest can be protected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// Every event recorded and replayed.
    Replayed,
    /// By epochs that are cuts.
    Checkpointed,
    /// Not at all: it runs on one host, and nothing of it is recorded.
    None,
}

/// What an image needs of a host beyond what every guest does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Need {
    /// The CPU executes ring 0 by itself, as with VMX and SVM: a kernel that was not made for
    /// Understudy executes what KVM cannot emulate.
    #[serde(rename = "native-ring-0")]
    NativeRing0,
}

impl Need {
    /// What it is, in a sentence.
    pub const fn words(self) -> &'static str {
        match self {
            Self::NativeRing0 => "a CPU that executes ring 0 of a guest by itself,",
        }
    }
}

impl Mode {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Replayed, Self::Checkpointed, Self::None];
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Replayed => "replayed",
            Self::Checkpointed => "checkpointed",
            Self::None => "none",
        })
    }
}

/// The network device that an image wants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetworkSpec {
    /// Its Ethernet address.
    pub mac: [u8; 6],
    /// The address that the guest gives itself.
    pub address: Ipv4Addr,
    /// The length of the subnet's prefix in bits.
    pub prefix: u8,
    /// The TCP ports that the guest serves.
    pub ports: Vec<u16>,
}

/// Something that can be run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    /// What it is called.
    pub name: String,
    /// What it is, in a line.
    pub description: String,
    /// The kernel: an ELF file or a Linux bzImage.
    pub kernel: Bytes,
    /// The initial RAM disk.
    pub initrd: Option<Bytes>,
    /// The kernel command line.
    pub command_line: String,
    /// Guest memory in bytes, a multiple of 4,096.
    pub memory: u64,
    /// The disks, in device order.
    pub disks: Vec<DiskSpec>,
    /// The network device, if it wants one.
    pub network: Option<NetworkSpec>,
    /// Whether ACPI tables tell the kernel of its devices.
    pub acpi: bool,
    /// How it can be protected, best first.
    pub modes: Vec<Mode>,
    /// What it needs of a host.
    pub needs: Vec<Need>,
}

/// Why there is no such image.
#[derive(Debug, Error)]
pub enum ImageError {
    /// No embedded image has this name, and no folder either.
    #[error(
        "there is no image '{name}': did you mean '{closest}'? (A folder with a {MANIFEST} is an image, too.)"
    )]
    Unknown {
        /// What was asked for.
        name: String,
        /// The closest embedded one.
        closest: &'static str,
    },
    /// No embedded image has this digest.
    #[error(
        "no image of this program has the digest {digest}…: name the folder of the image it was recorded from, or use the version of Understudy that recorded it"
    )]
    NoDigest {
        /// Its first digits.
        digest: String,
    },
    /// A file of the folder cannot be read.
    #[error("the image's file {} cannot be read", path.display())]
    Read {
        /// Which file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The manifest is not what it must be.
    #[error("{origin} is not the manifest of an image")]
    Manifest {
        /// Where it is.
        origin: String,
        /// What is wrong, and where.
        #[source]
        source: Box<toml::de::Error>,
    },
    /// A file that is to fill a disk.
    #[error(transparent)]
    Fill(#[from] FillError),
    /// More to boot from than is handed to a VMM.
    #[error("{} has {len} bytes: kernel and initrd have at most {FILE_MAX} each", path.display())]
    TooLarge {
        /// Which file.
        path: PathBuf,
        /// Its length.
        len: u64,
    },
    /// Too many disks.
    #[error("{origin} asks for {count} disks: a machine has at most {MAX_DISKS}")]
    TooManyDisks {
        /// The manifest.
        origin: String,
        /// How many.
        count: usize,
    },
    /// A file outside of the folder.
    #[error("{origin} names the file '{file}': name files of the image's own folder")]
    Outside {
        /// The manifest.
        origin: String,
        /// The file.
        file: String,
    },
}

/// The manifest as it is written.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct Manifest {
    name: String,
    #[serde(default)]
    description: String,
    kernel: String,
    initrd: Option<String>,
    #[serde(default)]
    command_line: String,
    memory: Size<4096>,
    #[serde(default)]
    disks: Vec<DiskManifest>,
    network: Option<NetworkManifest>,
    #[serde(default)]
    acpi: bool,
    modes: Vec<Mode>,
    #[serde(default)]
    needs: Vec<Need>,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct NetworkManifest {
    #[serde(deserialize_with = "mac")]
    mac: [u8; 6],
    #[serde(deserialize_with = "address")]
    address: (Ipv4Addr, u8),
    #[serde(default)]
    ports: Vec<u16>,
}

/// A number of bytes that is a multiple of `UNIT`: `"64 MiB"`, or bytes as a number.
#[derive(Clone, Copy)]
struct Size<const UNIT: u64>(u64);

impl Image {
    /// The image as a VMM boots it.
    pub fn boot(&self) -> BootImage {
        BootImage {
            kernel: self.kernel.clone(),
            initrd: self.initrd.clone(),
        }
    }

    /// The machine it wants.
    pub fn machine(&self) -> MachineConfig {
        MachineConfig {
            memory: self.memory,
            command_line: self.command_line.clone(),
            mac: self.network.as_ref().map(|network| network.mac),
            disks: self.disks.iter().map(|disk| disk.size).collect(),
            acpi: self.acpi,
        }
    }

    /// The hash of what is loaded from it. (What machine it runs on is in the log's header, too.)
    pub fn digest(&self) -> ImageDigest {
        self.boot().digest()
    }

    /// The image that a manifest describes; `place` says where its files are, `read` gets them.
    fn from_manifest(
        text: &str,
        origin: &str,
        place: &dyn Fn(&str) -> Result<PathBuf, ImageError>,
        read: &dyn Fn(PathBuf) -> Result<Bytes, ImageError>,
    ) -> Result<Self, ImageError> {
        let manifest: Manifest = toml::from_str(text).map_err(|source| ImageError::Manifest {
            origin: origin.into(),
            source: Box::new(source),
        })?;
        if manifest.disks.len() > MAX_DISKS {
            return Err(ImageError::TooManyDisks {
                origin: origin.into(),
                count: manifest.disks.len(),
            });
        }
        let disks = manifest.disks.into_iter();
        let file = |name: &str| read(place(name)?);
        Ok(Self {
            kernel: file(&manifest.kernel)?,
            initrd: manifest.initrd.as_deref().map(file).transpose()?,
            name: manifest.name,
            description: manifest.description,
            command_line: manifest.command_line,
            memory: manifest.memory.0,
            disks: disks
                .map(|disk| disk.resolve(place))
                .collect::<Result<_, _>>()?,
            network: manifest.network.map(|network| NetworkSpec {
                mac: network.mac,
                address: network.address.0,
                prefix: network.address.1,
                ports: network.ports,
            }),
            acpi: manifest.acpi,
            modes: manifest.modes,
            needs: manifest.needs,
        })
    }

    /// An embedded image.
    fn embedded(manifest: &str, name: &str, kernel: &'static [u8]) -> Result<Self, ImageError> {
        Self::from_manifest(manifest, name, &|file| Ok(file.into()), &|_| {
            Ok(Bytes::from_static(kernel))
        })
    }

    /// A folder with a manifest.
    fn from_folder(folder: &Path) -> Result<Self, ImageError> {
        let path = folder.join(MANIFEST);
        let text = fs::read_to_string(&path).map_err(|source| ImageError::Read {
            path: path.clone(),
            source,
        })?;
        let origin = path.display().to_string();
        let place = |file: &str| {
            let inside = Path::new(file).file_name().is_some_and(|name| name == file);
            if !inside {
                return Err(ImageError::Outside {
                    origin: origin.clone(),
                    file: file.into(),
                });
            }
            Ok(folder.join(file))
        };
        Self::from_manifest(&text, &origin, &place, &read_file)
    }
}

/// A file of an image's folder; its length is looked at before it is read.
fn read_file(path: PathBuf) -> Result<Bytes, ImageError> {
    match fs::metadata(&path).map(|found| found.len()) {
        Ok(len) if len > FILE_MAX => return Err(ImageError::TooLarge { path, len }),
        Ok(_) => {}
        Err(source) => return Err(ImageError::Read { path, source }),
    }
    match fs::read(&path) {
        Ok(bytes) => Ok(Bytes::from(bytes)),
        Err(source) => Err(ImageError::Read { path, source }),
    }
}

/// The image with this name, or in this folder (whatever contains a `/`, or is a folder).
pub fn find(name: &str) -> Result<Image, ImageError> {
    for (known, manifest, kernel) in EMBEDDED {
        if known == name {
            return Image::embedded(manifest, known, kernel);
        }
    }
    let folder = Path::new(name);
    if name.contains('/') || folder.is_dir() {
        return Image::from_folder(folder);
    }
    let closest = EMBEDDED
        .iter()
        .max_by(|(a, ..), (b, ..)| {
            strsim::jaro_winkler(name, a).total_cmp(&strsim::jaro_winkler(name, b))
        })
        .map_or("", |(known, ..)| known);
    Err(ImageError::Unknown {
        name: name.into(),
        closest,
    })
}

/// The embedded image with this digest.
pub fn with_digest(digest: ImageDigest) -> Result<Image, ImageError> {
    let found = embedded()?
        .into_iter()
        .find(|image| image.digest() == digest);
    found.ok_or_else(|| ImageError::NoDigest {
        digest: blake3::Hash::from_bytes(digest.0).to_hex()[..12].to_owned(),
    })
}

/// All embedded images.
pub fn embedded() -> Result<Vec<Image>, ImageError> {
    EMBEDDED
        .into_iter()
        .map(|(name, manifest, kernel)| Image::embedded(manifest, name, kernel))
        .collect()
}

/// Images that this version knows and does not carry: what their manifests say (their kernels are
/// empty here), and how to get them.
pub fn built_elsewhere() -> Result<Vec<(Image, &'static str)>, ImageError> {
    let image = |(manifest, how)| {
        Image::from_manifest(manifest, "images/", &|file| Ok(file.into()), &|_| {
            Ok(Bytes::new())
        })
        .map(|image| (image, how))
    };
    BUILT_ELSEWHERE.into_iter().map(image).collect()
}

impl<'de, const UNIT: u64> Deserialize<'de> for Size<UNIT> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor<const UNIT: u64>;
        impl<const UNIT: u64> de::Visitor<'_> for Visitor<UNIT> {
            type Value = Size<UNIT>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(
                    f,
                    "a size that is a multiple of {UNIT} bytes, for example \"64 MiB\""
                )
            }
            fn visit_i64<E: de::Error>(self, value: i64) -> Result<Self::Value, E> {
                let wrong = || E::invalid_value(de::Unexpected::Signed(value), &self);
                let bytes = u64::try_from(value).map_err(|_| wrong())?;
                multiple(bytes).ok_or_else(wrong)
            }
            fn visit_str<E: de::Error>(self, value: &str) -> Result<Self::Value, E> {
                size(value)
                    .and_then(multiple)
                    .ok_or_else(|| E::invalid_value(de::Unexpected::Str(value), &self))
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

fn multiple<const UNIT: u64>(bytes: u64) -> Option<Size<UNIT>> {
    (bytes > 0 && bytes.is_multiple_of(UNIT)).then_some(Size(bytes))
}

fn size(text: &str) -> Option<u64> {
    let (number, unit) = text.trim().split_once(' ')?;
    let shift = match unit.trim() {
        "KiB" => 10,
        "MiB" => 20,
        "GiB" => 30,
        _ => return None,
    };
    number.parse::<u64>().ok()?.checked_mul(1 << shift)
}

fn mac<'de, D: Deserializer<'de>>(deserializer: D) -> Result<[u8; 6], D::Error> {
    let text = String::deserialize(deserializer)?;
    let wrong = || {
        let wanted = &"a unicast Ethernet address, for example \"02:75:64:00:00:02\"";
        de::Error::invalid_value(de::Unexpected::Str(&text), wanted)
    };
    let mut mac = [0; 6];
    let mut parts = text.split(':');
    for byte in &mut mac {
        let part = parts
            .next()
            .filter(|part| part.len() == 2)
            .ok_or_else(wrong)?;
        *byte = u8::from_str_radix(part, 16).map_err(|_| wrong())?;
    }
    if parts.next().is_some() || mac[0] & 1 != 0 {
        return Err(wrong());
    }
    Ok(mac)
}

fn address<'de, D: Deserializer<'de>>(deserializer: D) -> Result<(Ipv4Addr, u8), D::Error> {
    let text = String::deserialize(deserializer)?;
    text.split_once('/')
        .and_then(|(address, prefix)| Some((address.parse().ok()?, prefix.parse().ok()?)))
        .filter(|(_, prefix)| (8..=24).contains(prefix))
        .ok_or_else(|| {
            let wanted =
                &"an IPv4 address with a prefix of 8 to 24 bits, for example \"10.77.0.2/8\"";
            de::Error::invalid_value(de::Unexpected::Str(&text), wanted)
        })
}

#[cfg(test)]
mod tests;
