"""What the files of a Linux machine at rest say of how it starts: read from its disks, nothing is started or mounted.

Read are ext2, ext3 and ext4 on partitions and plain logical volumes. Where the root is of another kind and /boot is not, kernels and
command line come from /boot alone. What is in the files is the guest's: everything is bounded, and what cannot be read is left out.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from formats.block import BlockSource
from formats.errors import ImageError
from formats.layouts.extfiles import ExtFiles
from formats.layouts.volumes import RestVolume, volumes
from formats.machine import Boot, Kernel, Machine, Volume
from p2v.collect import initramfs
from p2v.collect.inventory import kernels_of, release

_TEXT_MOST = 4 << 20
_INITRAMFS_MOST = 512 << 20
_IMAGES_MOST = 4  # kernels whose initramfs is looked into, the newest last in the list
_LISTING_SECONDS = 120.0
_DEVICE = re.compile(r"/dev/((?:[shv]d|xvd)a|nvme0n1|mmcblk0)(?=p?\d|\b)")
_NUMBER = re.compile(r"/dev/(?:(?:[shv]d|xvd)[a-z](\d+)|(?:nvme\d+n\d+|mmcblk\d+)p(\d+))")
_KERNEL_LINE = re.compile(r"^\s*linux(?:16|efi)?\s+(\S+)[ \t]*(.*)$", re.MULTILINE)
_RECOVERY = frozenset({"single", "recovery", "rescue", "emergency", "systemd.unit=rescue.target"})


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    """A line of fstab: what is mounted where."""

    spec: str
    place: str


class RestFiles:
    """The file systems of a machine at rest that can be read, at their places. Not thread-safe; it holds no resource."""

    def __init__(self, places: Mapping[str, ExtFiles]) -> None:
        self._places = dict(sorted(places.items(), key=lambda item: -len(item[0])))

    @classmethod
    def of(cls, machine: Machine, sources: Mapping[str, BlockSource]) -> RestFiles | None:
        """The machine's readable file systems; None when neither its root nor its /boot is among them."""
        return _mounted(volumes(sources, {disk.id: disk.table for disk in machine.disks}))

    @property
    def places(self) -> frozenset[str]:
        """Where something is mounted."""
        return frozenset(self._places)

    def read(self, path: str, most: int = _TEXT_MOST) -> bytes | None:
        """The content of a file; None when it is not there or lies where nothing can be read.

        ``ImageError`` when it is damaged or larger than ``most`` bytes.
        """
        inside = self._inside(path)
        return None if inside is None else inside[0].read(inside[1], most)

    def text(self, path: str) -> str:
        """A text file; "" for none, or one that is damaged."""
        with contextlib.suppress(ImageError):
            return (self.read(path) or b"").decode("utf-8", "replace")
        return ""

    def names(self, path: str) -> list[str]:
        """The names in a directory; none when it cannot be read."""
        with contextlib.suppress(ImageError):
            inside = self._inside(path)
            return [] if inside is None else inside[0].names(inside[1])
        return []

    def _inside(self, path: str) -> tuple[ExtFiles, str] | None:
        for place, files in self._places.items():
            if path == place or path.startswith(place.rstrip("/") + "/"):
                return files, path[len(place.rstrip("/")) :] or "/"
        return None


def learn(machine: Machine, sources: Mapping[str, BlockSource]) -> Machine:
    """The record of a Linux machine with what its own files add to it; as it was when they cannot be read.

    ``sources`` are its disks by id. Names of partitions (``/dev/sda1``) are given only where the machine has one disk: with
    several, their order is not known here.
    """
    found = volumes(sources, {disk.id: disk.table for disk in machine.disks})
    files = _mounted(found)
    if files is None:
        return machine
    line, default = _default_entry(files)
    name = _disk_name(machine, files, line)
    kernels = tuple(_kernels(files))
    versions = [kernel.version for kernel in kernels]
    running = default if default in versions else versions[-1] if versions else ""
    boot = replace(
        machine.boot,
        loader=machine.boot.loader or ("grub" if line else ""),
        command_line=line,
        consoles=tuple(word.removeprefix("console=") for word in line.split() if word.startswith("console=")),
        kernels=kernels,
        running_kernel=running,
    )
    return replace(
        machine,
        disks=tuple(replace(disk, name=name) for disk in machine.disks) if name else machine.disks,
        volumes=tuple(_volumes(found, name, files)),
        system=release(files.text("/etc/os-release") or files.text("/usr/lib/os-release")),
        boot=boot if kernels else Boot(disk=machine.boot.disk),
    )


# -- places ------------------------------------------------------------------------------------------------------------


def _mounted(found: Sequence[RestVolume]) -> RestFiles | None:
    readable: list[tuple[RestVolume, ExtFiles]] = []
    for volume in found:
        if volume.content == "ext":
            with contextlib.suppress(ImageError):
                readable.append((volume, ExtFiles(volume.source)))
    for _, files in readable:
        places = {"/": files}
        text = RestFiles(places).text("/etc/fstab")
        if not text:
            continue
        for entry in _entries(text):
            for volume, other in readable:
                if other is not files and _names(volume, other, entry.spec, found):
                    places.setdefault(entry.place, other)
        return RestFiles(places)
    for _, files in readable:
        if any(name.startswith("vmlinuz-") for name in RestFiles({"/": files}).names("/")):
            return RestFiles({"/boot": files})
    return None


def _entries(fstab: str) -> Iterator[_Entry]:
    for line in fstab.splitlines():
        words = line.split()
        if len(words) >= 3 and not words[0].startswith("#") and words[1].startswith("/"):
            yield _Entry(spec=words[0].replace('"', ""), place=words[1].rstrip("/") or "/")


def _names(volume: RestVolume, files: ExtFiles, spec: str, found: Sequence[RestVolume]) -> bool:
    """Whether an entry of fstab means this volume."""
    kind, mark, value = spec.partition("=")
    if mark:
        return (kind == "UUID" and value.lower() == volume.uuid) or (kind == "LABEL" and value == files.label)
    if volume.name:
        group, _, logical = volume.name.partition("/")
        mapped = f"{group.replace('-', '--')}-{logical.replace('-', '--')}"
        return spec in {f"/dev/{group}/{logical}", f"/dev/mapper/{mapped}"}
    match = _NUMBER.fullmatch(spec)
    alone = len({other.disk for other in found if not other.name}) == 1
    return bool(match and alone and int(match[1] or match[2]) == volume.number)


def _disk_name(machine: Machine, files: RestFiles, line: str) -> str:
    """What the machine calls its one disk; "" when it has several."""
    if len(machine.disks) != 1:
        return ""
    match = _DEVICE.search(f"{files.text('/etc/fstab')}\n{files.text('/etc/crypttab')}\n{line}")
    return match[1] if match else "sda"


def _volumes(found: Sequence[RestVolume], disk: str, files: RestFiles) -> Iterator[Volume]:
    specs = {entry.spec: entry.place for entry in _entries(files.text("/etc/fstab"))}
    for volume in found:
        if volume.name:
            group, _, logical = volume.name.partition("/")
            path, kind = f"/dev/mapper/{group.replace('-', '--')}-{logical.replace('-', '--')}", "lvm"
        elif disk:
            path, kind = f"/dev/{disk}{'p' if disk[-1].isdigit() else ''}{volume.number}", "part"
            path = path if volume.number else f"/dev/{disk}"
        else:
            continue
        place = specs.get(f"UUID={volume.uuid}") or specs.get(path) or ""
        yield Volume(
            path=path,
            kind=kind,
            size=volume.source.size,
            content="ext4" if volume.content == "ext" else volume.content,
            uuid=volume.uuid,
            mountpoints=(place,) if place else (),
        )


# -- boot loader and kernels -------------------------------------------------------------------------------------------


def _default_entry(files: RestFiles) -> tuple[str, str]:
    """(command line, kernel's version) of what the loader starts when nobody chooses; empty when its configuration is not known."""
    entries = [*_from_boot_entries(files), *_from_grub(files)]
    for image, line in entries:
        if not _RECOVERY & set(line.split()):
            return line, re.sub(r"^.*?(?:vmlinuz|vmlinux|kernel|bzImage)-", "", image)
    return "", ""


def _from_grub(files: RestFiles) -> Iterator[tuple[str, str]]:
    for path in ("/boot/grub/grub.cfg", "/boot/grub2/grub.cfg"):
        for match in _KERNEL_LINE.finditer(files.text(path)):
            if "$" not in match[1]:
                yield match[1], " ".join(word for word in match[2].split() if "$" not in word)


def _from_boot_entries(files: RestFiles) -> Iterator[tuple[str, str]]:
    """The entries of the Boot Loader Specification, type 1, the newest first."""
    environment = dict(
        line.partition("=")[::2] for line in files.text("/boot/grub2/grubenv").splitlines() if "=" in line
    )

    def order(name: str) -> list[tuple[int, str]]:
        return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]

    for name in sorted(files.names("/boot/loader/entries"), key=order, reverse=True):
        words = {
            parts[0]: parts[1]
            for line in files.text(f"/boot/loader/entries/{name}").splitlines()
            if len(parts := line.split(None, 1)) == 2
        }
        if "linux" in words and "-0-rescue" not in name and "0-rescue" not in words["linux"]:
            options = re.sub(r"\$(\w+)", lambda match: environment.get(match[1], ""), words.get("options", ""))
            yield words["linux"], " ".join(options.split())


def _kernels(files: RestFiles) -> Iterator[Kernel]:
    names = {f"/boot/{name}" for name in files.names("/boot")}
    plain = list(kernels_of(names, {}, {}))
    images = _listed(files, [kernel.initramfs for kernel in plain if kernel.initramfs][-_IMAGES_MOST:])
    builtin = {
        kernel.version: text.split()
        for kernel in plain
        if (text := files.text(f"/lib/modules/{kernel.version}/modules.builtin"))
        or (text := files.text(f"/usr/lib/modules/{kernel.version}/modules.builtin"))
    }
    yield from kernels_of(names, images, builtin)


def _listed(files: RestFiles, paths: Sequence[str]) -> dict[str, initramfs.Image]:
    """What these images hold, by the program that lists them on a live machine; one that cannot be read is left out."""
    with tempfile.TemporaryDirectory(prefix="p2v-initramfs-") as folder:
        copies: dict[str, str] = {}
        for number, path in enumerate(paths):
            with contextlib.suppress(ImageError):
                if (content := files.read(path, _INITRAMFS_MOST)) is not None:
                    copy = Path(folder, str(number))
                    copy.write_bytes(content)
                    copies[str(copy)] = path
        if not copies:
            return {}
        run = [sys.executable, "-I", "-S", "-B", "-c", initramfs.PROGRAM, *copies]
        try:
            said = subprocess.run(
                run, stdin=subprocess.DEVNULL, capture_output=True, timeout=_LISTING_SECONDS, check=False
            )
        except subprocess.TimeoutExpired:
            return {}
    return {copies[path]: image for path, image in initramfs.parse(said.stdout).items() if path in copies}
