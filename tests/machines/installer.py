"""Renders the installer of a recipe: a shell script that runs once as init of a machine booted from the package tree.

The script makes the file systems on the target disk, copies the tree it runs from, configures the copy and installs the
boot loader: by the machine's own tools and kernel, so the host needs neither device mapper nor partition devices.
"""

from __future__ import annotations

import functools
import io
import shlex
import tarfile

from tests.machines.recipe import Controller, FileSystem, Recipe, Swap, Tree, VolumeGroup

DONE = "INSTALLER: DONE"
"""Printed on the serial console when everything worked; anything else is a failed build."""

BOOTSTRAP_PATH = "/usr/local/sbin/installer-bootstrap"
DISK_MODEL = "INSTALLER"
"""The model of the installer's AHCI disks: udev names a disk after its model and serial."""


def disk_link(controller: Controller, serial: str) -> str:
    """Return the path by which the installer finds its disk `serial` on `controller`."""
    return "/dev/disk/by-id/" + (f"ata-{DISK_MODEL}_{serial}" if controller == "ahci" else f"virtio-{serial}")


def bootstrap(tree: Tree) -> str:
    """Return the init of the throw-away boot: unpacks the installer of the recipe from the payload disk and becomes it."""
    return f"""#!/bin/sh
# init of the throw-away boot: unpacks the installer of the recipe from the payload disk and becomes it.
export PATH=/usr/sbin:/usr/bin:/sbin:/bin
mkdir -p /run/installer
tar -C /run/installer -xf {disk_link(tree.controller, "payload")} install
exec /bin/sh /run/installer/install
# {BOOTSTRAP_PATH}
"""


_HEAD = """#!/bin/sh
set -eu
export PATH=/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C DEBIAN_FRONTEND=noninteractive
# No udev here: libdevmapper makes the device nodes itself.
export DM_DISABLE_UDEV=1
finish() {
    sync
    echo o > /proc/sysrq-trigger
    sleep 60
}
trap finish EXIT
step() { echo "INSTALLER: $(cut -d' ' -f1 /proc/uptime) $*"; }
"""
_BY_UUID = 'by_uuid() { mkdir -p /dev/disk/by-uuid; ln -sf "$2" "/dev/disk/by-uuid/$1"; }\n'


def _disks(recipe: Recipe) -> list[str]:
    link = functools.partial(disk_link, recipe.tree.controller)
    lines = [f"disk=$(readlink -f {link('target')})", "target=/target"]
    return lines + [f"disk_{disk.name}=$(readlink -f {link(disk.name)})" for disk in recipe.further_disks]


def _node(place: str) -> str:
    if "/" in place:
        return f"/dev/{place}"
    disk, colon, number = place.rpartition(":")
    return f'"${{disk{"_" if colon else ""}{disk}}}{number}"'


def _content_uuid(recipe: Recipe, place: str, content: FileSystem | Swap) -> str:
    if isinstance(content, Swap):
        return str(recipe.uuid(f"swap:{place}"))
    if content.kind == "vfat":
        serial = recipe.uuid(content.mount).hex[:8].upper()
        return f"{serial[:4]}-{serial[4:]}"
    return str(recipe.uuid(content.mount))


def _format(recipe: Recipe, place: str, content: FileSystem | Swap) -> list[str]:
    node = _node(place)
    identity = _content_uuid(recipe, place, content)
    if isinstance(content, Swap):
        make = f"mkswap -q -U {identity} {node}"
    else:
        uuid_option = {
            "xfs": f"-q -f -m uuid={identity}",
            "btrfs": f"-q -f -U {identity}",
            "vfat": f"-F 32 -i {identity.replace('-', '')}",
        }.get(content.kind, f"-q -F -E lazy_itable_init=0,lazy_journal_init=0 -U {identity}")
        make = f"mkfs.{content.kind} {uuid_option} {shlex.join(content.make_options)} {node}"
    return [make, f"by_uuid {identity} {node}"]


def _storage(recipe: Recipe) -> list[str]:
    lines = ["step file systems"]
    for place, _, content in recipe.areas():
        if not isinstance(content, VolumeGroup):
            lines += _format(recipe, place, content)
            continue
        lines += [f"pvcreate -q -ff -y {_node(place)}", f"vgcreate -q {content.name} {_node(place)}"]
        for volume in content.volumes:
            size = "-l 100%FREE" if volume.size_mib is None else f"-L {volume.size_mib}m"
            lines.append(f"lvcreate -q -y {size} -n {volume.name} {content.name}")
    mounts = sorted(
        (content.mount, content.kind, place) for place, _, content in recipe.areas() if isinstance(content, FileSystem)
    )
    for mount, kind, place in mounts:
        lines.append(f"mkdir -p $target{mount} && mount -t {kind} {_node(place)} $target{mount}")
    return lines


def fstab(recipe: Recipe) -> str:
    """Return the machine's /etc/fstab: logical volumes by their mapper name, the rest by UUID, as Debian's installer does.

    What the recipe has a device name for keeps that name.
    """
    names = dict(recipe.fstab_names)
    lines = ["# <file system> <mount point> <type> <options> <dump> <pass>"]
    for place, group, content in recipe.areas():
        if isinstance(content, VolumeGroup):
            continue
        if isinstance(content, FileSystem) and content.mount in names:
            source = names[content.mount]
        elif group is None:
            source = f"UUID={_content_uuid(recipe, place, content)}"
        else:
            # the mapper doubles a dash that is part of a name
            source = "/dev/mapper/" + "-".join(part.replace("-", "--") for part in place.split("/"))
        if isinstance(content, Swap):
            lines.append(f"{source} none swap sw 0 0")
        else:
            check = 0 if content.kind in ("xfs", "btrfs") else 1 if content.mount == "/" else 2
            lines.append(f"{source} {content.mount} {content.kind} {content.options} 0 {check}")
    return "\n".join(lines) + "\n"


_COPY = f"""step copy
for item in /*; do
    case $item in
        /dev|/proc|/sys|/run|/target|/tmp|/lost+found) ;;
        *) cp -ax "$item" $target/ ;;
    esac
done
mkdir -m 755 -p $target/dev $target/proc $target/sys $target/run
mkdir -m 1777 -p $target/tmp
rm -f $target{BOOTSTRAP_PATH} $target/etc/ssh/ssh_host_*
tar -C $target --strip-components=1 -xf @PAYLOAD@ files
for name in dev proc sys run; do mount --rbind /$name $target/$name; done
"""


def _configure(recipe: Recipe) -> list[str]:
    lines = ["step configure"]
    for user in recipe.users:
        lines.append(f"chroot $target useradd -m -s /bin/bash {user.name}")
        lines.append(f"echo {shlex.quote(f'{user.name}:{user.password}')} | chroot $target chpasswd")
    lines.append("mkdir -p $target/etc/systemd/system")
    lines += [f"ln -sf /dev/null $target/etc/systemd/system/{unit}" for unit in recipe.masked]
    lines += [f"chroot $target /bin/sh -c {shlex.quote(command)}" for command in recipe.commands]
    return lines


def _loader(recipe: Recipe) -> list[str]:
    if recipe.loader == "grub-efi":
        # the firmware's variables get the boot entry: it is the only way to the loader, nothing is put in \EFI\BOOT
        install = [
            "variables=$target/sys/firmware/efi/efivars",
            "mountpoint -q $variables || mount -t efivarfs efivarfs $variables",
            "chroot $target grub-install --target=x86_64-efi --efi-directory=/boot/efi",
            "chroot $target efibootmgr -v",
            "find $target/boot/efi",
        ]
    else:
        install = ["chroot $target grub-install --target=i386-pc $disk"]
    return ["step boot loader", *install, "chroot $target update-grub"]


# An old time stamp makes systemd redo its first-boot work (hwdb, ldconfig, journal catalogue) at every throw-away boot.
_TAIL = f"""step done
touch $target/etc/.updated $target/var/.updated
sync
for name in dev proc sys run; do umount -R -l $target/$name; done
umount -R $target
sync
echo "{DONE}"
"""


def script(recipe: Recipe) -> str:
    """Return the installer of `recipe` as a shell script for /bin/sh of Debian."""
    copy = _COPY.replace("@PAYLOAD@", disk_link(recipe.tree.controller, "payload"))
    parts = [
        _HEAD + "\n".join([*_disks(recipe), _BY_UUID]),
        *_storage(recipe),
        copy,
        *_configure(recipe),
        *_loader(recipe),
        _TAIL,
    ]
    return "\n".join(parts)


def _members(recipe: Recipe, keys: dict[str, tuple[str, int]]) -> dict[str, tuple[str, int]]:
    sudoers = "".join(f"{user.name} ALL=(ALL:ALL) NOPASSWD: ALL\n" for user in recipe.users if user.sudo)
    members = {
        "/etc/fstab": (fstab(recipe), 0o644),
        "/etc/hostname": (f"{recipe.hostname}\n", 0o644),
        "/etc/hosts": (f"127.0.0.1\tlocalhost\n127.0.1.1\t{recipe.hostname}\n", 0o644),
        "/etc/machine-id": (f"{recipe.uuid('machine-id').hex}\n", 0o444),
        "/etc/sudoers.d/test-users": (sudoers, 0o440),
        "/etc/default/grub": (
            "GRUB_DEFAULT=0\n"
            "GRUB_TIMEOUT=1\n"
            'GRUB_DISTRIBUTOR="Debian"\n'
            'GRUB_CMDLINE_LINUX_DEFAULT=""\n'
            'GRUB_CMDLINE_LINUX="console=tty0 console=ttyS0,115200"\n'
            "GRUB_TERMINAL=console\n"
            "GRUB_DISABLE_OS_PROBER=true\n",
            0o644,
        ),
        **keys,
    }
    members |= {file.path: (file.content, file.mode) for file in recipe.files}
    return members


def payload(recipe: Recipe, keys: dict[str, tuple[str, int]]) -> bytes:
    """Return the payload disk: a tar of the installer and the machine's own files.

    `keys` maps absolute paths to (content, mode): the key files, which are made once per cache and are in no recipe.
    """
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:

        def add(name: str, content: str, mode: int) -> None:
            data = content.encode()
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(data), mode
            tar.addfile(info, io.BytesIO(data))

        add("install", script(recipe), 0o755)
        for path, (content, mode) in sorted(_members(recipe, keys).items()):
            if path.startswith("/root/.ssh/") and not any(name.startswith("files/root/") for name in tar.getnames()):
                folder = tarfile.TarInfo("files/root/.ssh")
                folder.type, folder.mode = tarfile.DIRTYPE, 0o700
                tar.addfile(folder)
            add(f"files{path}", content, mode)
    return buffer.getvalue()
