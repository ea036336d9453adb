"""The PowerShell script: its quoting by PowerShell's rules, and its parser where there is one."""

from __future__ import annotations

import subprocess
from dataclasses import replace

import pytest
from hypothesis import given

from formats.definitions import DefinedDisk, Hardware, render
from formats.definitions.hyperv import quoted
from formats.machine import Bus, Firmware
from tests.formats.definitions.sample import CHOICES, FOLDER, METAL
from tests.formats.definitions.test_definitions import NAMES
from tests.requirement import needs

QUOTES = "'\u2018\u2019\u201a\u201b"


def unquoted(text: str) -> str:
    """What PowerShell makes of a single-quoted string: every kind of single quote ends it, unless two stand
    together.
    """
    assert text[0] in QUOTES
    found, position = "", 1
    while text[position] not in QUOTES or (position + 1 < len(text) and text[position + 1] in QUOTES):
        if text[position] in QUOTES:
            position += 1
        found += text[position]
        position += 1
    assert position == len(text) - 1, "the string ends before the text does"
    return found


@given(NAMES)
def test_a_quoted_text_is_that_text_and_nothing_more(text: str) -> None:
    assert unquoted(quoted(text)) == "".join(c for c in text if c.isprintable())


@given(name=NAMES, network=NAMES)
def test_every_line_has_balanced_quotes(name: str, network: str) -> None:
    hardware = Hardware(bus=Bus.IDE, nic="synthetic", network=network)
    definition = render("hyperv", replace(METAL, name=name), [DefinedDisk(file="a.vhd", format="vhd")], hardware)
    text = definition.files[definition.main].removeprefix("\ufeff")
    harmless = definition.main.removesuffix(".ps1")
    plain = render(
        "hyperv",
        replace(METAL, name="m"),
        [DefinedDisk(file="a.vhd", format="vhd")],
        Hardware(bus=Bus.IDE, nic="synthetic"),
    )
    ours, theirs = text.split("\r\n"), plain.files[plain.main].split("\r\n")
    assert len(ours) == len(theirs)
    different = [one for one, other in zip(ours, theirs, strict=True) if one != other]
    for line in different:
        assert line.startswith(("param(", "# Makes")) or harmless in line


@needs("pwsh")
@pytest.mark.parametrize("name", [name for name in CHOICES if name.startswith("hyperv")])
def test_powershell_parses_the_script(name: str) -> None:
    path = FOLDER / f"{name}.ps1"
    command = (
        "$errors = $null; [void][System.Management.Automation.Language.Parser]::ParseFile("
        f"'{path}', [ref]$null, [ref]$errors); $errors | ForEach-Object {{ $_.Message }}; exit $errors.Count"
    )
    checked = subprocess.run(["pwsh", "-NoProfile", "-Command", command], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout


def test_generation_one_boots_from_ide_and_puts_the_rest_on_scsi() -> None:
    disks = [DefinedDisk(file=f"d{n}.vhd", format="vhd", boot=n == 4) for n in range(6)]
    definition = render("hyperv", METAL, disks, Hardware(bus=Bus.IDE, nic="legacy"))
    text = definition.files[definition.main]
    assert "-Generation 1 " in text
    assert text.index("'d4.vhd'") < text.index("'d0.vhd'"), "the boot disk is the first one"
    assert "-ControllerType IDE -ControllerNumber 0 -ControllerLocation 0 -Path $disks[0]" in text
    assert "-ControllerType SCSI -ControllerNumber 0 -ControllerLocation 2 -Path $disks[5]" in text
    assert "Set-VMFirmware" not in text
    assert "-IsLegacy $true" in text


def test_generation_two_asks_for_secure_boot_by_the_certificate_that_signs_linux() -> None:
    disk = DefinedDisk(file="a.vhdx", format="vhdx")
    machine = replace(METAL, firmware=Firmware.UEFI)
    for asked, expected in ((True, "On -SecureBootTemplate MicrosoftUEFICertificateAuthority"), (None, "Off")):
        hardware = Hardware(bus=Bus.SCSI, nic="synthetic", firmware=Firmware.UEFI, secure_boot=asked)
        definition = render("hyperv", machine, [disk], hardware)
        assert f"-EnableSecureBoot {expected} " in definition.files[definition.main]
