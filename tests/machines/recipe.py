"""What a test machine is: frozen records from which `tests.machines.builder` makes a bootable disk.

A new machine is a new `Recipe` in `RECIPES`; the code that builds and boots knows no recipe by name.
Sizes are in MiB; `size_mib=None` means "all that is left" and is allowed for the last item only.
"""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Firmware = Literal["bios", "uefi"]

# Fixed name space, so that every UUID of a machine follows from its recipe's name and the item's place.
_NAMESPACE = uuid.UUID("0bb4ef4b-2a8e-4d6a-9a43-2f1f5f4f6a10")


@dataclass(frozen=True, slots=True, kw_only=True)
class FileSystem:
    """A file system made by `mkfs.<kind>` and mounted at `mount` (an absolute path)."""

    kind: Literal["ext4", "ext3", "ext2", "xfs", "btrfs", "vfat"]
    mount: str
    options: str = "defaults"
    make_options: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Swap:
    """A swap area that the machine uses."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LogicalVolume:
    """A linear logical volume."""

    name: str
    size_mib: int | None
    content: FileSystem | Swap


@dataclass(frozen=True, slots=True, kw_only=True)
class VolumeGroup:
    """A partition that is the only physical volume of the LVM volume group `name`; extents may be left free."""

    name: str
    volumes: tuple[LogicalVolume, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Partition:
    """One primary partition, aligned to 1 MiB. `kind` is sfdisk's type (an MBR byte or a GPT alias or GUID)."""

    size_mib: int | None
    kind: str
    content: FileSystem | Swap | VolumeGroup | None
    bootable: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class User:
    """An account. The passwords are test data and guard nothing."""

    name: str
    password: str
    sudo: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class File:
    """A file of the machine, owned by root."""

    path: str
    content: str
    mode: int = 0o644


@dataclass(frozen=True, slots=True, kw_only=True)
class Tree:
    """The packages of a machine: the slow part of a build, shared by all recipes whose tree is equal.

    `root_kind` is the root file system's kind; the initramfs is made with the packages and must be able to check it.
    """

    suite: str
    packages: tuple[str, ...]
    root_kind: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """One machine: everything that decides the content of its disk.

    `nic` is the name that the machine's network file uses; `tests.machines.physical` puts the NIC at the PCI address
    that gives this name. `commands` run in the finished system, in order, before the boot loader is installed.
    """

    name: str
    hostname: str
    tree: Tree
    partitions: tuple[Partition, ...]
    table: Literal["dos", "gpt"] = "dos"
    firmware: Firmware = "bios"
    disk_mib: int = 6144
    loader: Literal["grub-pc", "grub-efi"] = "grub-pc"
    nic: str = "enp0s25"
    files: tuple[File, ...] = ()
    users: tuple[User, ...] = ()
    masked: tuple[str, ...] = ()
    commands: tuple[str, ...] = ()

    def uuid(self, place: str) -> uuid.UUID:
        """Return the fixed UUID of the item at `place` (a mount point, "swap", "machine-id")."""
        return uuid.uuid5(_NAMESPACE, f"{self.name}:{place}")

    def areas(self) -> Iterator[tuple[str, str | None, FileSystem | Swap | VolumeGroup]]:
        """Yield (partition number or "vg/lv", volume group, content) of all that has content, in disk order."""
        for number, partition in enumerate(self.partitions, start=1):
            if partition.content is None:
                continue
            yield str(number), None, partition.content
            if isinstance(partition.content, VolumeGroup):
                for volume in partition.content.volumes:
                    yield f"{partition.content.name}/{volume.name}", partition.content.name, volume.content


# --- the recipes ----------------------------------------------------------------------------------------------------

_BASE = (
    "linux-image-amd64",
    "initramfs-tools",
    "busybox",
    "zstd",
    "systemd-sysv",
    "udev",
    "dbus",
    "kmod",
    "procps",
    "fdisk",
    "e2fsprogs",
    "lvm2",
    "sudo",
    "iproute2",
    "ifupdown",
    "isc-dhcp-client",
    "openssh-server",
    "python3-minimal",
)

DEBIAN_BIOS = Tree(suite="bookworm", packages=(*_BASE, "grub-pc"), root_kind="ext4")

# Work that is due at boot or soon after it and that no test looks at; on an emulated CPU each costs seconds.
_QUIET = (
    "apt-daily.timer",
    "apt-daily-upgrade.timer",
    "dpkg-db-backup.timer",
    "e2scrub_all.timer",
    "e2scrub_reap.service",
    "fstrim.timer",
)

_USERS = (
    User(name="admin", password="admin-pw", sudo=True),
    User(name="nosudo", password="nosudo-pw"),
)


def _interfaces(nic: str) -> File:
    return File(
        path="/etc/network/interfaces",
        content=(
            "# The loopback network interface\n"
            "auto lo\n"
            "iface lo inet loopback\n"
            "\n"
            "# The primary network interface\n"
            f"allow-hotplug {nic}\n"
            f"iface {nic} inet dhcp\n"
        ),
    )


def _bios_lvm(name: str, root_mib: int | None) -> Recipe:
    # swap stands before root, so that a root without a size can take all that is left
    return Recipe(
        name=name,
        hostname="metal1",
        tree=DEBIAN_BIOS,
        partitions=(
            Partition(size_mib=300, kind="83", bootable=True, content=FileSystem(kind="ext4", mount="/boot")),
            Partition(
                size_mib=None,
                kind="8e",
                content=VolumeGroup(
                    name="vg0",
                    volumes=(
                        LogicalVolume(name="swap", size_mib=512, content=Swap()),
                        LogicalVolume(
                            name="root",
                            size_mib=root_mib,
                            content=FileSystem(kind="ext4", mount="/", options="errors=remount-ro"),
                        ),
                    ),
                ),
            ),
        ),
        files=(_interfaces("enp0s25"),),
        users=_USERS,
        masked=_QUIET,
    )


BIOS_LVM = _bios_lvm("bios-lvm", 3072)
BIOS_LVM_FULL = _bios_lvm("bios-lvm-full", None)
BIOS_PLAIN = dataclasses.replace(
    BIOS_LVM,
    name="bios-plain",
    hostname="metal2",
    disk_mib=4096,
    partitions=(
        Partition(
            size_mib=3584,
            kind="83",
            bootable=True,
            content=FileSystem(kind="ext4", mount="/", options="errors=remount-ro"),
        ),
        Partition(size_mib=None, kind="82", content=Swap()),
    ),
)

RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in (BIOS_LVM, BIOS_LVM_FULL, BIOS_PLAIN)}
