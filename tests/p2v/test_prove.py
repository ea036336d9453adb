"""What a boot is held against."""

from __future__ import annotations

import pytest

from p2v.emulator import Controller
from p2v.prove import LACKS_DRIVER, _explained, _lacking
from p2v.target.verdict import Finding, Level, Result, Severity, Signal, Verdict
from tests.p2v.adapt.machines import machine

MISSING = "the initramfs of 6.1.0-1-amd64 has no nvme for nvme disks"


def verdict(result: Result, *findings: str, signals: tuple[str, ...] = ("kernel", "initramfs")) -> Verdict:
    return Verdict(
        level=Level.BOOTS,
        result=result,
        signals=tuple(Signal(code=code, stream="serial", seconds=1) for code in signals),
        findings=tuple(Finding(code=code, severity=Severity.ERROR, message=code) for code in findings),
    )


def test_what_an_initramfs_lacks_follows_from_the_emulated_controller() -> None:
    host_only = machine()
    assert _lacking(host_only, Controller.SATA) == ""
    assert "has no nvme for nvme disks" in _lacking(host_only, Controller.NVME)


@pytest.mark.parametrize(
    ("result", "codes"),
    [(Result.FAIL, ["root-device-missing"]), (Result.FAIL, ["dracut-shell"]), (Result.UNPROVEN, ["no-signal"])],
)
def test_a_root_that_is_not_found_names_the_driver(result: Result, codes: list[str]) -> None:
    said = _explained(verdict(result, *codes), MISSING)
    assert said.result is Result.FAIL and said.findings[0].code == LACKS_DRIVER
    assert said.reason == f"{MISSING}: it does not find its root"
    assert [finding.code for finding in said.findings[1:]] == codes


@pytest.mark.parametrize(
    "before",
    [
        verdict(Result.FAIL, "grub-rescue", signals=("loader",)),
        verdict(Result.UNPROVEN, "no-signal", signals=("kernel", "initramfs", "multi-user")),
        verdict(Result.PASS, signals=("kernel", "initramfs", "login-prompt")),
    ],
)
def test_another_end_is_not_put_down_to_it(before: Verdict) -> None:
    assert _explained(before, MISSING) == before
