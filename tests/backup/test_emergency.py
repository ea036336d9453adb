"""P20, P21: repositories of every version of the format come back, with the toolkit and without it."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from backup.check import Check
from backup.repository import Repository
from backup.store.local import LocalStore
from p2v.config import Secret
from tests.backup.repositories import PASSWORD, back_up, contents, machine, new_repository, opened, restored, scribble

_SCRIPT = Path(__file__).parents[2] / "scripts/emergency_restore.py"
_GOLDEN = sorted((Path(__file__).parents[1] / "data/repositories").glob("*/repository"))


def emergency(*arguments: str, password: str) -> subprocess.CompletedProcess[str]:
    """Run the restorer by itself: isolated, so that it cannot find the toolkit."""
    return subprocess.run(
        [sys.executable, "-I", str(_SCRIPT), *arguments],
        env={**os.environ, "P2V_PASSWORD": password}, capture_output=True, text=True, check=False, cwd="/",
    )  # fmt: skip


@pytest.mark.parametrize("paper", [False, True], ids=["password", "paper key"])
def test_p21_a_disk_comes_back_without_the_toolkit(tmp_path: Path, paper: bool) -> None:
    root = tmp_path / "repository"
    root.mkdir()
    store = LocalStore(root)
    new_repository(store)
    origin = machine()
    first = back_up(store, origin)
    before = contents(origin)
    scribble(origin, 5)
    back_up(store, origin, first)
    for segment in (root / "index").iterdir():
        segment.unlink()
    password = opened(store).keyring.paper() if paper else PASSWORD.reveal()
    assert first.name in emergency(str(root), password=password).stdout
    done = emergency(str(root), first.name[:10], "0", str(tmp_path / "out"), password=password)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out").read_bytes() == before[first.disks[0].id]


def test_p21_a_wrong_password_opens_nothing(tmp_path: Path) -> None:
    new_repository(LocalStore(tmp_path))
    assert emergency(str(tmp_path), password="wrong").returncode == 1


def test_p21_it_goes_on_past_damage(tmp_path: Path) -> None:
    root = tmp_path / "repository"
    root.mkdir()
    store = LocalStore(root)
    new_repository(store)
    point = back_up(store, machine())
    pack = max((root / "packs").glob("*/*"), key=lambda path: path.stat().st_size)
    content = bytearray(pack.read_bytes())
    content[100_000] ^= 1
    pack.chmod(0o600)
    pack.write_bytes(content)
    done = emergency(str(root), point.name, "0", str(tmp_path / "out"), password=PASSWORD.reveal())
    assert done.returncode == 1
    assert done.stderr.count("lost: ") == 1
    assert (tmp_path / "out").stat().st_size == point.disks[0].size


def test_there_are_golden_repositories() -> None:
    assert _GOLDEN


@pytest.mark.parametrize("root", _GOLDEN, ids=lambda root: root.parent.name)
def test_p20_golden_repositories_are_readable_for_ever(root: Path, tmp_path: Path) -> None:
    """By the toolkit, and (P21) by the emergency restorer."""
    facts = json.loads((root.parent / "facts.json").read_text())
    store = LocalStore(root)
    repository = Repository.open(store, Secret(facts["password"]))
    assert Check(repository, read_data=True).run().sound
    assert [point.name for point in repository.points()] == list(facts["points"])
    for name, disks in facts["points"].items():
        found = restored_with(store, facts["password"], name)
        assert {disk: hashlib.sha256(content).hexdigest() for disk, content in found.items()} == disks
        for number, disk in enumerate(repository.point(name).disks):
            target = tmp_path / f"{name}-{number}"
            done = emergency(str(root), name, str(number), str(target), password=facts["password"])
            assert done.returncode == 0, done.stderr
            assert hashlib.sha256(target.read_bytes()).hexdigest() == disks[disk.id]


def restored_with(store: LocalStore, password: str, name: str) -> dict[str, bytes]:
    """All disks of a point."""
    assert password == PASSWORD.reveal()
    return restored(store, opened(store).point(name))
