"""The command line as a contract: exit codes, envelopes, and errors that say what to do."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from p2v.cli import run

P2V = Path(sys.executable).with_name("p2v")


def envelope(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, object]:
    code = run([*words, "--json"])
    document = json.loads(capsys.readouterr().out)
    assert document["exit_code"] == code
    assert document["version"] == 1
    assert isinstance(document, dict)
    return document


@pytest.mark.parametrize(
    "words",
    [
        ["convert", "root@host"],
        ["convert", "root@host", "--to", "libvirt", "-o", "x", "--no-such-option"],
        ["convert", "root@host", "--to", "no-such-platform", "-o", "x"],
        ["convert", "root@host", "--to", "libvirt", "-o", "x", "--boot-check", "maybe"],
        ["convert", "root@host", "--to", "libvirt", "-o", "x", "--name", "../evil"],
        ["inspect", "neither-file-nor-host"],
        ["inspect", "a" * 5000],
        ["inspect", "a\0b"],
        ["convert", "root@host", "--to", "libvirt", "-o", "x", "--freeze-limit", "0"],
        ["inspect", "root@-oProxyCommand=x"],
        ["no-such-command"],
        ["boot", "/dev/null", "--level", "hand-off"],
    ],
)
def test_usage_errors_are_exit_code_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    document = envelope(capsys, *words)
    assert document["exit_code"] == 2
    assert document["status"] == "error"
    errors = document["errors"]
    assert isinstance(errors, list)
    assert errors[0]["message"]
    assert errors[0]["advice"]


def test_what_cannot_be_read_like_a_disk_is_an_image_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert envelope(capsys, "inspect", "/proc/self/mem")["exit_code"] == 24


@pytest.mark.parametrize("source", ["vsphere://host/dc/vm", "libvirt:///domain", "qmp:/run/x"])
def test_sources_that_come_later_say_so(source: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert envelope(capsys, "inspect", source)["exit_code"] == 21


def test_an_unreachable_host_is_exit_code_30(capsys: pytest.CaptureFixture[str]) -> None:
    document = envelope(capsys, "inspect", "ssh://root@127.0.0.1:1")
    assert document["exit_code"] == 30
    errors = document["errors"]
    assert isinstance(errors, list)
    assert "127.0.0.1" in str(errors[0])


def test_platforms_lists_what_each_takes(capsys: pytest.CaptureFixture[str]) -> None:
    data = envelope(capsys, "platforms")["data"]
    assert isinstance(data, dict)
    assert {"qemu", "libvirt", "vmware-workstation", "hyperv"} <= {p["name"] for p in data["platforms"]}
    assert run(["platforms"]) == 0
    shown = capsys.readouterr().out
    assert "vmware-workstation" in shown
    assert "vmdk" in shown


def test_help_names_every_command() -> None:
    shown = subprocess.run([P2V, "--help"], capture_output=True, text=True, check=True).stdout
    for command in ("inspect", "preflight", "convert", "boot", "platforms", "cleanup"):
        assert command in shown


def test_help_of_convert_explains_its_options() -> None:
    shown = subprocess.run([P2V, "convert", "--help"], capture_output=True, text=True, check=True).stdout
    for option in (
        "--to",
        "--output",
        "--disk-format",
        "--boot-check",
        "--dry-run",
        "--identity",
        "--known-hosts",
        "--json",
    ):
        assert option in shown


def test_heavy_libraries_load_lazily() -> None:
    heavy = "paramiko", "rich", "blake3", "isal", "qemu", "pyVmomi", "asyncio"
    program = f"import sys, p2v.cli; print([m for m in {heavy} if m in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert "paramiko" not in loaded
    assert "pyVmomi" not in loaded
    assert "qemu" not in loaded
