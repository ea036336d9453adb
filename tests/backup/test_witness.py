"""P15: another repository in the place, or an older state of it, is noticed by who was there before."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.backup.shell import Shell


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "web.raw"
    path.write_bytes(bytes(range(256)) * 4096)
    return path


def codes(document: dict[str, Any]) -> list[str]:
    return [notice["code"] for notice in document["notices"]]


def test_p15_an_older_state_is_noticed_until_it_is_accepted(shell: Shell, image: Path, tmp_path: Path) -> None:
    shell("backup", str(image))
    shutil.copytree(tmp_path / "repository", tmp_path / "older")
    newest = shell("backup", str(image))["data"]["point"]["id"]
    shutil.rmtree(tmp_path / "repository")
    (tmp_path / "older").rename(tmp_path / "repository")
    for command in (["points"], ["check"], ["backup", str(image)]):
        document = shell(*command, expect=3)
        assert codes(document) == ["points-gone"]
        assert newest[:8] in document["notices"][0]["message"]
    (memory,) = (tmp_path / "state").rglob("*.json")
    assert str(memory) in document["notices"][0]["advice"]
    memory.unlink()
    shell("points")


def test_p15_points_that_were_deleted_behind_our_back(shell: Shell, image: Path, tmp_path: Path) -> None:
    shell("backup", str(image))
    (point,) = (tmp_path / "repository/points").iterdir()
    point.unlink()
    assert codes(shell("points", expect=3)) == ["points-gone"]


def test_p15_another_repository_is_refused(shell: Shell, image: Path, tmp_path: Path) -> None:
    shell("backup", str(image))
    shutil.move(tmp_path / "repository", tmp_path / "real")
    shell("init", XDG_STATE_HOME=str(tmp_path / "attacker"))  # with the same password
    (error,) = shell("backup", str(image), expect=40)["errors"]
    assert "another repository" in error["message"]
    assert "remove" in error["advice"]
    assert list((tmp_path / "repository/points").glob("*")) == []


def test_what_is_forgotten_on_purpose_is_no_alarm_wherever_it_was_done(
    shell: Shell, image: Path, tmp_path: Path
) -> None:
    for _ in range(3):
        shell("backup", str(image))
    elsewhere = str(tmp_path / "elsewhere")
    shell("points", XDG_STATE_HOME=elsewhere)
    shell("forget", "--keep-last", "2")
    shell("forget", "--keep-last", "1", "--prune", XDG_STATE_HOME=elsewhere)
    assert len(shell("points")["data"]["points"]) == 1
    assert shell("check")["exit_code"] == 0
    assert len(list((tmp_path / "repository/forgotten").iterdir())) == 2


def test_a_repository_that_is_made_anew_is_no_alarm(shell: Shell, image: Path, tmp_path: Path) -> None:
    shell("backup", str(image))
    shutil.rmtree(tmp_path / "repository")
    shell("init")
    shell("backup", str(image))


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"version":1}', b"\xff" * 100])
def test_a_memory_that_is_damaged_is_made_anew(shell: Shell, image: Path, tmp_path: Path, content: bytes) -> None:
    shell("backup", str(image))
    (memory,) = (tmp_path / "state").rglob("*.json")
    good = memory.read_bytes()
    memory.write_bytes(content)
    shell("points")
    assert memory.read_bytes() == good


def test_a_computer_that_cannot_keep_a_memory_goes_without(shell: Shell, image: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    shell("backup", str(image), XDG_STATE_HOME=str(tmp_path / "file"))


def test_a_note_of_forgotten_points_that_is_damaged_is_found(shell: Shell, image: Path, tmp_path: Path) -> None:
    shell("backup", str(image))
    shell("backup", str(image))
    shell("forget", "--keep-last", "1")
    (note,) = (tmp_path / "repository/forgotten").iterdir()
    content = bytearray(note.read_bytes())
    content[-1] ^= 1
    note.write_bytes(content)
    assert "forgotten" in str(shell("check", expect=40)["data"])
