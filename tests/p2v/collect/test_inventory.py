"""From command results to the Machine record: the real output of a real machine, and parts of it missing or damaged."""

from __future__ import annotations

import dataclasses
import gzip
import io
import json
import re
import subprocess
import tarfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from formats.machine import Bus, Firmware, TableKind
from p2v.collect import commands, inventory, network, storage
from p2v.collect.commands import CommandLog, Outcome
from p2v.session import CommandResult

DATA = Path(__file__).parents[2] / "data" / "inventory"
NONCE = "00ff00ff"


def read(name: str) -> bytes:
    return gzip.decompress((DATA / name).read_bytes())


@pytest.fixture(scope="module")
def log() -> CommandLog:
    """What the machine bios-lvm of tests/machines answered."""
    return commands.parse(NONCE, read("bios-lvm.stdout.gz"), read("bios-lvm.stderr.gz"))


def changed(log: CommandLog, **texts: str | bytes | None) -> CommandLog:
    """The log with other outputs; None: the tool was missing. In names ``__`` stands for a colon, ``_`` for a hyphen."""
    outcomes = dict(log.outcomes)
    for key, text in texts.items():
        name = key.replace("__", ":").replace("_", "-")
        content = b"" if text is None else text.encode() if isinstance(text, str) else text
        outcomes[name] = Outcome(
            name=name,
            exit_code=127 if text is None else 0,
            stdout=content,
            stderr=b"not found" if text is None else b"",
            seconds=0.0,
        )
    return CommandLog(outcomes=outcomes)


def test_the_real_machine(log: CommandLog) -> None:
    found = inventory.inspection(log)
    machine = found.machine
    assert found.notices == ()
    assert (machine.name, machine.firmware, machine.memory) == ("metal1", Firmware.BIOS, 1 << 30)
    assert (machine.cpu.count, machine.cpu.architecture) == (2, "x86_64")
    (disk,) = machine.disks
    assert (disk.name, disk.serial, disk.bus, disk.driver) == ("sda", "P2VSRC0001", Bus.SATA, "ahci")
    assert disk.id == "serial-NORTHWIND_NW6000-P2VSRC0001"
    assert disk.table is not None
    assert disk.table.kind is TableKind.MBR
    assert [(p.number, p.start, p.type, p.bootable) for p in disk.table.partitions] == [
        (1, 1 << 20, "0x83", True),
        (2, 301 << 20, "0x8e", False),
    ]
    tree = {volume.path: volume for volume in machine.volumes}
    assert tree["/dev/mapper/vg0-root"].parents == ("/dev/sda2",)
    assert tree["/dev/mapper/vg0-root"].mountpoints == ("/",)
    assert tree["/dev/sda1"].content == "ext4"
    (group,) = machine.volume_groups
    assert (group.name, group.free_extents, group.extent_size) == ("vg0", 564, 4 << 20)
    (nic,) = machine.nics
    assert (nic.name, nic.mac, nic.driver) == ("enp0s25", "52:54:00:a1:00:01", "e1000")
    assert (nic.configured_by, nic.dhcp, nic.up) == ("ifupdown", True, True)
    assert (machine.system.id, machine.system.version, machine.system.init) == ("debian", "12", "systemd")
    assert (machine.boot.loader, machine.boot.loader_config) == ("grub", "/boot/grub/grub.cfg")
    assert machine.boot.disk == disk.id
    assert machine.boot.consoles == ("tty0", "ttyS0,115200")
    (kernel,) = machine.boot.kernels
    assert kernel.version == machine.boot.running_kernel
    assert kernel.initramfs_kind == "initramfs-tools"
    assert kernel.host_only is False
    assert kernel.drivers is not None
    assert {"ahci", "virtio_blk", "nvme", "mptspi"} <= set(kernel.drivers)
    assert kernel.builtin
    assert machine.platform.product == "Tower 100"


def test_every_result_is_kept_with_code_and_time(log: CommandLog) -> None:
    assert log.complete
    assert log.outcomes["permanent:enp0s25"].exit_code == 127
    assert "ethtool" in log.outcomes["permanent:enp0s25"].error_text
    assert all(outcome.seconds >= 0 for outcome in log.outcomes.values())
    assert sum(outcome.seconds for outcome in log.outcomes.values()) > 0


def test_a_missing_tool_is_a_notice(log: CommandLog) -> None:
    found = inventory.inspection(changed(log, lscpu=None, addresses=None))
    assert {(n.code, n.subject) for n in found.notices} == {("not-collected", "lscpu"), ("not-collected", "addresses")}
    assert found.machine.disks


def test_without_root_it_says_so(log: CommandLog) -> None:
    found = inventory.inspection(changed(log, user="1000\n", lvm=None, table__sda=None, head__sda=""))
    assert {"not-root", "lvm-not-read"} <= {n.code for n in found.notices}
    assert found.machine.disks[0].table is None


def test_an_old_lsblk_is_understood(log: CommandLog) -> None:
    new, old = inventory.inspection(log).machine, inventory.inspection(changed(log, lsblk=None)).machine
    assert [(d.id, d.size, d.bus) for d in old.disks] == [(d.id, d.size, d.bus) for d in new.disks]
    assert [(v.path, v.parents, v.content, v.mountpoints) for v in old.volumes] == [
        (v.path, v.parents, v.content, v.mountpoints) for v in new.volumes
    ]


def test_without_sfdisk_the_table_is_read_from_the_disk(log: CommandLog) -> None:
    new, old = inventory.inspection(log).machine, inventory.inspection(changed(log, table__sda=None)).machine
    assert old.disks[0].table is not None
    assert new.disks[0].table is not None
    assert [dataclasses.replace(p, label="") for p in old.disks[0].table.partitions] == list(
        new.disks[0].table.partitions
    )


def test_disks_of_one_serial_number_get_ids_of_their_own() -> None:
    device = {"type": "disk", "size": 1 << 20, "serial": "123", "model": "X"}
    tree = {
        "blockdevices": [{"name": name, "kname": name, "path": f"/dev/{name}", **device} for name in ("sda", "sdb")]
    }
    log = CommandLog(outcomes={"lsblk": outcome("lsblk", json.dumps(tree).encode())})
    disks = storage.disks(log, storage.nodes(log))
    assert [disk.id for disk in disks] == ["serial-X-123.sda", "serial-X-123.sdb"]


def outcome(name: str, stdout: bytes) -> Outcome:
    return Outcome(name=name, exit_code=0, stdout=stdout, stderr=b"", seconds=0.0)


def test_efi_variables_come_whole(log: CommandLog) -> None:
    guid = "8be4df61-93ca-11d2-aa0d-00e098032b8c"
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in (
            (f"./SecureBoot-{guid}", b"\x06\0\0\0\x01"),
            (f"./Boot0001-{guid}", b"\x07\0\0\0" + bytes(range(256))),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    machine = inventory.inspection(changed(log, efi="64\n", efivars=buffer.getvalue())).machine
    assert machine.firmware is Firmware.UEFI
    assert machine.boot.secure_boot is True
    assert [(v.name, v.attributes, len(v.data)) for v in machine.boot.efi_variables] == [
        ("SecureBoot", 6, 1),
        ("Boot0001", 7, 256),
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("@file /etc/network/interfaces\nauto e0\niface e0 inet static\n", ("ifupdown", False)),
        ("@file /etc/netplan/01.yaml\nnetwork:\n  ethernets:\n    e0:\n      dhcp4: true\n", ("netplan", True)),
        (
            "@file /etc/netplan/01.yaml\nnetwork:\n  ethernets:\n"
            "    lan:\n      match:\n        macaddress: 52:54:00:00:00:01\n      dhcp4: no\n",
            ("netplan", False),
        ),
        ("@file /etc/sysconfig/network-scripts/ifcfg-e0\nDEVICE=e0\nBOOTPROTO=dhcp\n", ("ifcfg", True)),
        ("@file /etc/sysconfig/network-scripts/ifcfg-lan\nHWADDR=52:54:00:00:00:01\nBOOTPROTO=none\n", ("ifcfg", False)),
        (
            "@file /etc/NetworkManager/system-connections/a.nmconnection\n[connection]\nid=a\ninterface-name=e0\n[ipv4]\nmethod=auto\n",
            ("NetworkManager", True),
        ),
        ("@file /etc/systemd/network/a.network\n[Match]\nName=en* e*\n[Network]\nDHCP=yes\n", ("systemd-networkd", True)),
        ("@file /etc/network/interfaces\niface other inet dhcp\n", ("", True)),
    ],
)  # fmt: skip
def test_who_configures_a_nic(text: str, expected: tuple[str, bool]) -> None:
    link = [
        {
            "ifname": "e0",
            "addr_info": [{"family": "inet", "local": "10.0.0.2", "prefixlen": 24, "scope": "global", "dynamic": True}],
        }
    ]
    facts = b"address=52:54:00:00:00:01\noperstate=up\ndevice=/sys/devices/x\ndriver=igb\n"
    log = CommandLog(
        outcomes={
            "addresses": outcome("addresses", json.dumps(link).encode()),
            "nic:e0": outcome("nic:e0", facts),
            "network": outcome("network", text.encode()),
        }
    )
    (nic,) = network.nics(log)
    assert (nic.configured_by, nic.dhcp) == expected
    assert nic.addresses == ("10.0.0.2/24",)


@pytest.mark.parametrize(
    "secret",
    ["psk=hidden", "password=hidden", "wep-key0=hidden", "    wpa-psk hidden", 'WPA_PSK="hidden"', "        password: hidden",
     "private-key-password=hidden",
     "wireless-key hidden", "psk: hidden"],
)  # fmt: skip
def test_network_secrets_stay_where_they_are(tmp_path: Path, secret: str) -> None:
    command = next(command for command in commands.CATALOGUE if command.name == "network")
    file = tmp_path / "connection"
    file.write_text(f"[connection]\nid=a\ninterface-name=e0\n{secret}\n[ipv4]\nmethod=auto\n")
    text = re.sub(r"^for f in .*?; do", f"for f in {file}; do", command.text, count=1, flags=re.DOTALL)
    shown = subprocess.run(["sh", "-c", text], capture_output=True, text=True, check=True).stdout
    assert "interface-name=e0" in shown
    assert "hidden" not in shown


class LocalShell:
    """Runs the batch on this computer: a ``Runner``."""

    def run(
        self,
        command: object,
        *,
        root: bool = False,
        input: bytes = b"",  # noqa: A002 - the session's word for it
        timeout: float = 60.0,
        check: bool = False,
    ) -> CommandResult:
        done = subprocess.run(["sh", "-s"], input=input, capture_output=True, timeout=timeout, check=check)
        return CommandResult(
            command="sh -s", exit_code=done.returncode, stdout=done.stdout, stderr=done.stderr, seconds=0.0
        )


def test_the_batch_runs_on_this_computer() -> None:
    log = commands.collect(LocalShell())
    assert log.complete
    names = {command.name for command in commands.CATALOGUE if not command.each}
    assert names <= set(log.outcomes)
    machine = inventory.inspection(log).machine
    assert machine.memory > 0
    assert machine.cpu.count > 0


@pytest.mark.parametrize("shell", ["dash", "bash", "busybox sh"])
def test_the_batch_is_posix_shell(shell: str) -> None:
    words = shell.split()
    try:
        text = commands.script(NONCE) + commands.initramfs_script(NONCE)
        done = subprocess.run([*words, "-n"], input=text.encode(), capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip(f"not installed: {words[0]}")
    assert (done.returncode, done.stderr) == (0, b"")


@given(
    st.dictionaries(
        st.text("abc:-", min_size=1, max_size=8),
        st.tuples(st.binary(max_size=200), st.binary(max_size=50), st.integers(0, 255)),
        max_size=6,
    )
)
def test_frames_hold_any_bytes(results: dict[str, tuple[bytes, bytes, int]]) -> None:
    stdout = stderr = b""
    for name, (out, err, code) in results.items():
        stdout += (
            b"\n@%b B %b\n" % (NONCE.encode(), name.encode()) + out + b"\n@%b E %d 1.00 1.50\n" % (NONCE.encode(), code)
        )
        stderr += b"\n@%b B %b\n" % (NONCE.encode(), name.encode()) + err + b"\n@%b E\n" % NONCE.encode()
    log = commands.parse(NONCE, stdout + b"\n@%b Z\n" % NONCE.encode(), stderr)
    assert log.complete
    assert {n: (o.stdout, o.stderr, o.exit_code) for n, o in log.outcomes.items()} == results
    assert not commands.parse(NONCE, stdout, stderr).complete


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(data=st.data())
def test_damaged_results_never_break_the_record(log: CommandLog, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(log.outcomes)))
    original = log.outcomes[name].stdout
    place = data.draw(st.integers(0, max(0, len(original) - 1)))
    damaged = data.draw(
        st.sampled_from(
            [
                original[:place],
                original[:place] + b"\xff{]\n" + original[place:],
                b"[]",
                b"null",
                b'{"report": [{"vg": 1}]}',
                b'{"blockdevices": [1, {"children": 2}]}',
                b"\0" * 600,
            ]
        )
    )
    outcomes = {**log.outcomes, name: dataclasses.replace(log.outcomes[name], stdout=damaged)}
    inventory.inspection(CommandLog(outcomes=outcomes))
