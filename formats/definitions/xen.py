"""Xen: a configuration for `xl create`, a machine of type HVM.

Facts: xl.cfg(5), xl-disk-configuration(5), xl-network-configuration(5) of Xen 4.17. A disk named xvda to xvdd is also an emulated IDE disk
until the guest's own drivers take it over; ``target`` is the last parameter of a disk and takes the rest of its text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from formats.definitions import DEFAULT_MEMORY, PLATFORMS, DefinedDisk, Definition, Hardware, ordered
from formats.definitions.text import bridge_name, display_name, file_stem, mac_of, memory_of, uuid_of
from formats.machine import Firmware, Machine


def render(machine: Machine, disks: Sequence[DefinedDisk], hardware: Hardware, *, folder: str) -> Definition:
    """The configuration. Its disks have absolute names below ``folder``: xl takes no others."""
    main = f"{file_stem(machine.name)}.cfg"
    return Definition(files={main: "\n".join(_lines(machine, disks, hardware, folder, main)) + "\n"}, main=main)


def quoted(text: str) -> str:
    """The text as a string of xl's configuration; control characters are dropped."""
    kept = "".join(c for c in text if c.isprintable())
    return '"' + kept.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _lines(machine: Machine, disks: Sequence[DefinedDisk], hardware: Hardware, folder: str, main: str) -> Iterator[str]:
    uefi = hardware.firmware is Firmware.UEFI
    yield f"# Start it with: xl create {main}"
    yield f"name = {quoted(display_name(machine.name))}"
    identity = uuid_of(machine)
    if identity is not None:
        yield f"uuid = {quoted(str(identity))}"
    yield 'type = "hvm"'
    yield f'firmware = "{"uefi" if uefi else "bios"}"'
    yield 'device_model_version = "qemu-xen"'  # the older one knows no UEFI
    yield f"memory = {memory_of(machine, DEFAULT_MEMORY, PLATFORMS['xen'].memory_step) >> 20}"
    yield f"vcpus = {machine.cpu.count}"
    if machine.clock_utc is False:
        yield "localtime = 1"
    yield "disk = ["
    for number, disk in enumerate(ordered(disks)):
        target = f"{folder.rstrip('/')}/{disk.file}" if folder else disk.file
        yield f"    {quoted(f'format={disk.format}, vdev=xvd{_letter(number)}, access=rw, target={target}')},"
    yield "]"
    yield "vif = ["
    for nic in machine.nics:
        mac = f"mac={mac_of(nic.mac)}," if mac_of(nic.mac) else ""
        bridge = bridge_name(hardware.network, "xenbr0")
        yield f"    {quoted(f'{mac}bridge={bridge},model={hardware.nic}')},"
    yield "]"
    yield 'boot = "c"'
    yield 'serial = "pty"'
    yield 'vga = "stdvga"'
    yield "vnc = 1"
    yield 'vnclisten = "127.0.0.1"'
    yield 'on_reboot = "restart"'
    yield 'on_crash = "preserve"'


def _letter(number: int) -> str:
    return chr(ord("a") + number)
