"""Hyper-V: a PowerShell script that makes the machine.

Only Hyper-V itself writes its configuration files, so the definition is a script; it is not read back. Generation 1 is
BIOS and boots from IDE, generation 2 is UEFI and boots VHDX disks from SCSI.

Facts: learn.microsoft.com (New-VM, Set-VMFirmware, Set-VMComPort, Add-VMNetworkAdapter). A sparse flag on the disk's
file makes Hyper-V refuse it (0xC03A001A). PowerShell takes the four typographic single quotes for plain ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from formats.definitions import DEFAULT_MEMORY, PLATFORMS, DefinedDisk, Definition, Hardware, ordered
from formats.definitions.text import display_name, file_stem, mac_of, memory_of
from formats.machine import Firmware, Machine

_QUOTES = "'\u2018\u2019\u201a\u201b"
_BOM = "\ufeff"  # Windows PowerShell 5 takes a script without one for the old code page


def render(machine: Machine, disks: Sequence[DefinedDisk], hardware: Hardware, *, folder: str) -> Definition:
    """The script. It names its disks relative to itself, so ``folder`` does not matter."""
    del folder
    main = f"{file_stem(machine.name)}.ps1"
    text = "\r\n".join(_script(machine, disks, hardware, main)) + "\r\n"
    return Definition(files={main: text if text.isascii() else _BOM + text}, main=main)


def quoted(text: str) -> str:
    """The text as PowerShell takes it literally; control characters are dropped."""
    kept = "".join(c for c in text if c.isprintable())
    return "'" + "".join(c * 2 if c in _QUOTES else c for c in kept) + "'"


def _script(machine: Machine, disks: Sequence[DefinedDisk], hardware: Hardware, main: str) -> Iterator[str]:
    uefi = hardware.firmware is Firmware.UEFI
    memory = memory_of(machine, DEFAULT_MEMORY, PLATFORMS["hyperv"].memory_step)
    yield f"# Makes the virtual machine in Hyper-V. Run as administrator:  .\\{main} [-Name NAME] [-SwitchName SWITCH]"
    yield "#requires -Modules Hyper-V"
    name, switch = quoted(display_name(machine.name)), quoted(hardware.network)
    yield f"param([string]$Name = {name}, [string]$SwitchName = {switch})"
    yield "$ErrorActionPreference = 'Stop'"
    yield ""
    yield "$disks = @(@("  # the outer one keeps a single disk a list
    for number, disk in enumerate(ordered(disks)):
        yield f"    {quoted(disk.file)}{',' if number + 1 < len(disks) else ''}"
    yield ") | ForEach-Object { Join-Path $PSScriptRoot $_ })"
    yield "foreach ($disk in $disks) {"
    yield '    if (-not (Test-Path -LiteralPath $disk)) { throw "The disk $disk is missing." }'
    yield "    & fsutil.exe sparse setflag $disk 0 | Out-Null"
    yield "}"
    yield ""
    yield f"$vm = New-VM -Name $Name -Generation {2 if uefi else 1} -MemoryStartupBytes {memory} -NoVHD"
    yield "try {"
    for line in _settings(machine, disks, hardware):
        yield f"    {line}"
    yield "} catch {"
    yield "    Remove-VM -VM $vm -Force"
    yield "    throw"
    yield "}"
    yield "Write-Host \"The virtual machine $Name was made. Start it with: Start-VM -Name '$Name'\""


def _settings(machine: Machine, disks: Sequence[DefinedDisk], hardware: Hardware) -> Iterator[str]:
    uefi = hardware.firmware is Firmware.UEFI
    yield f"Set-VMProcessor -VM $vm -Count {machine.cpu.count}"
    yield "Set-VMMemory -VM $vm -DynamicMemoryEnabled $false"
    yield "Get-VMNetworkAdapter -VM $vm | Remove-VMNetworkAdapter"
    for number, _ in enumerate(disks):
        kind, controller, location = _place(uefi, number)
        place = f"-ControllerType {kind} -ControllerNumber {controller} -ControllerLocation {location}"
        yield f"Add-VMHardDiskDrive -VM $vm {place} -Path $disks[{number}]"
    for number, nic in enumerate(machine.nics):
        legacy = " -IsLegacy $true" if hardware.nic == "legacy" else ""
        mac = f" -StaticMacAddress '{mac_of(nic.mac).replace(':', '').upper()}'" if mac_of(nic.mac) else ""
        yield f"Add-VMNetworkAdapter -VM $vm -Name 'net{number}'{legacy}{mac}"
    if machine.nics:
        yield "if ($SwitchName) { Get-VMNetworkAdapter -VM $vm | Connect-VMNetworkAdapter -SwitchName $SwitchName }"
    # A pipe that a terminal program can open, as the machine's first serial port.
    pipe = "\\\\.\\pipe\\" + file_stem(machine.name)
    yield f"Set-VMComPort -VM $vm -Number 1 -Path {quoted(pipe)}"
    if uefi:
        template = (
            " -SecureBootTemplate MicrosoftUEFICertificateAuthority" if machine.system.family != "windows" else ""
        )
        secure = f"On{template}" if hardware.secure_boot else "Off"
        yield "$boot = Get-VMHardDiskDrive -VM $vm | Select-Object -First 1"
        yield f"Set-VMFirmware -VM $vm -EnableSecureBoot {secure} -FirstBootDevice $boot"
    else:
        yield "Set-VMBios -VM $vm -StartupOrder @('IDE', 'CD', 'LegacyNetworkAdapter', 'Floppy')"


def _place(uefi: bool, number: int) -> tuple[str, int, int]:
    """Controller kind, number and place of a disk. Generation 1 has room for three on IDE beside its DVD drive (1:0);
    all others go to SCSI.
    """
    if uefi:
        return "SCSI", number // 64, number % 64
    places = [("IDE", 0, 0), ("IDE", 0, 1), ("IDE", 1, 1)]
    return places[number] if number < len(places) else ("SCSI", 0, number - len(places))
