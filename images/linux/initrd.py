"""Builds the guest's initial RAM disk from packages of the build host's Debian release.

The packages are downloaded and unpacked, never installed. Of each program only its file and the
libraries that it names (and those name, and so on) are taken. The archive is the same for the same
packages: sorted, with fixed times, owners and inode numbers.
"""

import os
import re
import shutil
import stat
import struct
import subprocess
from collections.abc import Iterable
from pathlib import Path

# Where programs look for libraries, in order. Debian's are in the second.
LOADER = "ld-linux-x86-64.so.2"
LIBRARY_FOLDERS = ["lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu", "lib64", "usr/lib64"]
MAGIC = b"070701"


def package_closure(packages: Iterable[str]) -> list[str]:
    """The packages and the libraries and Pythons they depend on, by name."""
    text = subprocess.run(
        ["apt-cache", "depends", "--recurse", "--no-recommends", "--no-suggests", "--no-conflicts",
         "--no-breaks", "--no-replaces", "--no-enhances", *packages],
        check=True, capture_output=True, text=True).stdout
    names = {line.strip() for line in text.splitlines() if line and not line[0].isspace()}
    # Of what they depend on, only libraries are of use here: not Perl, not the tools of the
    # installation. (Virtual packages come in angle brackets, foreign ones with a colon.)
    plain = {name for name in names if "<" not in name and ":" not in name}
    libraries = {name for name in plain if name.startswith(("lib", "zlib")) and "perl" not in name}
    pythons = {name for name in plain if re.fullmatch(r"python3[\d.]*(-minimal)?", name)}
    return sorted(libraries | pythons | set(packages))


def versions(packages: list[str]) -> str:
    """The candidates' versions, one package a line: what the archive is made of."""
    text = subprocess.run(["apt-cache", "policy", *packages], check=True, capture_output=True,
                          text=True, env={**os.environ, "LC_ALL": "C"}).stdout
    lines, name = [], ""
    for line in text.splitlines():
        if line and not line[0].isspace():
            name = line.rstrip(":")
        elif line.strip().startswith("Candidate:"):
            lines.append(f"{name} {line.split()[1]}")
    return "\n".join(sorted(lines))


def unpack_packages(packages: list[str], cache: Path, root: Path) -> None:
    """Downloads what the cache lacks and unpacks all of it below `root`."""
    cache.mkdir(parents=True, exist_ok=True)
    subprocess.run(["apt-get", "-q", "download", *packages], check=True, cwd=cache,
                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    wanted = dict(line.split() for line in versions(packages).splitlines())
    for name, version in wanted.items():
        # APT escapes the epoch's colon in file names.
        escaped = version.replace(":", "%3a")
        for found in sorted(cache.glob(f"{name}_{escaped}_*.deb")):
            subprocess.run(["dpkg-deb", "-x", str(found), str(root)], check=True)


def needed(path: Path) -> list[str]:
    """The libraries that a program or library names."""
    text = subprocess.run(["objdump", "-p", str(path)], check=True, capture_output=True,
                          text=True).stdout
    return [line.split()[1] for line in text.splitlines() if line.strip().startswith("NEEDED")]


def is_elf(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"\x7fELF"


def resolve(root: Path, name: str) -> Path | None:
    """Where in the unpacked packages a library is."""
    for folder in LIBRARY_FOLDERS:
        path = root / folder / name
        if path.exists():
            return path
    return None


class Archive:
    """The files of the RAM disk: path without leading slash → (mode, content, device)."""

    def __init__(self) -> None:
        self.entries: dict[str, tuple[int, bytes, tuple[int, int]]] = {}

    def folder(self, path: str) -> None:
        parts = path.split("/")
        for end in range(1, len(parts) + 1):
            self.entries.setdefault("/".join(parts[:end]), (stat.S_IFDIR | 0o755, b"", (0, 0)))

    def file(self, path: str, content: bytes, mode: int) -> None:
        if "/" in path:
            self.folder(path.rsplit("/", 1)[0])
        self.entries[path] = (stat.S_IFREG | mode, content, (0, 0))

    def link(self, path: str, target: str) -> None:
        if "/" in path:
            self.folder(path.rsplit("/", 1)[0])
        self.entries[path] = (stat.S_IFLNK | 0o777, target.encode(), (0, 0))

    def device(self, path: str, major: int, minor: int) -> None:
        self.folder(path.rsplit("/", 1)[0])
        self.entries[path] = (stat.S_IFCHR | 0o600, b"", (major, minor))

    def program(self, root: Path, path: str) -> None:
        """A program (or library) of the packages with all that it names."""
        source = root / path
        if path in self.entries:
            return
        self.file(path, source.read_bytes(), 0o755)
        if not is_elf(source):
            return
        for name in needed(source):
            library = resolve(root, name)
            if library is None:
                raise SystemExit(f"{path} needs {name}, which no package has brought")
            self.program(root, str(library.relative_to(root)))

    def programs(self, root: Path, pattern: str) -> None:
        """The programs of the packages that a pattern names, links among them included."""
        found = sorted(root.glob(pattern))
        if not found:
            raise SystemExit(f"no package has brought {pattern}")
        for path in found:
            if path.is_symlink():
                self.link(str(path.relative_to(root)), os.readlink(path))
            self.program(root, str(path.resolve().relative_to(root.resolve())))

    def tree(self, root: Path, path: str, skip: tuple[str, ...] = ()) -> None:
        """A whole folder of the packages."""
        for found in sorted((root / path).rglob("*")):
            name = str(found.relative_to(root))
            if any(part in skip for part in found.parts):
                continue
            if found.is_symlink():
                self.link(name, os.readlink(found))
            elif found.is_dir():
                self.folder(name)
            elif is_elf(found):
                self.program(root, name)
            else:
                self.file(name, found.read_bytes(), 0o755 if os.access(found, os.X_OK) else 0o644)

    def bytes(self) -> bytes:
        """The archive in the kernel's format ("newc")."""
        out = bytearray()
        for inode, (path, entry) in enumerate(sorted(self.entries.items()), start=1):
            append(out, path, inode, *entry)
        append(out, "TRAILER!!!", 0, 0, b"", (0, 0))
        out += b"\0" * (-len(out) % 512)
        return bytes(out)


def append(out: bytearray, path: str, inode: int, mode: int, content: bytes,
           device: tuple[int, int]) -> None:
    name = path.encode() + b"\0"
    links = 2 if stat.S_ISDIR(mode) else 1
    fields = [inode, mode, 0, 0, links, 0, len(content), 0, 0, *device, len(name), 0]
    out += MAGIC + b"".join(b"%08X" % field for field in fields) + name
    out += b"\0" * (-len(out) % 4)
    out += content
    out += b"\0" * (-len(out) % 4)


def common(root: Path, init: bytes) -> Archive:
    """What every RAM disk has: init, busybox, and the files that C libraries look for."""
    archive = Archive()
    for folder in ["bin", "data", "dev", "etc", "proc", "root", "run", "sbin", "sys", "tmp",
                   "usr/bin", "usr/sbin", "var/lib", "var/log", "var/tmp"]:
        archive.folder(folder)
    archive.device("dev/console", 5, 1)
    archive.file("init", init, 0o755)
    archive.program(root, "bin/busybox")
    archive.link("bin/sh", "busybox")
    # Programs name their loader by this path.
    loader = str(resolve(root, LOADER).relative_to(root))
    archive.program(root, loader)
    if not loader.startswith("lib64/"):
        archive.link(f"lib64/{LOADER}", f"/{loader}")
    users = b"root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n" \
            b"www-data:x:33:33:www-data:/var/www:/bin/false\n"
    archive.file("etc/passwd", users, 0o644)
    archive.file("etc/group", b"root:x:0:\nwww-data:x:33:\nnogroup:x:65534:\n", 0o644)
    archive.file("etc/hosts", b"127.0.0.1 localhost guest\n", 0o644)
    archive.file("etc/nsswitch.conf", b"passwd: files\ngroup: files\nhosts: files\n", 0o644)
    return archive
