"""A machine that runs from the repository: its disks served, what it writes kept beside, the point as it was."""

from __future__ import annotations

import hashlib
import json
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tests.backup.shell import Shell
from tests.backup.test_cli import serving
from tests.machines.builder import BuiltMachine
from tests.requirement import needs

pytestmark = needs("qemu-img", "qemu-io")


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def qemu_io(image: str, *commands: str) -> str:
    words = [word for command in commands for word in ("-c", command)]
    return subprocess.run(["qemu-io", "-f", "qcow2", *words, image], capture_output=True, text=True, check=True).stdout


def test_what_is_written_to_an_overlay_is_kept_and_the_point_is_not_changed(tmp_path: Path) -> None:
    shell, image = Shell(tmp_path), tmp_path / "web.raw"
    shell("init")
    image.write_bytes(b"\1" * (3 << 20))
    shell("backup", str(image))
    folder = tmp_path / "running"
    for turn in range(2):
        with serving(shell, "--overlays", str(folder)) as overlay:
            assert Path(overlay).parent == folder
            expected = "0x02" if turn else "0x01"
            qemu_io(overlay, f"read -P {expected} 4096 512", "read -P 0x01 8192 512", "write -P 0x02 4096 512")
    assert not (folder / "nbd.sock").exists()
    shell("restore", "latest", "--disk", "0", "--device", str(tmp_path / "out"))
    assert (tmp_path / "out").read_bytes() == image.read_bytes()
    shell("serve", "latest", "--overlays", str(folder), "--writable", expect=2)
    shell("serve", "latest", "--overlays", f"{folder},x", expect=2)


@pytest.mark.slow_boot
@needs("qemu-system-x86_64", "mmdebstrap")
def test_a_machine_starts_from_the_repository(bios_plain_disk: BuiltMachine, tmp_path: Path) -> None:
    shell = Shell(tmp_path)
    shell("init")
    shell("backup", str(bios_plain_disk.disk))
    before: dict[str, Any] = shell("points")
    console = tmp_path / "console"
    with serving(shell, "--overlays", str(tmp_path / "running")) as overlay:
        drive = json.dumps({"driver": "qcow2", "node-name": "disk", "file": {"driver": "file", "filename": overlay}})
        command = ["qemu-system-x86_64", "-accel", "tcg", "-m", "1024", "-display", "none", "-nic", "none"]
        command += ["-serial", f"file:{console}", "-blockdev", drive, "-device", "ide-hd,drive=disk"]
        machine = subprocess.Popen(command)
        try:
            deadline = time.monotonic() + 600
            while b"login:" not in (console.read_bytes() if console.exists() else b""):
                assert machine.poll() is None and time.monotonic() < deadline, console.read_text(errors="replace")
                time.sleep(0.5)
        finally:
            machine.kill()
            machine.wait()
        written = json.loads(
            subprocess.run(
                ["qemu-img", "map", "--output=json", "-f", "qcow2", overlay], capture_output=True, check=True
            ).stdout
        )
    assert sum(run["length"] for run in written if run["depth"] == 0 and run["data"]) > 1 << 20  # journals, logs
    assert shell("points") == before
    assert shell("check", "--read-data")["exit_code"] == 0
    shell("restore", "latest", "--disk", "0", "--device", str(tmp_path / "out"))
    assert digest(tmp_path / "out") == digest(bios_plain_disk.disk)
