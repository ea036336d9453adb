"""Builds the disks of the test machines and keeps them in a cache.

The cache folder (`$P2V_TEST_CACHE`, default `~/.cache/p2v-toolkit/machines`) holds

- `keys/`: the SSH key pair of the tests and the machines' SSH host key, made once per cache, in no repository;
- `tree-HASH/`: an unpacked package tree as an ext4 image with its kernel and initramfs (the slow part, shared);
- `NAME-HASH/`: a machine: `disk.raw` (sparse, read-only; boot it through an overlay), further disks beside it,
  `variables.fd` where the firmware is UEFI, `recipe.json`, `install.log`.

HASH is over the recipe, the keys and `VERSION`. An entry is built under a file lock in a `.part-` folder and renamed
when it is complete: what is there under its final name is whole. Building a machine removes older entries of its name
that no living process has asked for.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from tests.machines import board, installer
from tests.machines.errors import MachineError
from tests.machines.recipe import RECIPES, FurtherDisk, Recipe, Tree

VERSION = 2
"""Part of every cache key: raise it when the builder itself makes different disks from the same recipe."""

_INSTALL_TIMEOUT = 1800.0
_TREE_MIB = 3072


@dataclass(frozen=True, slots=True, kw_only=True)
class Keys:
    """The key files of the test machines. `identity` and `host_key` are private keys; `.pub` stands beside each."""

    identity: Path
    host_key: Path

    @property
    def identity_public(self) -> str:
        """The public half of `identity`, one line."""
        return self.identity.with_suffix(".pub").read_text().strip()

    @property
    def host_public(self) -> str:
        """The public half of `host_key`, one line without a comment ("ssh-ed25519 AAAA...")."""
        return " ".join(self.host_key.with_suffix(".pub").read_text().split()[:2])


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltMachine:
    """A machine in the cache. Its files are shared by everyone and must not be written to."""

    recipe: Recipe
    folder: Path
    keys: Keys

    @property
    def disk(self) -> Path:
        """The disk: a sparse raw image, read-only."""
        return self.folder / "disk.raw"

    @property
    def further_disks(self) -> tuple[Path, ...]:
        """The disks beside `disk`, in the recipe's order: sparse raw images, read-only."""
        return tuple(self.folder / f"{disk.name}.raw" for disk in self.recipe.further_disks)

    @property
    def variables(self) -> Path | None:
        """The UEFI variables that the installation left (read-only; copy before use), None for a BIOS machine."""
        return self.folder / "variables.fd" if self.recipe.firmware == "uefi" else None


def cache_folder() -> Path:
    """Return the cache folder; it need not exist."""
    configured = os.environ.get("P2V_TEST_CACHE")
    return Path(configured) if configured else Path.home() / ".cache" / "p2v-toolkit" / "machines"


def _digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps([VERSION, *parts], sort_keys=True).encode()).hexdigest()[:16]


# These fields came after the first machines: at their default they are no part of a key.
_LATER = {"controller": "virtio", "further_disks": (), "fstab_names": ()}


def _key_fields(items: list[tuple[str, object]]) -> dict[str, object]:
    return {name: value for name, value in items if name not in _LATER or value != _LATER[name]}


def tree_key(tree: Tree) -> str:
    """Return the cache key of a package tree."""
    fields = dataclasses.asdict(tree, dict_factory=_key_fields)
    return _digest("tree", fields, installer.bootstrap(tree), _UNPACK, _CHECKER_HOOK)


def machine_key(recipe: Recipe, keys: Keys) -> str:
    """Return the cache key of a machine: equal only for equal recipes, installers and keys."""
    return _digest(
        "machine",
        tree_key(recipe.tree),
        dataclasses.asdict(recipe, dict_factory=_key_fields),
        installer.script(recipe),
        keys.identity_public,
        keys.host_public,
    )


@contextlib.contextmanager
def _locked(folder: Path, name: str) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f".lock-{name}").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def publish(cache: Path, entry: str, build: Callable[[Path], None]) -> Path:
    """Return the folder `cache/entry`, made by `build(folder)` if it is not there.

    `build` fills a scratch folder that becomes the entry by one rename when it returns. When it raises, or the process
    dies, nothing appears under the final name; what a dead process left is removed by the next build of the entry.
    """
    final = cache / entry
    with _locked(cache, entry):
        if final.is_dir():
            return final
        scratch = cache / f".part-{entry}"
        if scratch.exists():
            shutil.rmtree(scratch)
        scratch.mkdir()
        try:
            build(scratch)
            scratch.rename(final)
        finally:
            if scratch.exists():
                shutil.rmtree(scratch)
    return final


# A process holds a shared lock on `.use-ENTRY` of every machine it has asked for, until it ends.
_in_use: dict[Path, TextIO] = {}


def _use(cache: Path, entry: str) -> None:
    path = cache / f".use-{entry}"
    if path not in _in_use:
        _in_use[path] = path.open("w")
        fcntl.flock(_in_use[path], fcntl.LOCK_SH)


def _unused(cache: Path, entry: str) -> bool:
    with (cache / f".use-{entry}").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def keys(cache: Path) -> Keys:
    """Return the key files of `cache`, made on first use."""

    def build(folder: Path) -> None:
        for name in ("id_ed25519", "host_ed25519"):
            _run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "p2v-toolkit-test", "-f", str(folder / name)])

    folder = publish(cache, "keys", build)
    return Keys(identity=folder / "id_ed25519", host_key=folder / "host_ed25519")


def _run(command: list[str], *, log: Path | None = None) -> None:
    """Run a command, its output to `log`; MachineError with the end of its output when it fails."""
    arguments = [board.program(command[0]), *command[1:]]
    result = subprocess.run(arguments, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    output = result.stdout + result.stderr
    if log is not None:
        log.write_text(output)
    if result.returncode != 0:
        raise MachineError(f"{command[0]} failed with exit code {result.returncode}:\n{output[-4000:]}")


# --- the package tree -----------------------------------------------------------------------------------------------

# The initramfs gets the root file system's checker only if what /etc/fstab names for / can be probed: a small image
# stands in for it while the packages are installed.
_CHECKER_HOOK = """mkdir -p "$1/etc" && truncate -s 8M "$1/root.img" && mke2fs -q -F -t {kind} "$1/root.img" &&
echo "/root.img / {kind} defaults 0 1" > "$1/etc/fstab\""""

_UNPACK = """set -eu
mkdir root
tar -C root --numeric-owner --xattrs --xattrs-include='*' --exclude './dev/*' -xpf tree.tar
rm tree.tar
rm -f root/root.img
mkdir root/target
install -m 755 bootstrap root{bootstrap_path}
rm bootstrap
cat root/boot/vmlinuz-* > kernel
cat root/boot/initrd.img-* > initramfs
truncate -s {size}M tree.raw
mke2fs -q -F -t ext4 -O ^has_journal -d root tree.raw
rm -rf root
"""


# Modules for what no test machine has: a third of all packages' bytes, to be installed, indexed and copied in every test.
_NOT_IN_A_SERVER = (
    "sound",
    *(f"drivers/{kind}" for kind in ("gpu", "media", "infiniband", "iio", "staging", "net/wireless")),
)


def _build_tree(tree: Tree, folder: Path) -> None:
    excluded = [f"/usr/share/{kind}/*" for kind in ("doc", "man", "locale", "info")]
    excluded += [f"*/lib/modules/*/kernel/{kind}/*" for kind in _NOT_IN_A_SERVER]
    has_checker = tree.root_kind.startswith("ext")
    _run(
        [
            *("mmdebstrap", "--variant=minbase", f"--include={','.join(tree.packages)}"),
            *("--aptopt=APT::Install-Recommends false", "--aptopt=Acquire::Languages none"),
            *(f"--dpkgopt=path-exclude={pattern}" for pattern in excluded),
            "--dpkgopt=path-include=/usr/share/doc/*/copyright",
            *([f"--essential-hook={_CHECKER_HOOK.format(kind=tree.root_kind)}"] if has_checker else []),
            *(tree.suite, str(folder / "tree.tar")),
        ],
        log=folder / "packages.log",
    )
    (folder / "bootstrap").write_text(installer.bootstrap(tree))
    unpack = _UNPACK.format(bootstrap_path=installer.BOOTSTRAP_PATH, size=_TREE_MIB)
    # Without root privileges the files' owners are kept by a user name space (Debian's package uidmap).
    wrapper = [] if os.geteuid() == 0 else ["unshare", "--map-auto", "--map-root-user", "--"]
    _run([*wrapper, "sh", "-c", f'cd "$1"\n{unpack}', "sh", str(folder)])


# --- the machine ----------------------------------------------------------------------------------------------------


def _blank(path: Path, mib: int) -> None:
    with path.open("wb") as file:
        file.truncate(mib << 20)


def _partition(recipe: Recipe, disk: Path, description: Recipe | FurtherDisk) -> None:
    """Write the partition table of `description` (the recipe itself, or one of its further disks) to `disk`."""
    place = "disk" if description is recipe else description.name
    lines = [f"label: {description.table}"]
    if description.table == "dos":
        lines.append(f"label-id: 0x{recipe.uuid(place).hex[:8]}")
    else:
        lines.append(f"label-id: {recipe.uuid(place)}")
    for number, partition in enumerate(description.partitions, start=1):
        fields = [f"type={partition.kind}"]
        if description.table == "gpt":
            fields.append(f"uuid={recipe.uuid(f'{place}:{number}')}")
        if partition.size_mib is not None:
            fields.insert(0, f"size={partition.size_mib}MiB")
        if partition.bootable:
            fields.append("bootable")
        lines.append(", ".join(fields))
    subprocess.run(
        [board.program("sfdisk"), "--quiet", "--no-reread", "--no-tell-kernel", str(disk)],
        input="\n".join(lines) + "\n",
        text=True,
        check=True,
        capture_output=True,
    )


def _install(recipe: Recipe, tree: Path, folder: Path) -> None:
    console = folder / "install.log"
    controller = recipe.tree.controller
    drives = (
        ("target", "disk.raw", "discard=unmap,detect-zeroes=unmap"),
        *((disk.name, f"{disk.name}.raw", "discard=unmap,detect-zeroes=unmap") for disk in recipe.further_disks),
        ("tree", str(tree / "tree.raw"), "snapshot=on"),
        ("payload", "payload.tar", "snapshot=on"),
    )
    root = f"root={installer.disk_link(controller, 'tree')} rw init={installer.BOOTSTRAP_PATH}"
    # dracut puts virtio into every initramfs that it makes in a virtual machine
    as_physical = controller == "ahci"
    hardware = board.physical_arguments(folder) if as_physical else ["-machine", "q35", "-cpu", "max"]
    command = [
        *board.base_arguments(memory_mib=1024, cpus=2),
        *hardware,
        *("-no-reboot", "-nic", "none"),
        *("-kernel", str(tree / "kernel"), "-initrd", str(tree / "initramfs")),
        *("-append", f"console=ttyS0 quiet {root}"),
        *("-serial", f"file:{board.escape(console)}"),
        *board.firmware_arguments(recipe.firmware, folder / "variables.fd"),
    ]
    for number, (serial, name, options) in enumerate(drives):
        path = board.escape(folder / name)
        command += ["-drive", f"if=none,id={serial},format=raw,file={path},cache=unsafe,{options}"]
        kind = f"ide-hd,bus=ide.{number},model={installer.DISK_MODEL}" if controller == "ahci" else "virtio-blk-pci"
        command += ["-device", f"{kind},drive={serial},serial={serial}"]
    try:
        result = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            timeout=_INSTALL_TIMEOUT,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired:
        log = board.tail(console, 40)
        raise MachineError(f"the installation of {recipe.name} took over {_INSTALL_TIMEOUT:.0f} s:\n{log}") from None
    if result.returncode != 0 or installer.DONE not in console.read_text(errors="replace"):
        raise MachineError(f"the installation of {recipe.name} failed:\n{result.stderr}\n{board.tail(console, 40)}")


def _build_machine(recipe: Recipe, tree: Path, machine_keys: Keys, folder: Path) -> None:
    disk = folder / "disk.raw"
    _blank(disk, recipe.disk_mib)
    _partition(recipe, disk, recipe)
    for further in recipe.further_disks:
        path = folder / f"{further.name}.raw"
        _blank(path, further.disk_mib)
        _partition(recipe, path, further)
    if recipe.firmware == "uefi":
        shutil.copyfile(board.VARIABLES_TEMPLATE, folder / "variables.fd")
    host_key = machine_keys.host_key
    key_files = {
        "/root/.ssh/authorized_keys": (machine_keys.identity_public + "\n", 0o600),
        "/etc/ssh/ssh_host_ed25519_key": (host_key.read_text(), 0o600),
        "/etc/ssh/ssh_host_ed25519_key.pub": (host_key.with_suffix(".pub").read_text(), 0o644),
    }
    payload = folder / "payload.tar"
    payload.write_bytes(installer.payload(recipe, key_files))
    _install(recipe, tree, folder)
    payload.unlink()
    (folder / "smbios-type0").unlink(missing_ok=True)
    (folder / "recipe.json").write_text(json.dumps(dataclasses.asdict(recipe), indent=2) + "\n")
    for path in folder.iterdir():
        path.chmod(0o444)


def _prune(cache: Path, recipe: Recipe, newest: Path) -> None:
    """Remove older entries of the recipe's name, and package trees that no recipe uses now."""
    kept = {f"tree-{tree_key(other.tree)}" for other in (*RECIPES.values(), recipe)}
    for entry in cache.iterdir():
        name, _, digest = entry.name.rpartition("-")  # lock files begin with a dot and match no name
        stale_machine = name == recipe.name and len(digest) == 16 and entry != newest
        stale_tree = name == "tree" and entry.name not in kept
        if (stale_machine and _unused(cache, entry.name)) or stale_tree:
            # the lock file stays: another process may be waiting on it
            shutil.rmtree(entry, ignore_errors=True)


def build(recipe: Recipe, *, cache: Path | None = None, report: Callable[[str], None] = lambda _: None) -> BuiltMachine:
    """Return the machine of `recipe`, built on first use: minutes for a new tree, one to three for a new machine.

    `report` gets a line at the start and end of each long step. Raises MachineError when a program is missing or
    fails. Needs root privileges or, without them, user name spaces with a range of sub-uids (Debian's uidmap).
    """
    cache = cache_folder() if cache is None else cache
    machine_keys = keys(cache)

    def timed(what: str, step: Callable[[], None]) -> None:
        report(f"{what} ...")
        start = time.monotonic()
        step()
        report(f"{what}: {time.monotonic() - start:.0f} s")

    def make(folder: Path) -> None:
        tree = publish(
            cache,
            f"tree-{tree_key(recipe.tree)}",
            lambda scratch: timed("installing Debian packages", lambda: _build_tree(recipe.tree, scratch)),
        )
        timed(
            f"installing {recipe.name} on its disk",
            lambda: _build_machine(recipe, tree, machine_keys, folder),
        )

    entry = f"{recipe.name}-{machine_key(recipe, machine_keys)}"
    fresh = not (cache / entry).is_dir()
    folder = publish(cache, entry, make)
    _use(cache, entry)
    if fresh:
        _prune(cache, recipe, folder)
    return BuiltMachine(recipe=recipe, folder=folder, keys=machine_keys)
