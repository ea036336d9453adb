"""The report of the stage is untrusted input; the audit made of it is a text that says everything and nothing more."""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import subprocess
import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2v.adapt import Change, FileState, ItemResult, Kind, Status
from p2v.adapt.audit import audit_text, read_report
from p2v.errors import AdaptationError
from tests.requirement import needs


def _sum(data: bytes) -> bytes:
    return f"{hashlib.sha256(data).hexdigest()}\n{len(data)}\n".encode()


def _sent(files: dict[str, bytes], *, packed: bytes | None = None) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(f"out/{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    packed = gzip.compress(stream.getvalue()) if packed is None else packed
    text = base64.encodebytes(packed).replace(b"\n", b"\r\n")
    return b"noise\r\nP2V-BEGIN\r\n" + text + b"P2V-END " + hashlib.sha256(packed).hexdigest().encode() + b"\r\n"


_FILES = {
    "items": b"names\tdone\tstable names in /etc/fstab\nnetwork\tnothing\tall bound\n",
    "changes": b"1\t/etc/fstab\n2\t/etc/new\n3\t/boot/device.map\n4\t/boot/initrd\n",
    "before/1": b"a\nsecret\nb\n",
    "before/1.sum": _sum(b"a\nsecret\nb\n"),
    "after/1": b"a\nsecret\nc\n",
    "after/1.sum": _sum(b"a\nsecret\nc\n"),
    "after/2": b"new\n",
    "after/2.sum": _sum(b"new\n"),
    "before/3": b"(hd0)\n",
    "before/3.sum": _sum(b"(hd0)\n"),
    "before/4.sum": _sum(b"x"),
    "after/4.sum": _sum(b"xy"),
}


def test_a_report_is_read() -> None:
    report = read_report(_sent(_FILES))
    assert report is not None and not report.error
    assert [(item.name, item.status) for item in report.items] == [("names", Status.DONE), ("network", Status.NOTHING)]
    assert [(change.path, change.kind) for change in report.changes] == [
        ("/etc/fstab", Kind.MODIFIED),
        ("/etc/new", Kind.CREATED),
        ("/boot/device.map", Kind.REMOVED),
        ("/boot/initrd", Kind.MODIFIED),
    ]
    assert report.changes[0].diff() == "--- /etc/fstab\n+++ /etc/fstab\n@@ -3 +3 @@\n-b\n+c\n"
    assert "secret" not in audit_text(report.items, report.changes)
    assert "1 bytes" in report.changes[3].diff() and "2 bytes" in report.changes[3].diff()


@needs("patch")
def test_the_audit_turns_back_what_was_done(tmp_path: Path) -> None:
    before, after = "a\nb\nc\n" * 5, "a\nb\nc\n" * 3 + "x\n"
    change = Change(
        path="fstab",
        kind=Kind.MODIFIED,
        before=FileState(size=1, sha256="", text=before),
        after=FileState(size=1, sha256="", text=after),
    )
    (tmp_path / "fstab").write_text(after)
    text = audit_text((ItemResult(name="names", status=Status.DONE, detail="x"),), (change,))
    subprocess.run(["patch", "-R", "-p0"], input=text.encode(), cwd=tmp_path, check=True, capture_output=True)
    assert (tmp_path / "fstab").read_text() == before


def test_no_report_or_half_of_one() -> None:
    assert read_report(b"") is None
    assert read_report(_sent(_FILES)[:-200]) is None


@pytest.mark.parametrize(
    "change",
    [
        {"items": b"names\tfailed\tx\n"},
        {"items": b"\x1b[2J\tdone\tx\n"},
        {"changes": b"1\trelative\n"},
        {"changes": b"x\t/etc/fstab\n"},
        {"after/1": b"another"},
        {"after/1.sum": b"short"},
        {"changes": b"1\t/etc/\x1bfstab\n"},
    ],
)
def test_what_is_out_of_bounds_is_refused(change: dict[str, bytes]) -> None:
    with pytest.raises(AdaptationError):
        read_report(_sent(_FILES | change))


def test_a_wrong_checksum_and_a_bomb_are_refused() -> None:
    sent = _sent(_FILES)
    with pytest.raises(AdaptationError, match="checksum"):
        read_report(sent.replace(b"P2V-END ", b"P2V-END 0")[:-1])
    with pytest.raises(AdaptationError, match="more than"):
        read_report(_sent({}, packed=gzip.compress(bytes(40 << 20))))


def test_control_characters_do_not_reach_a_terminal() -> None:
    report = read_report(_sent({**_FILES, "error": b"bad \x1b[31m\x07 thing\n", "items": b"names\tdone\ta\x1b[0mb\n"}))
    assert report is not None
    assert report.error.isprintable() and report.items[0].detail.isprintable()


@given(st.binary(max_size=600))
def test_any_bytes_give_a_report_nothing_or_the_error(data: bytes) -> None:
    for sent in (data, _sent({}, packed=data), _sent({"items": data, "changes": data})):
        try:
            read_report(sent)
        except AdaptationError:
            continue
