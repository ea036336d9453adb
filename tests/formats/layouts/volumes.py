"""Real file systems, volume groups and partition tables in plain files, for the tests of ``formats.layouts``."""

from __future__ import annotations

import os
import random
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path

from formats.block import BlockSource, Extent, Kind
from formats.images.raw import RawFile
from formats.layouts.used import UsedMap

MIB = 1 << 20


def run(*command: str | Path, stdin: str = "", check: bool = True, **environment: str) -> str:
    """Run a program found on PATH or in the administrator's folders; return its standard output."""
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
    finished = subprocess.run(
        [str(word) for word in command],
        input=stdin,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PATH": path, "LC_ALL": "C", **environment},
    )
    if check and finished.returncode:
        raise AssertionError(f"{command} exited with {finished.returncode}: {finished.stderr or finished.stdout}")
    return finished.stdout


def blank(path: Path, size: int) -> Path:
    """A sparse file of ``size`` bytes."""
    with path.open("wb") as file:
        file.truncate(size)
    return path


def tree(folder: Path, seed: int = 1, files: int = 60) -> Path:
    """A folder of files of many sizes, sparse and empty ones, links and deep folders."""
    generator = random.Random(seed)
    for number in range(files):
        place = folder / f"d{number % 7}" / ("deeper/" * (number % 3))
        place.mkdir(parents=True, exist_ok=True)
        (place / f"f{number}").write_bytes(generator.randbytes(generator.choice([0, 1, 100, 5000, 70_000, 400_000])))
    with (folder / "sparse").open("wb") as file:
        file.write(b"head")
        file.seek(3 * MIB)
        file.write(b"tail")
    (folder / "link").symlink_to("d0/f0")
    os.link(folder / "d0" / "f0", folder / "hard")
    return folder


def make_ext(path: Path, options: str, mebibytes: int, content: Path | None = None) -> Path:
    """A file system of ``options`` made by mke2fs in a new file."""
    blank(path, mebibytes * MIB)
    filling = ["-d", str(content)] if content else []
    run("mke2fs", "-q", "-F", *options.split(), *filling, path)
    return path


def free_of(path: Path) -> tuple[int, int, list[tuple[int, int]]]:
    """What dumpe2fs says: the block size, the number of blocks, and the runs of free blocks as (first, end)."""
    text = run("dumpe2fs", path)
    numbers = dict(re.findall(r"^(Block size|Block count|Free blocks|Cluster size):\s+(\d+)$", text, re.MULTILINE))
    block = int(numbers["Block size"])
    cluster = int(numbers.get("Cluster size", block)) // block
    runs: list[tuple[int, int]] = []
    for line in re.findall(r"^  Free blocks: (.*)$", text, re.MULTILINE):
        for first, last in re.findall(r"(\d+)(?:-(\d+))?", line):
            runs.append((int(first), int(last or first) + cluster))  # the last one named is a cluster's first block
    joined: list[tuple[int, int]] = []
    for first, end in sorted(runs):
        if joined and joined[-1][1] == first:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((first, end))
    assert sum(end - first for first, end in joined) == int(numbers["Free blocks"])
    return block, int(numbers["Block count"]), joined


def tiles(used: UsedMap) -> list[Extent]:
    """The whole map; asserts that it tiles the volume, merged, in DATA and ZERO."""
    found = list(used.extents(0, used.size))
    position = 0
    for extent in found:
        assert extent.start == position
        assert extent.length > 0
        assert extent.kind in (Kind.DATA, Kind.ZERO)
        position = extent.end
    assert position == used.size
    assert all(one.kind is not other.kind for one, other in pairwise(found))
    return found


def free_bytes(used: UsedMap) -> int:
    """Bytes of all free extents."""
    return sum(extent.length for extent in tiles(used) if extent.kind is Kind.ZERO)


def copy_used(source: BlockSource, used: UsedMap, target: Path) -> Path:
    """Copy what is used into a new file, and fill what is not with rubbish: whoever needs it, will show."""
    rubbish = random.Random(3).randbytes(64 * 1024)
    with target.open("wb") as file:
        for extent in used.extents(0, used.size):
            for start in range(extent.start, extent.end, len(rubbish)):
                piece = bytearray(min(len(rubbish), extent.end - start))
                if extent.kind is Kind.DATA:
                    source.readinto(memoryview(piece), start)
                else:
                    piece[:] = rubbish[: len(piece)]
                file.seek(start)
                file.write(piece)
        file.truncate(used.size)
    return target


def files_of(image: Path, scratch: Path) -> dict[str, bytes]:
    """Every file of an ext image, read by debugfs."""
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    run("debugfs", "-R", f'rdump / "{scratch}"', image)
    return {
        str(path.relative_to(scratch)): path.read_bytes()
        for path in sorted(scratch.rglob("*"))
        if path.is_file() and not path.is_symlink()
    }


class CountedFile(RawFile):
    """A file that counts the reads."""

    reads = 0

    def readinto(self, buffer: memoryview, offset: int) -> None:
        """Count and read."""
        self.reads += 1
        super().readinto(buffer, offset)


class LvmGroup:
    """A volume group made by LVM's own tools on loop devices, without the kernel's device mapper: only its metadata is
    made.
    """

    def __init__(self, folder: Path, devices: list[str]) -> None:
        self._folder = folder
        self.devices = devices

    def lvm(self, command: str, *arguments: str) -> str:
        """Run an LVM command that sees these devices alone."""
        return run(
            command, "--driverloaded", "n", *arguments, LVM_SYSTEM_DIR=str(self._folder), LVM_SUPPRESS_FD_WARNINGS="1"
        )

    def create(self, name: str, volume: str, *arguments: str) -> None:
        """A logical volume of the group ``name``."""
        self.lvm("lvcreate", "-an", "-Zn", "-Wn", "-y", "-n", volume, *arguments[:-1], name, *arguments[-1:])


@contextmanager
def lvm_group(folder: Path, name: str, files: list[Path]) -> Iterator[LvmGroup]:
    """Attach the files to loop devices and make a volume group of them; needs root."""
    system = folder / "lvm"
    (system / "lock").mkdir(parents=True)
    with ExitStack() as stack:
        devices: list[str] = []
        for file in files:
            device = run("losetup", "-f", "--show", file).strip()
            stack.callback(run, "losetup", "-d", device)
            devices.append(device)
        accepted = ",".join(f'"a|^{device}$|"' for device in devices)
        (system / "lvm.conf").write_text(
            f'devices {{ use_devicesfile=0 filter=[{accepted},"r|.*|"] global_filter=[{accepted},"r|.*|"]\n'
            'obtain_device_list_from_udev=0 external_device_info_source="none" }\n'
            f'global {{ locking_dir="{system}/lock" use_lvmpolld=0 event_activation=0 }}\n'
            "activation { udev_sync=0 udev_rules=0 monitoring=0 verify_udev_operations=0 }\n"
            "backup { backup=0 archive=0 }\n"
        )
        group = LvmGroup(system, devices)
        group.lvm("pvcreate", "-q", "-y", *devices)
        group.lvm("vgcreate", "-q", "-s", "4M", name, *devices)
        yield group
