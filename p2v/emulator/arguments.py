"""QEMU's command line, made from the records of ``hardware``."""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from formats import qemu_img
from formats.machine import Firmware
from p2v.emulator.acceleration import Accelerator
from p2v.emulator.hardware import Chipset, Controller, DirectKernel, Drive, Hardware, Network
from p2v.errors import EmulatorError

# Code and variable store of OVMF builds without secure boot, as distributions install them:
# Debian and Ubuntu, Fedora, Arch, openSUSE.
_OVMF = (
    ("/usr/share/OVMF/OVMF_CODE_4M.fd", "/usr/share/OVMF/OVMF_VARS_4M.fd"),
    ("/usr/share/OVMF/OVMF_CODE.fd", "/usr/share/OVMF/OVMF_VARS.fd"),
    ("/usr/share/edk2/ovmf/OVMF_CODE.fd", "/usr/share/edk2/ovmf/OVMF_VARS.fd"),
    ("/usr/share/edk2/x64/OVMF_CODE.4m.fd", "/usr/share/edk2/x64/OVMF_VARS.4m.fd"),
    ("/usr/share/qemu/ovmf-x86_64-code.bin", "/usr/share/qemu/ovmf-x86_64-vars.bin"),
)

# Controllers that are a SCSI host adapter: QEMU's device and the number of targets that the emulation takes.
_SCSI = {
    Controller.VIRTIO_SCSI: ("virtio-scsi-pci", 255),
    Controller.LSI53C895A: ("lsi53c895a", 7),
    Controller.MPTSAS1068: ("mptsas1068", 8),
    Controller.MEGASAS: ("megasas", 64),
    Controller.PVSCSI: ("pvscsi", 64),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class OvmfFiles:
    """The UEFI firmware: code, opened read-only, and the template of its variable store."""

    code: Path
    variables: Path


def find_ovmf() -> OvmfFiles:
    """The installed UEFI firmware; ``EmulatorError`` with the package to install if there is none."""
    for code, variables in _OVMF:
        if Path(code).is_file() and Path(variables).is_file():
            return OvmfFiles(code=Path(code), variables=Path(variables))
    raise EmulatorError(
        "no UEFI firmware (OVMF) is installed",
        advice="install it (Debian, Ubuntu: apt-get install ovmf; Fedora: dnf install edk2-ovmf)",
    )


def escaped(value: Path | str) -> str:
    """``value`` as part of an option: QEMU ends a value at a comma unless it is doubled."""
    return str(value).replace(",", ",,")


def board(hardware: Hardware, accelerator: Accelerator) -> list[str]:
    """Machine, processor and memory. Nothing is on the board that was not asked for."""
    # Left out of all that TCG can do: five-level page tables, which only cost time in an emulator, and nested virtualization, which
    # makes guests load kvm.
    processor = "host,migratable=off" if accelerator is Accelerator.KVM else "max,la57=off,svm=off"
    tcg = "tcg,thread=multi,tb-size=512"
    return [
        *("-no-user-config", "-nodefaults", "-display", "none", "-parallel", "none"),
        *("-machine", hardware.chipset.value, "-accel", tcg if accelerator is Accelerator.TCG else "kvm"),
        *("-cpu", processor, "-smp", str(hardware.cpus), "-m", f"{hardware.memory >> 20}M"),
        *("-rtc", "base=utc"),
    ]


def firmware(kind: Firmware, files: OvmfFiles | None, variables: Path) -> list[str]:
    """The firmware; UEFI writes its variables into the run's own copy ``variables``."""
    if kind is Firmware.BIOS or files is None:
        return []
    return [
        *("-drive", f"if=pflash,unit=0,format=raw,readonly=on,file={escaped(files.code)}"),
        *("-drive", f"if=pflash,unit=1,format=raw,file={escaped(variables)}"),
    ]


def display(hardware: Hardware, *, windows: bool) -> list[str]:
    """A standard VGA. For BIOS guests it hangs on ISA: Linux has no driver for that one and stays in text mode, which can be read.

    UEFI draws on a linear frame buffer that only the PCI device has; so does Windows. With ISA's VGA SeaBIOS hangs on a Q35 (seen
    with QEMU 7.2).
    """
    on_isa = hardware.firmware is Firmware.BIOS and hardware.chipset is Chipset.PC and not windows
    return ["-device", "isa-vga" if on_isa else "VGA"]


def network(network: Network | None, hardware: Hardware) -> list[str]:
    """The network card on a user-mode network that is cut off (``restrict``) but for forwards from 127.0.0.1.

    The card has no option ROM: nothing is booted from the network.
    """
    if network is None or hardware.nic is None:
        return ["-nic", "none"]
    options = ["user", "id=net0", "restrict=on", "ipv6=off"]
    guest = "10.0.2.15"
    placed = _subnet(network)
    if placed is not None:
        subnet, guest, router, name_server = placed
        options += [f"net={subnet}", f"host={router}", f"dhcpstart={guest}", f"dns={name_server}"]
    options += [f"hostfwd=tcp:127.0.0.1:0-{guest}:{port}" for port in network.forwards]
    mac = f",mac={network.mac}" if network.mac else ""
    bus = "pcie.0" if hardware.chipset is Chipset.Q35 else "pci.0"
    place = f",bus={bus},addr={hardware.nic_slot}" if hardware.nic_slot else ""
    # Where the firmware numbers its slots for hot-plugging, guests name cards after that number instead of the PCI address.
    plain = ["-global", "PIIX4_PM.acpi-root-pci-hotplug=off"] if place and hardware.chipset is Chipset.PC else []
    return [*plain, "-netdev", ",".join(options), "-device", f"{hardware.nic},netdev=net0,romfile={mac}{place}"]


def _subnet(network: Network) -> tuple[str, str, str, str] | None:
    # Subnet, guest, router and name server for a guest with an address of its own; None when the default does.
    try:
        interface = ipaddress.IPv4Interface(network.address)
        gateway = ipaddress.IPv4Address(network.gateway) if network.gateway else None
    except ValueError:
        return None
    subnet = interface.network
    if subnet.prefixlen > 29:  # slirp needs router, name server and guest beside each other
        return None
    taken = {interface.ip, subnet.network_address, subnet.broadcast_address}
    free = (address for address in subnet.hosts() if address not in taken)
    router = gateway if gateway in subnet and gateway not in taken and gateway is not None else next(free)
    name_server = next(address for address in free if address != router)
    return str(subnet), str(interface.ip), str(router), str(name_server)


def agent(end: int) -> list[str]:
    """The channel of QEMU's guest agent, on the socket with this file descriptor."""
    return [
        *("-chardev", f"socket,id=agent,fd={end}", "-device", "virtio-serial-pci"),
        *("-device", "virtserialport,chardev=agent,name=org.qemu.guest_agent.0"),
    ]


def kernel(kernel: DirectKernel | None) -> list[str]:
    """A kernel that is started directly."""
    if kernel is None:
        return []
    initramfs = ["-initrd", str(kernel.initramfs)] if kernel.initramfs else []
    return ["-kernel", str(kernel.image), *initramfs, "-append", kernel.command_line]


def disks(drives: Sequence[Drive], hardware: Hardware) -> list[str]:
    """The disks behind their overlays, in order; the first is the one the firmware starts from."""
    argv = list(_controllers(hardware, len(drives)))
    for number, drive in enumerate(drives):
        argv += _backend(drive, number)
        place = _place(hardware, number)
        sectors = _sectors(drive, hardware.controller)
        serial = (
            f",serial={escaped(drive.serial[:20])}" if drive.serial else _default_serial(hardware.controller, number)
        )
        argv += ["-device", f"{place},drive=disk{number},id=dev{number},bootindex={number + 1}{serial}{sectors}"]
    return argv


def _backend(drive: Drive, number: int) -> list[str]:
    below = base_node(drive)
    name = f"disk{number}"
    if drive.overlay is None:
        # QEMU makes the overlay itself, without a name on disk: nothing can be left behind. TMPDIR says where it lies.
        text = escaped("json:" + json.dumps(below, ensure_ascii=False))
        return ["-drive", f"if=none,id={name},snapshot=on,cache=unsafe,discard=unmap,file={text}"]
    top = {
        "driver": "qcow2",
        "node-name": name,
        "file": {"driver": "file", "filename": str(drive.overlay), "discard": "unmap"},
        "backing": {**below, "read-only": True},
        "discard": "unmap",
        "cache": {"no-flush": True},
    }
    return ["-blockdev", json.dumps(top, ensure_ascii=False)]


def base_node(drive: Drive) -> dict[str, object]:
    """The block node of the disk below the overlay: its format stated, its backing file cut off."""
    if drive.path is not None:
        text = qemu_img.node(drive.path.resolve(), drive.format, options=dict(drive.options))
        parsed: dict[str, object] = json.loads(text.removeprefix("json:"))
        return parsed
    return {"driver": "raw", "file": {"driver": "nbd", **_nbd_address(drive.uri)}}


def _nbd_address(uri: str) -> Mapping[str, object]:
    # https://github.com/NetworkBlockDevice/nbd/blob/master/doc/uri.md
    parts = urlsplit(uri)
    name = unquote(parts.path.removeprefix("/"))
    if parts.scheme == "nbd+unix":
        sockets = parse_qs(parts.query).get("socket", [])
        if len(sockets) == 1:
            return {"server": {"type": "unix", "path": sockets[0]}, "export": name}
    elif parts.scheme == "nbd" and parts.hostname:
        server = {"type": "inet", "host": parts.hostname, "port": str(parts.port or 10809)}
        return {"server": server, "export": name}
    raise EmulatorError(f"not an NBD URI: {uri}", advice="use nbd+unix:///NAME?socket=PATH or nbd://HOST:PORT/NAME")


def _controllers(hardware: Hardware, count: int) -> Iterator[str]:
    kind = hardware.controller
    if kind in _SCSI:
        device, targets = _SCSI[kind]
        if count > targets:
            raise EmulatorError(
                f"{count} disks do not fit on one emulated {kind}, which takes {targets}",
                advice="choose another disk bus or boot with fewer disks",
            )
        yield from ("-device", f"{device},id=hba0")
    elif kind is Controller.IDE and hardware.chipset is Chipset.Q35:
        yield from ("-device", "piix3-ide,id=piix")
    if kind is Controller.SATA or (kind is Controller.IDE and count > 4):
        for first in range(0, count, 6):
            yield from ("-device", f"ich9-ahci,id=ahci{first // 6}")


def _place(hardware: Hardware, number: int) -> str:
    kind = hardware.controller
    if kind is Controller.IDE and number < 4:
        bus = "piix" if hardware.chipset is Chipset.Q35 else "ide"
        return f"ide-hd,bus={bus}.{number // 2},unit={number % 2}"
    if kind in (Controller.IDE, Controller.SATA):  # PIIX has four places; the disks behind them go to SATA
        return f"ide-hd,bus=ahci{number // 6}.{number % 6}"
    if kind is Controller.VIRTIO_BLK:
        return "virtio-blk-pci"
    if kind is Controller.NVME:
        return "nvme"
    return f"scsi-hd,bus=hba0.0,scsi-id={number}"


def _default_serial(kind: Controller, number: int) -> str:
    # An NVMe controller must have a serial number.
    return f",serial=disk{number}" if kind is Controller.NVME else ""


def _sectors(drive: Drive, kind: Controller) -> str:
    if (drive.logical_sector, drive.physical_sector) == (512, 512):
        return ""
    if kind in (Controller.IDE, Controller.SATA):  # QEMU's ATA disks have logical sectors of 512 bytes
        return f",physical_block_size={drive.physical_sector}"
    return f",logical_block_size={drive.logical_sector},physical_block_size={drive.physical_sector}"
