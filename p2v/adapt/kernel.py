"""The machine's own kernel and initramfs, fetched for the self-adaptation boot."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from formats.machine import Kernel, Machine
from p2v.adapt.linux import choose_controller
from p2v.collect.at_rest import RestFiles
from p2v.emulator import Controller
from p2v.errors import AdaptationError
from p2v.session import CommandResult
from p2v.session.remote import RemoteProcess

_IMAGE_MOST = 128 << 20
_INITRAMFS_MOST = 1 << 30
_MODULE_MOST = 32 << 20
_MODULES_MOST = 24
_SILENCE = 60.0
_KINDS = ("initramfs-tools", "dracut")
_FETCHED = ("sd_mod", "ahci")
_NO_ADAPT = "Convert with --no-adapt onto a bus that the initramfs can drive"


class Host(Protocol):
    """What of a ``Session`` is used here."""

    def run(self, command: str | Sequence[str], *, root: bool = False, check: bool = False) -> CommandResult:
        """As ``Session.run``."""
        ...

    def start(
        self, command: str | Sequence[str], *, root: bool = False, lane: int = 0, silence: float | None = None
    ) -> RemoteProcess:
        """As ``Session.start``."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestKernel:
    """A kernel of the machine, in files here. ``modules`` are loaded in this order before the disks are looked for.

    ``kind`` is what made the initramfs; ``controller`` one that QEMU has and that initramfs or modules drive.
    """

    version: str
    image: Path
    initramfs: Path
    kind: str
    controller: Controller
    modules: tuple[Path, ...] = ()


def fetch_kernel(source: Host | RestFiles, machine: Machine, folder: Path) -> GuestKernel:
    """Read kernel and initramfs from the machine into ``folder``: from the live one (with modules, where the initramfs drives no
    controller that QEMU has), or from the files of one at rest.

    The running kernel is taken, else the last one that has an initramfs. Only root may read them on many systems. Raises
    ``AdaptationError`` when there is none that can be used, ``LinkLostError`` when the link is cut.
    """
    kernel = adaptation_kernel(machine)
    image, initramfs = folder / "kernel", folder / "initramfs"
    controller = choose_controller(kernel)
    modules: tuple[Path, ...] = ()
    if isinstance(source, RestFiles):
        if controller is None:
            raise AdaptationError(
                f"the initramfs of {kernel.version} drives no controller that can be emulated", advice=f"{_NO_ADAPT}."
            )
        _save(source, kernel.image, image, _IMAGE_MOST)
        _save(source, kernel.initramfs, initramfs, _INITRAMFS_MOST)
    else:
        _fetch(source, ["cat", kernel.image], image, _IMAGE_MOST)
        _fetch(source, ["cat", kernel.initramfs], initramfs, _INITRAMFS_MOST)
        if controller is None:
            modules = _fetch_modules(source, kernel.version, folder)
    return GuestKernel(
        version=kernel.version,
        image=image,
        initramfs=initramfs,
        kind=kernel.initramfs_kind,
        controller=controller or Controller.SATA,
        modules=modules,
    )


def adaptation_kernel(machine: Machine) -> Kernel:
    """The kernel to boot for the adaptation; ``AdaptationError`` when none can be used."""
    able = [k for k in machine.boot.kernels if k.initramfs and k.initramfs_kind in _KINDS]
    if not able:
        kinds = sorted({k.initramfs_kind or "unknown" for k in machine.boot.kernels if k.initramfs})
        raise AdaptationError(
            "the machine has no kernel whose initramfs the self-adaptation boot can use"
            + (f" (it was made by: {', '.join(kinds)})" if kinds else ""),
            advice=f"initramfs-tools and dracut are known. {_NO_ADAPT}.",
        )
    return next((k for k in able if k.version == machine.boot.running_kernel), able[-1])


def _save(files: RestFiles, path: str, target: Path, most: int) -> None:
    content = files.read(path, most)
    if not content:
        raise AdaptationError(
            f"{path} cannot be read from the machine's disks",
            advice=f"It lies on a file system that is not read here, or is not there. {_NO_ADAPT}.",
        )
    target.write_bytes(content)


def _fetch(session: Host, command: Sequence[str] | str, target: Path, most: int) -> None:
    process = session.start(command, root=True, silence=_SILENCE)
    total = 0
    try:
        with target.open("wb") as file:
            while piece := process.read(1 << 18):
                total += len(piece)
                if total > most:
                    raise AdaptationError(f"`{_shown(command)}` gives more than {most} bytes", advice=f"{_NO_ADAPT}.")
                file.write(piece)
        if process.wait(_SILENCE) != 0 or not total:
            raise AdaptationError(
                f"`{_shown(command)}` failed on the machine: {process.stderr_tail().strip() or 'it gave nothing'}",
                advice="The self-adaptation boot needs this file. See that it is there and that root can read it.",
            )
    finally:
        process.kill()


def _fetch_modules(session: Host, version: str, folder: Path) -> tuple[Path, ...]:
    """The modules for AHCI, in the order in which they are loaded, unpacked."""
    found: list[str] = []
    for name in _FETCHED:
        said = session.run(["modprobe", "--show-depends", "-S", version, name], root=True)
        if said.exit_code != 0:
            raise AdaptationError(
                f"neither the initramfs of {version} nor its modules drive a controller that can be emulated ({name} is missing)",
                advice=f"{_NO_ADAPT}.",
            )
        found += re.findall(r"^insmod (/\S+\.ko(?:\.\w+)?)", said.text, re.MULTILINE)
    paths = list(dict.fromkeys(found))
    if len(paths) > _MODULES_MOST:
        raise AdaptationError(f"AHCI would need {len(paths)} modules of {version}", advice=f"{_NO_ADAPT}.")
    files = []
    for number, path in enumerate(paths):
        tool = {".xz": "xz -dc", ".zst": "zstd -dcq", ".gz": "gzip -dc"}.get(Path(path).suffix, "cat")
        file = folder / f"{number:02}-{Path(path).name.partition('.')[0]}.ko"
        _fetch(session, f"{tool} < {shlex.quote(path)}", file, _MODULE_MOST)
        files.append(file)
    return tuple(files)


def _shown(command: Sequence[str] | str) -> str:
    return command if isinstance(command, str) else shlex.join(command)
