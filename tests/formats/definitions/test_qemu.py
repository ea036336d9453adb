"""The QEMU script: checked as a script, run with a recorder in QEMU's place, and run with QEMU."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from formats.definitions import PLATFORMS, DefinedDisk, Definition, Hardware, render
from formats.definitions.text import display_name
from formats.machine import Bus, Firmware
from tests.formats.definitions.sample import CHOICES, FOLDER, METAL, MODERN
from tests.formats.definitions.test_definitions import NAMES
from tests.requirement import needs

_SECONDS = 60


def written(definition: Definition, folder: Path) -> Path:
    """The script, executable, in the folder."""
    path = folder / definition.main
    path.write_text(definition.files[definition.main], encoding="utf-8")
    path.chmod(0o755)
    return path


@needs("shellcheck")
@pytest.mark.parametrize("name", [name for name in CHOICES if name.startswith("qemu")])
def test_the_script_is_sound(name: str) -> None:
    path = FOLDER / f"{name}.sh"
    assert subprocess.run(["sh", "-n", path], check=False).returncode == 0
    checked = subprocess.run(["shellcheck", "-s", "sh", path], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout


def recorded(path: Path, **environment: str) -> list[str]:
    """The arguments that the script would start QEMU with."""
    recorder = path.parent / "recorder"
    recorder.write_text('#!/bin/sh\nfor word in "$@"; do printf "%s\\0" "$word"; done\n')
    recorder.chmod(0o755)
    kept = {k: v for k, v in os.environ.items() if k not in ("DISPLAY", "WAYLAND_DISPLAY")}
    done = subprocess.run(
        [path, "--last", "one more"],
        env={**kept, "QEMU": str(recorder), **environment},
        capture_output=True,
        check=True,
        cwd="/",
    )
    return done.stdout.decode().split("\0")[:-1]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=NAMES, file=NAMES, network=NAMES)
def test_nothing_in_a_name_is_run_or_becomes_an_option(tmp_path: Path, name: str, file: str, network: str) -> None:
    disk = f"d{''.join(c for c in file if c.isprintable() and c not in '/' and c != chr(92))}.qcow2"
    machine = replace(METAL, name=name)
    hardware = Hardware(bus=Bus.VIRTIO, nic="e1000", network=network)
    before = set(tmp_path.iterdir())
    path = written(render("qemu", machine, [DefinedDisk(file=disk, format="qcow2")], hardware), tmp_path)
    words = recorded(path)
    assert words[words.index("-name") + 1] == "guest=" + display_name(name).replace(",", ",,")
    drives = [words[n + 1] for n, word in enumerate(words) if word == "-drive"]
    assert [drive.partition("file=")[2] for drive in drives] == ["./" + disk.replace(",", ",,")]
    assert words[-2:] == ["--last", "one more"]
    path.unlink()
    assert {p.name for p in set(tmp_path.iterdir()) - before} <= {"recorder"}


def test_the_environment_overrules(tmp_path: Path) -> None:
    path = written(
        render("qemu", METAL, [DefinedDisk(file="a", format="raw")], Hardware(bus=Bus.IDE, nic="e1000")), tmp_path
    )
    words = recorded(path, ACCEL="tcg", CPU="qemu64", NETWORK="user,restrict=on")
    assert words[words.index("-accel") + 1] == "tcg"
    assert words[words.index("-cpu") + 1] == "qemu64"
    assert "user,restrict=on,model=e1000,mac=52:54:00:a1:00:01" in words
    assert words[words.index("-machine") + 1] == "pc"
    assert words[words.index("-display") : words.index("-display") + 2] == ["-display", "none"]
    assert "-display" not in recorded(path, DISPLAY=":0")


class Monitor:
    """A QMP connection to the QEMU that the script started."""

    def __init__(self, path: Path, process: subprocess.Popen[bytes]) -> None:
        limit = time.monotonic() + _SECONDS
        self._socket = socket.socket(socket.AF_UNIX)
        while True:
            if process.poll() is not None:
                assert process.stderr is not None
                raise AssertionError(f"QEMU ended: {process.stderr.read().decode()}")
            try:
                self._socket.connect(str(path))
                break
            except OSError:
                assert time.monotonic() < limit, "QEMU did not open its monitor"
                time.sleep(0.05)
        self._file = self._socket.makefile("rw")
        self._file.readline()
        self("qmp_capabilities")

    def __call__(self, command: str, **arguments: object) -> Any:
        self._file.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
        self._file.flush()
        while True:
            answer = json.loads(self._file.readline())
            if "return" in answer or "error" in answer:
                assert "error" not in answer, answer
                return answer["return"]


CASES = [(bus, Firmware.BIOS) for bus in PLATFORMS["qemu"].buses] + [
    (Bus.SATA, Firmware.UEFI),
    (Bus.VIRTIO, Firmware.UEFI),
]
MODELS = {
    Bus.VIRTIO: "virtio-blk-pci",
    Bus.VIRTIO_SCSI: "scsi-hd",
    Bus.SATA: "ide-hd",
    Bus.IDE: "ide-hd",
    Bus.NVME: "nvme",
    Bus.SCSI: "scsi-hd",
    Bus.SAS: "scsi-hd",
}


@needs("qemu-system-x86_64", "qemu-img")
@pytest.mark.parametrize(("bus", "firmware"), CASES)
def test_qemu_takes_the_machine(tmp_path: Path, bus: Bus, firmware: Firmware) -> None:
    if firmware is Firmware.UEFI and not Path("/usr/share/OVMF/OVMF_CODE_4M.fd").exists():
        pytest.skip("not installed: ovmf")
    sector = 4096 if PLATFORMS["qemu"].buses[bus].large_sectors else 512
    for file in ("one, two.qcow2", "boot.qcow2"):
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", tmp_path / file, "64M"], check=True)
    disks = [
        DefinedDisk(file="one, two.qcow2", format="qcow2", size=64 << 20, disk_id="wwn-2", logical_sector=sector),
        DefinedDisk(file="boot.qcow2", format="qcow2", size=64 << 20, disk_id="wwn-1", boot=True),
    ]
    machine = replace(METAL if firmware is Firmware.BIOS else MODERN, memory=256 << 20, cpu=METAL.cpu)
    definition = render("qemu", machine, disks, Hardware(bus=bus, nic="e1000", firmware=firmware))
    path = written(definition, tmp_path)
    process = subprocess.Popen(
        [path, "-S", "-qmp", f"unix:{tmp_path}/qmp,server=on,wait=off"],
        env={**os.environ, "ACCEL": "tcg"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    try:
        monitor = Monitor(tmp_path / "qmp", process)
        assert monitor("query-status")["status"] == "prelaunch"
        assert len(monitor("query-cpus-fast")) == 4
        assert monitor("query-memory-size-summary")["base-memory"] == 256 << 20
        blocks = {b["device"]: b["inserted"]["file"] for b in monitor("query-block") if b["device"].startswith("disk")}
        assert blocks == {"disk0": "./one, two.qcow2", "disk1": "./boot.qcow2"}
        tree = monitor("human-monitor-command", **{"command-line": "info qtree"})
        assert tree.count(f"dev: {MODELS[bus]},") == 2
        assert 'serial = "P2VSRC0001"' in tree
        anonymous = "/machine/peripheral-anon"
        items = [item["name"] for item in monitor("qom-list", path=anonymous) if item["type"].startswith("child<")]
        devices = [f"{anonymous}/{item}" for item in items]
        orders = {
            monitor("qom-get", path=device, property="drive"): monitor("qom-get", path=device, property="bootindex")
            for device in devices
            if "drive" in {item["name"] for item in monitor("qom-list", path=device)}
        }
        assert orders == {"disk0": -1, "disk1": 1}
        if sector == 4096:
            assert "logical_block_size = 4096" in tree
        assert "52:54:00:a1:00:01" in tree or firmware is Firmware.UEFI
        monitor("quit")
        assert process.wait(_SECONDS) == 0
    finally:
        process.kill()
        process.wait()
    if firmware is Firmware.UEFI:
        assert (tmp_path / definition.main.replace(".sh", ".nvram.fd")).stat().st_size > 100_000
