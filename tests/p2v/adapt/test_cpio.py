"""The archives that we write, read by GNU cpio and by busybox."""

from __future__ import annotations

import stat
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from p2v.adapt import cpio
from tests.requirement import needs

_NAME = st.text(
    st.characters(codec="utf-8", exclude_characters="\0/", exclude_categories=("Cs", "Cc")), min_size=1, max_size=40
)
_FILES = st.dictionaries(
    _NAME.filter(lambda name: name not in {".", "..", "TRAILER!!!"} and len(name.encode()) < 200),
    st.tuples(st.binary(max_size=2000), st.sampled_from([0o644, 0o755, 0o400])),
    max_size=8,
)


def _extracted(program: list[str], data: bytes, folder: Path) -> dict[str, tuple[bytes, int]]:
    subprocess.run(program, input=data, cwd=folder, check=True, capture_output=True)
    return {
        str(path.relative_to(folder)): (path.read_bytes(), stat.S_IMODE(path.stat().st_mode))
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("program", [["cpio", "-id", "--quiet"], ["busybox", "cpio", "-id"]], ids=["gnu", "busybox"])
@needs("cpio", "busybox")
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(files=_FILES)
def test_what_is_written_is_extracted(program: list[str], files: dict[str, tuple[bytes, int]]) -> None:
    entries = [cpio.folder("top"), *(cpio.file(f"top/{name}", data, mode) for name, (data, mode) in files.items())]
    data = cpio.archive(entries)
    assert len(data) % 512 == 0
    with TemporaryDirectory() as folder:
        assert _extracted(program, data, Path(folder)) == {f"top/{name}": found for name, found in files.items()}


@needs("cpio")
def test_listed_in_order_with_kinds_and_owner() -> None:
    entries = [
        cpio.folder("a", 0o700),
        cpio.file("a/b", b"12345", 0o600),
        cpio.Entry(name="a/c", mode=stat.S_IFLNK | 0o777, data=b"b"),
    ]
    listed = subprocess.run(
        ["cpio", "-itv", "--quiet", "--numeric-uid-gid"],
        input=cpio.archive(entries),
        check=True,
        capture_output=True,
        text=False,
    ).stdout.decode()
    rows = [line.split() for line in listed.splitlines()]
    assert [row[0] for row in rows] == ["drwx------", "-rw-------", "lrwxrwxrwx"]
    assert {(row[2], row[3]) for row in rows} == {("0", "0")}
    assert rows[1][4] == "5" and rows[2][-1] == "b"


def test_same_entries_same_bytes() -> None:
    assert cpio.archive([cpio.file("x", b"y")]) == cpio.archive([cpio.file("x", b"y")])


@pytest.mark.parametrize("name", ["", "/etc", "a\0b", "x" * 4096, "TRAILER!!!"])
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(ValueError):
        cpio.archive([cpio.file(name, b"")])
