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
Controller = Literal["virtio", "ahci"]

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
class FurtherDisk:
    """A disk beside the system disk, kept in `<name>.raw`. `name` has letters only.

    `serial` is what the running machine sees. Volume groups are not for further disks.
    """

    name: str
    serial: str
    disk_mib: int
    partitions: tuple[Partition, ...]
    table: Literal["dos", "gpt"] = "gpt"


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
    `controller` is what the computer has that the installer runs on: where an initramfs is made for its own computer
    only, it must be the one that the machine will run on, and no other may be there.
    """

    suite: str
    packages: tuple[str, ...]
    root_kind: str
    controller: Controller = "virtio"


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """One machine: everything that decides the content of its disk.

    `nic` is the name that the machine's network file uses; `tests.machines.physical` puts the NIC at the PCI address
    that gives this name. `commands` run in the finished system, in order, before the boot loader is installed.
    `fstab_names` are pairs (mount point, device name): what /etc/fstab has for it in place of the UUID.
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
    further_disks: tuple[FurtherDisk, ...] = ()
    fstab_names: tuple[tuple[str, str], ...] = ()

    def uuid(self, place: str) -> uuid.UUID:
        """Return the fixed UUID of the item at `place` (a mount point, "swap", "machine-id")."""
        return uuid.uuid5(_NAMESPACE, f"{self.name}:{place}")

    def areas(self) -> Iterator[tuple[str, str | None, FileSystem | Swap | VolumeGroup]]:
        """Yield (place, volume group, content) of all that has content, in disk order.

        A place is a partition number of the system disk, "vg/lv", or "name:number" for a partition of a further disk.
        """
        for number, partition in enumerate(self.partitions, start=1):
            if partition.content is None:
                continue
            yield str(number), None, partition.content
            if isinstance(partition.content, VolumeGroup):
                for volume in partition.content.volumes:
                    yield f"{partition.content.name}/{volume.name}", partition.content.name, volume.content
        for disk in self.further_disks:
            for number, partition in enumerate(disk.partitions, start=1):
                if partition.content is not None:
                    yield f"{disk.name}:{number}", None, partition.content


# --- the recipes ----------------------------------------------------------------------------------------------------

_INITRAMFS_TOOLS = ("linux-image-amd64", "initramfs-tools", "busybox", "zstd")

_BASE = (
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

DEBIAN_BIOS = Tree(suite="bookworm", packages=(*_INITRAMFS_TOOLS, *_BASE, "grub-pc"), root_kind="ext4")

# dracut-config-generic is for the installer's boot and leaves with it.
DEBIAN_UEFI_DRACUT = Tree(
    suite="bookworm",
    packages=(
        *("linux-image-amd64", "dracut", "dracut-config-generic", "zstd"),
        *_BASE,
        *("grub-efi-amd64", "efibootmgr", "dosfstools", "xfsprogs"),
    ),
    root_kind="xfs",
    controller="ahci",
)

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

_STATIC_NETWORK = File(
    path="/etc/network/interfaces",
    content=(
        "# The loopback network interface\n"
        "auto lo\n"
        "iface lo inet loopback\n"
        "\n"
        "# The primary network interface\n"
        "auto enp0s31f6\n"
        "iface enp0s31f6 inet static\n"
        "\taddress 10.0.2.15/24\n"
        "\tgateway 10.0.2.2\n"
    ),
)

# The initramfs is made anew for the computer that the installer runs on. dracut finds the disks below a file system by
# udev's names in /dev/block, and no udev runs there. The build fails unless what came out drives AHCI and LVM, and
# neither virtio's bus nor its disks.
_HOST_ONLY = (
    "dpkg --purge dracut-config-generic",
    'mkdir -p /dev/block; for disk in /sys/class/block/*; do read -r number < "$disk/dev";'
    ' ln -sf "../${disk##*/}" "/dev/block/$number" || exit 1; done',
    "for kernel in /lib/modules/*; do version=${kernel##*/};"
    ' dracut --force "/boot/initrd.img-$version" "$version" || exit 1; done',
    "for image in /boot/initrd.img-*; do lsinitrd $image > /tmp/list || exit 1;"
    " for needed in /ahci.ko /xfs.ko /dm-mod.ko bin/lvm; do grep -qF $needed /tmp/list || exit 1; done;"
    " ! grep -E '/virtio_(pci|blk|scsi)[^/]*[.]ko' /tmp/list || exit 1; done; rm /tmp/list",
)

# Everything that makes a converted machine fail: no driver, no fallback loader, device names, one interface's name.
UEFI_DRACUT = Recipe(
    name="uefi-dracut",
    hostname="metal3",
    tree=DEBIAN_UEFI_DRACUT,
    firmware="uefi",
    loader="grub-efi",
    table="gpt",
    nic="enp0s31f6",
    partitions=(
        Partition(size_mib=128, kind="U", content=FileSystem(kind="vfat", mount="/boot/efi", options="umask=0077")),
        Partition(size_mib=384, kind="L", content=FileSystem(kind="ext4", mount="/boot")),
        Partition(
            size_mib=None,
            kind="V",
            content=VolumeGroup(
                name="vg0",
                volumes=(
                    LogicalVolume(name="root", size_mib=2560, content=FileSystem(kind="xfs", mount="/")),
                    LogicalVolume(name="home", size_mib=512, content=FileSystem(kind="ext4", mount="/home")),
                    LogicalVolume(name="swap", size_mib=256, content=Swap()),
                ),
            ),
        ),
    ),
    further_disks=(
        FurtherDisk(
            name="data",
            serial="P2VSRC0002",
            disk_mib=512,
            partitions=(Partition(size_mib=None, kind="L", content=FileSystem(kind="ext4", mount="/data")),),
        ),
    ),
    fstab_names=(("/boot/efi", "/dev/sda1"), ("/data", "/dev/sdb1")),
    files=(
        _STATIC_NETWORK,
        File(path="/etc/dracut.conf.d/host-only.conf", content='hostonly="yes"\ncompress="gzip -n -1"\n'),
        File(path="/data/known", content="on the data disk\n"),
        File(path="/home/known", content="on the home volume\n"),
    ),
    users=_USERS,
    masked=_QUIET,
    commands=_HOST_ONLY,
)

RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in (BIOS_LVM, BIOS_LVM_FULL, BIOS_PLAIN, UEFI_DRACUT)}
