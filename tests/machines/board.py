"""The part of QEMU's command line that the builder and the physical machine share."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from tests.machines.errors import MachineError
from tests.machines.recipe import Firmware

PROGRAM = "qemu-system-x86_64"

# Debian's ovmf package; the 4M pair is the one that its maintainers recommend.
_CODE = Path("/usr/share/OVMF/OVMF_CODE_4M.fd")
VARIABLES_TEMPLATE = Path("/usr/share/OVMF/OVMF_VARS_4M.fd")


def program(name: str) -> str:
    """Return the path of an outside program; MachineError names the one that is not installed."""
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
    found = shutil.which(name, path=path)
    if found is None:
        raise MachineError(f"{name} is not installed; install the Debian package that has it")
    return found


def base_arguments(*, memory_mib: int, cpus: int) -> list[str]:
    """Return the arguments every boot has: TCG (the one accelerator that works everywhere), no display, no defaults.

    The process dies with its parent, so that a killed test run leaves no machine behind.
    """
    return [
        *(program("setpriv"), "--pdeathsig", "KILL", "--"),
        *(program(PROGRAM), "-nodefaults", "-no-user-config", "-display", "none"),
        *("-accel", "tcg,thread=multi,tb-size=512"),
        *("-m", str(memory_mib), "-smp", str(cpus)),
    ]


def firmware_arguments(firmware: Firmware, variables: Path | None) -> list[str]:
    """Return the arguments for the firmware; UEFI keeps its boot entries in the file `variables`."""
    if firmware == "bios":
        return []
    if variables is None:
        raise MachineError("a UEFI machine needs its file of firmware variables")
    return [
        *("-drive", f"if=pflash,unit=0,format=raw,readonly=on,file={_CODE}"),
        *("-drive", f"if=pflash,unit=1,format=raw,file={escape(variables)}"),
    ]


def escape(path: Path | str) -> str:
    """Return `path` for use as an option's value: QEMU ends a value at a comma unless it is doubled."""
    return str(path).replace(",", ",,")


def tail(console: Path, lines: int = 25) -> str:
    """Return the last lines of a console log, for an error text."""
    if not console.exists():
        return "(no console output)"
    text = console.read_bytes()[-16384:].decode("utf-8", "replace").replace("\r", "")
    return "\n".join(text.splitlines()[-lines:])
