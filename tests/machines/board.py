"""The part of QEMU's command line that the builder and the physical machine share."""

from __future__ import annotations

import os
import shutil
import struct
from pathlib import Path

from tests.machines.errors import MachineError
from tests.machines.recipe import Firmware

PROGRAM = "qemu-system-x86_64"

MANUFACTURER = "Northwind Computers"
PRODUCT = "Tower 100"
MACHINE_SERIAL = "NWT100-0001"
MACHINE_UUID = "6e7d8a52-5c7c-4b1e-9d4e-0c5f0d1a2b3c"

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


def _bios_information() -> bytes:
    """Return SMBIOS structure type 0 (SMBIOS specification, 7.1) of a PC of 2016.

    QEMU's own says "this is a virtual machine" in the second extension byte, and no option of it takes that away.
    """
    formatted = struct.pack(
        "<BBH BBH BBQ BB BBBB",
        *(0, 24, 0),  # type, length, handle
        *(1, 2, 0xE800),  # strings 1 and 2: vendor, version; start segment
        *(3, 15, 0x0000_0000_0001_1880),  # string 3: date; 1 MiB ROM; PCI, upgradeable, shadowed, boots from CD
        *(0x01, 0x04),  # ACPI; targeted content distribution
        *(1, 7, 0xFF, 0xFF),  # release 1.7; no embedded controller
    )
    strings = (MANUFACTURER, "1.07", "03/14/2016")
    return formatted + b"".join(text.encode() + b"\0" for text in strings) + b"\0"


def physical_arguments(folder: Path) -> list[str]:
    """Return the arguments of a PC on which a guest that looks for a hypervisor finds none.

    A firmware table is written to `folder`, which must stay while the machine runs.
    """
    table = folder / "smbios-type0"
    table.write_bytes(_bios_information())
    identity = f"manufacturer={MANUFACTURER},product={PRODUCT},serial={MACHINE_SERIAL}"
    return [
        # without erms and fsrm the kernel copies by other means than `rep movsb`, which TCG does byte by byte
        *("-machine", "q35", "-cpu", "max,hypervisor=off,tcg-cpuid=off,erms=off,fsrm=off"),
        *("-uuid", MACHINE_UUID),
        *("-smbios", f"file={escape(table)}"),
        *("-smbios", f"type=1,{identity},uuid={MACHINE_UUID}"),
        *("-smbios", f"type=2,{identity}"),
        *("-smbios", f"type=3,manufacturer={MANUFACTURER},serial={MACHINE_SERIAL}"),
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
