"""The command line, as a script meets it: exit codes, JSON, files that are the same."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from formats.nbd import connect
from tests.backup.shell import Shell
from tests.loop import loop_device
from tests.p2v.conftest import sshd  # noqa: F401
from tests.p2v.sshd import SshServer
from tests.requirement import needs, needs_root


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A disk of 40 MiB with some data."""
    path = tmp_path / "web.raw"
    generator = random.Random(2)
    with path.open("wb") as file:
        for start in (0, 3 << 20, (40 << 20) - 70_000):
            file.seek(start)
            file.write(generator.randbytes(70_000))
    return path


def test_a_machine_goes_in_and_comes_back(shell: Shell, image: Path, tmp_path: Path) -> None:
    first = shell("backup", str(image), "--tag", "before")["data"]["point"]
    original = image.read_bytes()
    with image.open("r+b") as file:
        file.seek(9 << 20)
        file.write(b"changed")
    shell("backup", str(image))
    points = shell("points")["data"]["points"]
    assert points[0]["id"] == first["id"]
    assert set(points[0]) >= {"id", "machine", "time", "consistency", "disks", "verified", "drilled"}
    shell("restore", first["id"][:12], "--disk", "0", "--device", str(tmp_path / "old.raw"))
    shell("restore", "web@latest", "--disk", "0", "--device", str(tmp_path / "new.raw"))
    assert (tmp_path / "old.raw").read_bytes() == original
    assert (tmp_path / "new.raw").read_bytes() == image.read_bytes()
    assert (tmp_path / "new.raw").stat().st_blocks * 512 < 2 << 20
    shell("restore", "latest", "--disk", "0", "--device", str(tmp_path / "new.raw"), expect=2)


@needs("qemu-img")
def test_a_point_becomes_a_vm_of_a_platform(shell: Shell, image: Path, tmp_path: Path) -> None:
    shell("backup", str(image))
    shell("restore", "latest", "--to", "libvirt", "-o", str(tmp_path / "vm"))
    disk = next((tmp_path / "vm").glob("*.qcow2"))
    done = subprocess.run(["qemu-img", "compare", disk, image], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@contextlib.contextmanager
def serving(shell: Shell, *arguments: str) -> Iterator[str]:
    """What `serve` says of the first disk, while it serves."""
    process = shell.start("serve", "latest", *arguments)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("disk 0  "), process.stderr.read() if process.stderr else ""
        yield line.split()[-1]
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    assert process.returncode == 0


@needs("qemu-img")
def test_a_point_is_served(shell: Shell, image: Path) -> None:
    shell("backup", str(image))
    with serving(shell) as uri:
        done = subprocess.run(["qemu-img", "compare", uri, image], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_is_written_to_a_served_point_does_not_change_it(shell: Shell, image: Path, tmp_path: Path) -> None:
    shell("backup", str(image))
    with serving(shell, "--writable") as uri, contextlib.closing(connect(uri)) as disk:
        disk.write(memoryview(b"scribble"), 5 << 20)
        buffer = bytearray(8)
        disk.readinto(memoryview(buffer), 5 << 20)
        assert buffer == b"scribble"
    shell("restore", "latest", "--disk", "0", "--device", str(tmp_path / "again.raw"))
    assert (tmp_path / "again.raw").read_bytes() == image.read_bytes()


def test_damage_has_its_own_exit_code_and_is_listed(shell: Shell, image: Path, tmp_path: Path) -> None:
    shell("backup", str(image))
    assert shell("check", "--read-data")["data"]["damages"] == []
    assert shell("points")["data"]["points"][0]["verified"]
    pack = max(
        (tmp_path / "repository/packs").rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0
    )
    content = bytearray(pack.read_bytes())
    content[70_000] ^= 1
    pack.write_bytes(content)
    document = shell("check", "--read-data", expect=40)
    assert document["data"]["damages"][0]["subject"].endswith(pack.name)
    assert len(document["data"]["hurts"]) == 1
    target = str(tmp_path / "out.raw")
    shell("restore", "latest", "--disk", "0", "--device", target, expect=42)
    assert not Path(target).exists()
    document = shell("restore", "latest", "--disk", "0", "--device", target, "--salvage", expect=3)
    assert [notice["code"] for notice in document["notices"]] == ["hole"]
    assert Path(target).stat().st_size == image.stat().st_size


def test_forget_and_prune(shell: Shell, image: Path) -> None:
    for number in range(3):
        with image.open("r+b") as file:
            file.seek(20 << 20)
            file.write(random.Random(number).randbytes(200_000))
        shell("backup", str(image))
    dry = shell("forget", "--keep-last", "1", "--dry-run")["data"]["decisions"]
    assert [decision["keep"] for decision in dry] == [False, False, True]
    assert len(shell("points")["data"]["points"]) == 3
    shell("forget", expect=2)
    assert shell("forget", "--keep-last", "1", "--prune")["data"]["prune"]["deleted_packs"] > 0
    assert len(shell("points")["data"]["points"]) == 1
    assert shell("check", "--read-data")["data"]["damages"] == []


def test_keys(shell: Shell, image: Path, tmp_path: Path) -> None:
    shell("backup", str(image))
    first = shell("key", "list")["data"]["keys"][0]["id"]
    shell("key", "remove", first, expect=2)
    shell("key", "add", "--label", "second", P2V_NEW_PASSWORD="battery staple")
    shell("key", "remove", first)
    shell("points", expect=12)
    assert len(shell("points", P2V_PASSWORD="battery staple")["data"]["points"]) == 1
    paper = tmp_path / "paper"
    shell("key", "export", "-o", str(paper), P2V_PASSWORD="battery staple")
    assert paper.stat().st_mode & 0o077 == 0
    text = paper.read_text().splitlines()[1]
    assert len(shell("points", P2V_PASSWORD=text)["data"]["points"]) == 1


def test_exit_codes(shell: Shell, tmp_path: Path, image: Path) -> None:
    shell("points", expect=10, P2V_REPOSITORY=str(tmp_path / "nothing"))
    shell("points", expect=12, P2V_PASSWORD="wrong")
    shell("init", expect=2)
    shell("show", "latest", expect=2)
    shell("backup", str(tmp_path / "nothing"), expect=2)
    shell("restore", "latest", expect=2)
    locks = tmp_path / "repository/locks"
    locks.mkdir()
    (locks / "prune").write_bytes(
        b'{"id":"a","host":"elsewhere","boot":"b","pid":1,"started":"1","command":"prune","time":""}'
    )
    shell("prune", expect=11)
    shell("backup", str(image))
    assert shell("unlock")["data"]["removed"] == ["prune on elsewhere, process 1"]
    shell("prune")


def test_p9_a_backup_that_is_killed_stops_neither_the_next_nor_a_prune(shell: Shell, tmp_path: Path) -> None:
    """kill -9 in the middle of a backup, for real."""
    big = tmp_path / "big.raw"
    with big.open("wb") as file:
        for number in range(12):
            file.write(random.Random(number).randbytes(16 << 20))
    process = shell.start("backup", str(big))
    packs = tmp_path / "repository/packs"
    while process.poll() is None and not (packs.exists() and any(path.is_file() for path in packs.rglob("*"))):
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "the backup was over before it could be killed"
    assert list((tmp_path / "repository/leases").iterdir())
    document = shell("backup", str(big))
    assert document["data"]["statistics"]["new_bytes"] < 12 * (16 << 20)
    assert shell("prune")["data"]["prune"]["waiting"] == []
    assert list((tmp_path / "repository/.unfinished").iterdir()) == []
    assert shell("check", "--read-data")["data"]["damages"] == []
    shell("restore", "latest", "--disk", "0", "--device", str(tmp_path / "out.raw"))
    assert (tmp_path / "out.raw").read_bytes() == big.read_bytes()


def test_p10_a_full_disk_is_said_and_harms_nothing(
    shell: Shell, image: Path, small_filesystem: Path, tmp_path: Path
) -> None:
    """The repository lies on a file system of 8 MiB: what fits stays, what does not is refused, and room can be made."""
    shutil.move(tmp_path / "repository", small_filesystem / "repository")
    place = small_filesystem / "repository"
    shell("backup", str(image), place=place)
    large = tmp_path / "large.raw"
    large.write_bytes(random.Random(1).randbytes(12 << 20))
    shell("backup", str(large), expect=13, place=place)
    assert shell("check", "--read-data", place=place)["data"]["damages"] == []
    assert len(shell("points", place=place)["data"]["points"]) == 1
    shell("prune", place=place)
    shell("forget", "--keep-last", "1", "--prune", place=place)
    shell("restore", "latest", "--disk", "0", "--device", str(tmp_path / "out.raw"), place=place)
    assert (tmp_path / "out.raw").read_bytes() == image.read_bytes()


def test_p10_on_a_disk_without_a_free_byte_room_can_be_made(
    shell: Shell, small_filesystem: Path, tmp_path: Path
) -> None:
    shutil.move(tmp_path / "repository", small_filesystem / "repository")
    place = small_filesystem / "repository"
    disk = tmp_path / "small.raw"
    for number in range(2):
        disk.write_bytes(random.Random(number).randbytes(2 << 20))
        shell("backup", str(disk), place=place)
    shell("prune", place=place)
    with contextlib.suppress(OSError), (small_filesystem / "filler").open("wb", buffering=0) as filler:
        while True:
            filler.write(bytes(4096))
    assert os.statvfs(small_filesystem).f_bavail == 0
    shell("backup", str(disk), "--full", expect=13, place=place)
    assert shell("forget", "--keep-last", "1", "--prune", place=place)["data"]["prune"]["deleted_bytes"] > 2 << 20
    shell("backup", str(disk), place=place)
    assert shell("check", "--read-data", place=place)["data"]["damages"] == []


@needs_root()
@needs("losetup", "sshd")
def test_a_disk_goes_to_a_device_of_another_host(shell: Shell, image: Path, tmp_path: Path, sshd: SshServer) -> None:  # noqa: F811
    shell("backup", str(image))
    backing, target = tmp_path / "metal", sshd.target()
    backing.write_bytes(b"old" * (15 << 20))
    with loop_device(backing, writable=True) as device:
        there = ["--device", f"ssh://{target.user}@127.0.0.1:{sshd.port}{device}"]
        keys = ["--identity", str(sshd.identity), "--known-hosts", str(sshd.known_hosts)]
        done = shell("restore", "latest", "--disk", "0", *there, *keys)
        assert done["data"]["restored"]["size"] == 40 << 20
        (tmp_path / "nobody").touch()
        shell(
            "restore", "latest", "--disk", "0", *there, *keys[:2], "--known-hosts", str(tmp_path / "nobody"), expect=31
        )
        shell("restore", "latest", "--disk", "0", *there, *keys, "--in-place", expect=2)
    assert backing.read_bytes()[: 40 << 20] == image.read_bytes()
