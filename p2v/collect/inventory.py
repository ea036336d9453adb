"""From the results of the command catalogue to the Machine record and its notices. Pure functions: nothing here talks to a host."""

from __future__ import annotations

import io
import json
import re
import shlex
import tarfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from formats.errors import Notice
from formats.machine import (
    Boot,
    Cpu,
    Disk,
    EfiVariable,
    Firmware,
    Kernel,
    Machine,
    OperatingSystem,
    Platform,
    Volume,
)
from p2v.collect import initramfs, network, storage
from p2v.collect.commands import CATALOGUE, CommandLog, Need

_VARIABLE_MOST = 64 << 10
_VARIABLES_MOST = 1024
_INITRAMFS = (
    "/boot/initrd.img-{v}",
    "/boot/initramfs-{v}.img",
    "/boot/initrd-{v}",
    "/boot/initrd-{v}.img",
    "/boot/initramfs-{v}",
)
_ESP_PLACES = ("/boot/efi", "/efi", "/boot")


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """A machine's record, what could not be learnt, and every command's result."""

    machine: Machine
    notices: tuple[Notice, ...]
    log: CommandLog


def inspection(log: CommandLog) -> Inspection:
    """The record of the machine that the log describes. What is missing there is empty in the record and, if it matters, a notice."""
    devices = storage.nodes(log)
    disks = storage.disks(log, devices)
    volumes = storage.volumes(devices)
    firmware = Firmware.UEFI if "efi" in log.outcomes and log.outcomes["efi"].exit_code == 0 else Firmware.BIOS
    machine = Machine(
        name=log.text("hostname").strip(),
        firmware=firmware,
        cpu=cpu(log),
        memory=memory(log),
        disks=disks,
        volumes=volumes,
        volume_groups=storage.volume_groups(log),
        nics=network.nics(log),
        system=system(log),
        boot=boot(log, firmware, disks, volumes),
        platform=platform(log),
        clock_utc="LOCAL" not in log.text("adjtime").split(),
    )
    return Inspection(machine=machine, notices=tuple(_notices(log, machine)), log=log)


def _notices(log: CommandLog, machine: Machine) -> Iterator[Notice]:
    if not log.complete:
        yield Notice(
            code="inspection-cut-short",
            message="the host ended the inspection before its last command",
            advice="See whether something there kills processes, then run the command again.",
        )
    needs = {command.name: command for command in CATALOGUE if command.need is Need.WANTED}
    for name, command in needs.items():
        outcome = log.outcomes.get(name)
        if outcome is not None and outcome.exit_code != 0 and not outcome.stdout.strip():
            why = "the tool is not there" if outcome.exit_code == 127 else f"exit code {outcome.exit_code}"
            last = outcome.error_text.splitlines()[-1:] or [""]
            yield Notice(
                code="not-collected",
                message=f"`{command.text.split(' -', 1)[0]}` gave nothing ({why}): {last[0]}".rstrip(": "),
                advice="What it would have told is missing in the record.",
                subject=name,
            )
    if log.text("user").strip() not in {"", "0"}:
        yield Notice(
            code="not-root",
            message="the machine was inspected without root: LVM, partition tables and parts of SMBIOS are missing",
            advice="Log in as root or as a user with sudo.",
        )
    yield from _machine_notices(machine, log)


def _machine_notices(machine: Machine, log: CommandLog) -> Iterator[Notice]:
    if not machine.disks:
        yield Notice(code="no-disks", message="no disk was found", advice="See the result of lsblk in the log.")
    for disk in machine.disks:
        if disk.id.startswith("name-"):
            yield Notice(
                code="unstable-disk-id",
                message=f"{disk.name} has no serial number, WWN or signature: only its name, which may change, tells it from others",
                subject=disk.id,
            )
    if any(volume.content == "LVM2_member" for volume in machine.volumes) and not machine.volume_groups:
        yield Notice(
            code="lvm-not-read",
            message="there are LVM physical volumes, but their group could not be read",
            advice="Install lvm2's tools on the host, or give the user sudo: without them no snapshot can be taken.",
        )
    for kernel in machine.boot.kernels:
        image = initramfs.parse(log.stdout("initramfs")).get(kernel.initramfs)
        if kernel.initramfs and kernel.drivers is None:
            yield Notice(
                code="initramfs-not-read",
                message=f"what {kernel.initramfs} holds could not be read: {image.error if image else log_error(log, 'initramfs')}",
                advice="Whether it can drive the target's disk is not known before the boot check.",
                subject=kernel.initramfs,
            )


def log_error(log: CommandLog, name: str) -> str:
    """The last line that a command wrote to standard error."""
    outcome = log.outcomes.get(name)
    lines = outcome.error_text.splitlines() if outcome is not None else []
    return lines[-1] if lines else "it was not listed"


def cpu(log: CommandLog) -> Cpu:
    """Processors, by lscpu."""
    fields = _lscpu(log.text("lscpu"))

    def count(name: str) -> int:
        text = fields.get(name, "")
        return int(text) if text.isdigit() and int(text) > 0 else 1

    sockets, cores, threads = count("Socket(s)"), count("Core(s) per socket"), count("Thread(s) per core")
    total = count("CPU(s)")
    if sockets * cores * threads != total:  # processors that are off line, or a topology of clusters
        sockets, cores, threads = 1, total, 1
    return Cpu(
        architecture=fields.get("Architecture") or (log.text("uname").split() or ["x86_64"])[-1],
        vendor=fields.get("Vendor ID", ""),
        model=fields.get("Model name", ""),
        sockets=sockets,
        cores_per_socket=cores,
        threads_per_core=threads,
        flags=tuple(fields.get("Flags", "").split()),
    )


def _lscpu(text: str) -> dict[str, str]:
    fields: dict[str, str] = {}

    def walk(items: Any, depth: int) -> None:
        for item in items if isinstance(items, list) and depth < 8 else []:
            if isinstance(item, dict):
                fields.setdefault(str(item.get("field", "")).rstrip(":"), str(item.get("data", "")))
                walk(item.get("children"), depth + 1)

    try:
        walk(json.loads(text)["lscpu"], 0)
    except (ValueError, KeyError, TypeError):
        return {}
    return fields


def memory(log: CommandLog) -> int:
    """Installed memory: whole memory blocks where the kernel tells them, since MemTotal lacks what firmware and kernel keep."""
    match = re.search(r"^MemTotal:\s+(\d+) kB", log.text("memory"), re.MULTILINE)
    total = int(match[1]) * 1024 if match else 0
    words = log.text("memory-blocks").split()
    try:
        blocks = int(words[0], 16) * int(words[1]) if len(words) == 2 else 0
    except ValueError:
        blocks = 0
    return blocks if total <= blocks <= total + max(total // 4, 1 << 28) else total


def system(log: CommandLog) -> OperatingSystem:
    """The operating system, by os-release."""
    return release(log.text("os-release"), init=log.text("init").strip())


def release(text: str, *, init: str = "") -> OperatingSystem:
    """A Linux system, by the text of its os-release."""
    found = _assignments(text)
    return OperatingSystem(
        family="linux",
        id=found.get("ID", ""),
        version=found.get("VERSION_ID", ""),
        name=found.get("PRETTY_NAME", ""),
        init=init,
    )


def _assignments(text: str) -> dict[str, str]:
    found = {}
    for line in text.splitlines():
        key, mark, value = line.partition("=")
        if mark and re.fullmatch(r"\w+", key):
            try:
                found[key] = "".join(shlex.split(value))
            except ValueError:
                found[key] = value
    return found


def platform(log: CommandLog) -> Platform:
    """The hardware's maker, by SMBIOS; fields that the maker left at their defaults are empty."""
    facts = dict(line.partition("=")[::2] for line in log.text("dmi").splitlines())

    def fact(name: str) -> str:
        value = facts.get(name, "").strip()
        empty = {"", "none", "not specified", "to be filled by o.e.m.", "default string", "system serial number", "0"}
        return "" if value.lower() in empty else value

    virtualization = log.text("virtualization").strip()
    return Platform(
        vendor=fact("sys_vendor"),
        product=fact("product_name"),
        serial=fact("product_serial"),
        uuid=fact("product_uuid").lower(),
        virtualization="" if virtualization == "none" else virtualization,
    )


def boot(log: CommandLog, firmware: Firmware, disks: Sequence[Disk], volumes: Sequence[Volume]) -> Boot:
    """How the machine starts."""
    files = {line.split(" ", 1)[0] for line in log.text("boot").splitlines()}
    line = log.text("cmdline").strip()
    variables = tuple(efi_variables(log.stdout("efivars")))
    secure = next((v.data[:1] == b"\1" for v in variables if v.name == "SecureBoot"), None)
    heads = {disk.id: log.stdout(f"head:{disk.name}")[:512] for disk in disks}
    loader, config = _loader(log, files, heads, firmware)
    return Boot(
        loader=loader,
        loader_config=config,
        disk=_boot_disk(firmware, heads, disks, volumes),
        command_line=line,
        consoles=tuple(word.removeprefix("console=") for word in line.split() if word.startswith("console=")),
        kernels=tuple(kernels(log)),
        running_kernel=[*log.text("uname").split(), "", ""][1],
        secure_boot=secure,
        efi_variables=variables,
    )


def _loader(log: CommandLog, files: set[str], heads: Mapping[str, bytes], firmware: Firmware) -> tuple[str, str]:
    esp = {line.split(" ", 1)[0].lower() for line in log.text("esp").splitlines()}
    grub = next((path for path in ("/boot/grub/grub.cfg", "/boot/grub2/grub.cfg") if path in files), "")
    if not grub:
        grub = next((path for path in sorted(esp) if path.endswith("/grub.cfg")), "")
    if firmware is Firmware.UEFI:
        if any("systemd-boot" in path for path in esp):
            return "systemd-boot", next((p for p in ("/boot/loader/loader.conf",) if p in files), "")
        if any("/grub" in path or "/shim" in path for path in esp):
            return "grub", grub
    elif any(b"GRUB" in head for head in heads.values()):
        legacy = next((path for path in ("/boot/grub/menu.lst", "/boot/grub/grub.conf") if path in files), "")
        return ("grub", grub) if grub or not legacy else ("grub-legacy", legacy)
    elif any(b"LILO" in head for head in heads.values()):
        return "lilo", "/etc/lilo.conf"
    for path in ("/boot/extlinux/extlinux.conf", "/boot/syslinux/syslinux.cfg"):
        if path in files:
            return "syslinux", path
    return ("grub", grub) if grub else ("", "")


def _boot_disk(firmware: Firmware, heads: Mapping[str, bytes], disks: Sequence[Disk], volumes: Sequence[Volume]) -> str:
    """The disk that firmware starts from: that of the ESP, or the one with a boot record, preferably that of /boot."""
    places = _ESP_PLACES if firmware is Firmware.UEFI else ("/boot", "/")
    holders = [
        disk
        for place in places
        for volume in volumes
        if place in volume.mountpoints and (firmware is Firmware.BIOS or volume.content == "vfat")
        for disk in storage.disk_below(volume.path, volumes, disks)
    ]
    if firmware is Firmware.BIOS:
        bootable = [disk for disk in disks if heads[disk.id][510:512] == b"\x55\xaa" and any(heads[disk.id][:440])]
        holders = [disk for disk in holders if disk in bootable] or bootable or holders
    return holders[0].id if holders else (disks[0].id if disks else "")


def kernels(log: CommandLog) -> Iterator[Kernel]:
    """The kernels in /boot, each with what its initramfs holds."""
    files = {line.split(" ", 1)[0] for line in log.text("boot").splitlines()}
    images = initramfs.parse(log.stdout("initramfs"))
    builtin = {name: result.text.split() for name, result in log.family("builtin") if result.exit_code == 0}
    yield from kernels_of(files, images, builtin)


def kernels_of(
    files: Collection[str], images: Mapping[str, initramfs.Image], builtin: Mapping[str, Sequence[str]]
) -> Iterator[Kernel]:
    """The kernels among the files of /boot, with what their initramfs ``images`` and lists of ``builtin`` modules (by version) say."""
    for path in sorted(files):
        match = re.fullmatch(r"/boot/(?:vmlinuz|vmlinux|kernel|bzImage)-(.+)", path)
        if match is None or path.endswith((".old", ".hmac", ".sig")):
            continue
        version = match[1]
        ram = next((name for p in _INITRAMFS if (name := p.format(v=version)) in files), "")
        image = images.get(ram)
        modules = builtin.get(version)
        yield Kernel(
            version=version,
            image=path,
            initramfs=ram,
            initramfs_kind=image.kind if image else "",
            drivers=image.modules if image and not image.error else None,
            host_only=image.host_only if image and not image.error else None,
            builtin=None if modules is None else tuple(m.rsplit("/", 1)[-1].split(".ko")[0] for m in modules),
        )


def efi_variables(archive: bytes) -> Iterator[EfiVariable]:
    """The variables of a tar of efivarfs: ``Name-GUID`` files, 4 bytes of attributes (little endian), then the data."""
    if not archive:
        return
    try:
        with tarfile.open(fileobj=io.BytesIO(archive), mode="r:") as tar:
            for count, member in enumerate(tar):
                match = re.fullmatch(
                    r"(?:\./)?([^/]{1,512})-([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})", member.name
                )
                if (
                    match is None
                    or not member.isfile()
                    or not 4 <= member.size <= _VARIABLE_MOST
                    or count > _VARIABLES_MOST
                ):
                    continue
                stream = tar.extractfile(member)
                content = stream.read(_VARIABLE_MOST) if stream is not None else b""
                yield EfiVariable(
                    name=match[1], guid=match[2], attributes=int.from_bytes(content[:4], "little"), data=content[4:]
                )
    except tarfile.TarError:
        return
