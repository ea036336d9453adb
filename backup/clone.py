"""A restored machine that is to run beside its original: what tells the two apart, and what still does not."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from dataclasses import replace

from formats.errors import Notice
from formats.machine import Machine

_QEMU_OUI = "52:54:00"  # locally administered, and QEMU's by custom


def cloned(machine: Machine) -> Machine:
    """The machine with another name, other MAC addresses, and without the original's hardware UUID and serial number."""
    nics = tuple(replace(nic, mac=_fresh_mac() if nic.mac else "") for nic in machine.nics)
    host, dot, domain = machine.name.partition(".")
    platform = replace(machine.platform, uuid="", serial="")
    return replace(machine, name=f"{host}-clone{dot}{domain}", nics=nics, platform=platform)


def _fresh_mac() -> str:
    return ":".join([_QEMU_OUI, *(f"{byte:02x}" for byte in secrets.token_bytes(3))])


def shared_identity(machine: Machine) -> Iterator[Notice]:
    """What a clone of the machine still shares with it: it lies on the disks, which are restored as they were."""
    static = [address for nic in machine.nics if not nic.dhcp for address in nic.addresses]
    if static:
        yield Notice(
            code="clone-address",
            message=f"the clone comes up with the original's address: {', '.join(static)}",
            advice="Start it without a network, or in one of its own, and change the address before the two meet.",
        )
    if machine.system.family == "linux":
        yield Notice(
            code="clone-identity",
            message="the clone has the original's SSH host keys, machine-id and host name",
            advice="In the clone: rm /etc/ssh/ssh_host_*_key*; ssh-keygen -A; rm /etc/machine-id; systemd-machine-id-setup; "
            "hostnamectl set-hostname NAME",
        )
    elif machine.system.family == "windows":
        yield Notice(
            code="clone-identity",
            message="the clone has the original's computer name and SID",
            advice="In the clone, before it meets the domain: sysprep /generalize",
        )
    yield Notice(
        code="clone-uuids",
        message="partitions, file systems and volume groups of the clone have the original's UUIDs",
        advice="Never attach disks of both to one machine: which of the two is mounted would be chance.",
    )
