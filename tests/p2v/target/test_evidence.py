"""What is seen of a boot and what it amounts to, with the texts that the programs print."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2v.emulator.console import plain
from p2v.emulator.screen import TEXT_BYTES, decode_text
from p2v.target.evidence import Decision, Evidence, Patience
from p2v.target.failures import FAILURES, Weight
from p2v.target.verdict import Result, Severity

PATIENCE = Patience(total=100, idle=20, busy=30, early=10, settle=2)
LOGIN = "Debian GNU/Linux 12 metal1 ttyS0\r\n\r\nmetal1 login: "

# One line as its program prints it, for each class that is known by its text.
SAMPLES = {
    "no-bootable-device": ["No bootable device.", "FATAL: INT18: BOOT FAILURE", "BdsDxe: No bootable option or device was found."],
    "boot-record-empty": ["Boot failed: not a bootable disk"],
    "no-operating-system": ["Missing operating system.", "Operating system not found", "Error loading operating system"],
    "uefi-shell": ["UEFI Interactive Shell v2.2", "Shell> "],
    "uefi-boot-entry-failed": ['BdsDxe: failed to load Boot0001 "UEFI QEMU HARDDISK QM00001 " from PciRoot(0x0): Not Found'],
    "secure-boot-refused": ["error: ../../grub-core/kern/efi/sb.c:182:bad shim signature. Verification failed: (0x1A) Security Violation"],
    "lilo-or-syslinux-failed": ["SYSLINUX 6.04 EDD Load error - Boot error", "No DEFAULT or UI configuration directive found!"],
    "grub-rescue": ["grub rescue> "],
    "grub-prompt": ["grub> "],
    "grub-kernel-missing": ["error: file `/vmlinuz-6.1.0-56-amd64' not found.", "error: you need to load the kernel first."],
    "grub-error": ["error: no such device: 0f8c7a32-aaaa.", "error: unknown filesystem."],
    "systemd-boot-failed": ["Failed to execute Linux (\\EFI\\Linux\\a.efi): Not Found"],
    "root-mount-failed": ["[    2.1] VFS: Unable to mount root fs on unknown-block(0,0)"],
    "kernel-panic": ["[    2.2] Kernel panic - not syncing: VFS: Unable to mount root fs on unknown-block(0,0)"],
    "initramfs-damaged": ["[    0.9] Initramfs unpacking failed: ZSTD-compressed data is corrupt"],
    "disk-read-error": ["[    4.4] I/O error, dev sda, sector 2048 op 0x0:(READ) flags 0x80700"],
    "root-device-missing": ["ALERT!  UUID=0f8c7a32 does not exist.  Dropping to a shell!", "Gave up waiting for root file system device.",
        "dracut-initqueue[242]: Warning: dracut-initqueue: timeout, still waiting for following initqueue hooks:"],
    "volume-group-missing": ['  Volume group "vg0" not found'],
    "initramfs-shell": ["(initramfs) "],
    "dracut-shell": ["dracut:/# ", 'Generating "/run/initramfs/rdsosreport.txt"'],
    "waits-for-passphrase": ["Please unlock disk sda5_crypt: ", "Enter passphrase for /dev/sda5:"],
    "file-system-check": ["/dev/sda1: UNEXPECTED INCONSISTENCY; RUN fsck MANUALLY."],
    "file-system-damaged": ["[    5.1] EXT4-fs error (device dm-0): ext4_lookup:1855: inode #2: comm init"],
    "mount-failed": ["[FAILED] Failed to mount /data.", "[ TIME ] Timed out waiting for device /dev/sdb1."],
    "emergency-mode": ["You are in emergency mode. After logging in, type \"journalctl -xb\" to view"],
    "rescue-mode": ["You are in rescue mode. After logging in, type"],
    "maintenance-shell": ["Give root password for maintenance", "Press Enter for maintenance"],
    "init-missing": ["No init found. Try passing init= bootarg."],
    "windows-stop": ["*** STOP: 0x0000007E (0xFFFFFFFFC0000005)", "Stop code: CRITICAL_PROCESS_DIED"],
    "windows-no-boot-disk": ["*** STOP: 0x0000007B (0xF78D2524,0xC0000034,0x00000000)", "Stop code: INACCESSIBLE_BOOT_DEVICE"],
    "bitlocker-recovery": ["BitLocker recovery", "Enter the recovery key for this drive", "Enter the password to unlock this drive"],
    "windows-loader": ["BOOTMGR is missing", "A disk read error occurred"],
}  # fmt: skip

# What healthy boots print and what must not be mistaken.
HEALTHY = [
    "[    0.000000] Linux version 6.1.0-56-amd64 (debian-kernel@lists.debian.org)",
    "[    0.000000] Command line: BOOT_IMAGE=/vmlinuz root=/dev/mapper/vg0-root ro panic=30 systemd.unit=multi-user.target",
    "   The highlighted entry will be executed automatically in 5s.",
    "      Use the ^ and v keys to select which entry is highlighted. Press enter to boot the selected OS, `e' to edit the commands",
    "      before booting or `c' for a command-line.",
    "[  OK  ] Reached target local-fs.target - Local File Systems.",
    "Begin: Waiting for root file system ... Begin: Running /scripts/local-block ... done.",
    "[FAILED] Failed to start apt-daily.service - Daily apt download activities.",
    "Last login: Sun Nov 22 21:15:15 UTC 2026 on ttyS0",
    "[  OK  ] Started emergency-log.service",
    "systemd[1]: Started Dispatch Password Requests to Console Directory Watch.",
]


def seen(
    *lines: str, wait: float = 50.0, patience: Patience = PATIENCE, fuzzy: bool = False
) -> tuple[Evidence, Decision | None]:
    evidence = Evidence(patience, fuzzy=fuzzy)
    now = 0.0
    for line in lines:
        now += 1
        evidence.serial(line, now)
    return evidence, evidence.decision(now + wait)


def decided(decision: Decision | None) -> Decision:
    assert decision is not None
    return decision


def test_every_class_with_a_text_has_a_sample() -> None:
    assert set(SAMPLES) == {failure.code for failure in FAILURES if failure.pattern is not None}


@pytest.mark.parametrize(("code", "line"), [(code, line) for code, lines in SAMPLES.items() for line in lines])
def test_a_sample_is_recognised_on_either_stream(code: str, line: str) -> None:
    weight = next(failure.weight for failure in FAILURES if failure.code == code)
    for stream in ("serial", "screen"):
        evidence = Evidence(PATIENCE)
        if stream == "serial":
            evidence.serial(f"\x1b[0;1;31m{line}\x1b[0m\r\n", 1.0)
        else:
            evidence.screen([line, ""], 1.0)
        decision = decided(evidence.decision(90.0))
        assert code in {finding.code for finding in decision.findings}
        if weight in (Weight.FATAL, Weight.DEAD_END):
            assert decision.result is Result.FAIL
            assert decision.seconds == 1.0
        if weight is Weight.WAITING:
            assert decision.result is Result.UNPROVEN


@pytest.mark.parametrize("line", HEALTHY)
def test_what_healthy_boots_print_is_no_failure(line: str) -> None:
    evidence, decision = seen(line + "\r\n", "[  OK  ] Started getty\r\n", LOGIN)
    assert decided(decision).result is Result.PASS
    assert decided(decision).findings == ()
    assert evidence.signals[-1].code == "login-prompt"


@pytest.mark.parametrize(
    "prompt",
    [
        "metal1 login: ",
        "localhost login:",
        "\x1b[1;1H\x1b[Jdb-01.example.org login: ",
        "login: ",
        "metal1 login: [   40.1] e1000: eth0 up",
    ],
)
def test_a_login_prompt_passes_after_it_has_settled(prompt: str) -> None:
    evidence = Evidence(PATIENCE)
    evidence.serial(prompt, 10.0)
    assert evidence.decision(11.0) is None
    decision = decided(evidence.decision(12.0))
    assert (decision.result, decision.seconds) == (Result.PASS, 10.0)


def test_a_prompt_in_pieces_is_put_together() -> None:
    evidence = Evidence(PATIENCE)
    for number, piece in enumerate(["metal1 lo", "gin", ": "]):
        evidence.serial(piece, float(number))
    assert decided(evidence.decision(20.0)).result is Result.PASS


def test_an_ssh_banner_passes_but_not_that_of_an_initramfs() -> None:
    evidence = Evidence(PATIENCE)
    evidence.ssh_banner("SSH-2.0-OpenSSH_9.2p1 Debian-2+deb12u7", 5.0)
    assert decided(evidence.decision(9.0)).result is Result.PASS
    evidence = Evidence(PATIENCE)
    evidence.ssh_banner("SSH-2.0-dropbear_2022.83", 5.0)
    evidence.serial("Please unlock disk sda5_crypt: ", 6.0)
    decision = decided(evidence.decision(30.0))
    assert decision.result is Result.UNPROVEN
    assert decision.findings[0].code == "waits-for-passphrase"


def test_a_dead_end_that_the_boot_left_is_a_warning() -> None:
    _, decision = seen(
        "Boot failed: not a bootable disk\r\n", "No bootable device.\r\n", "Linux version 6.1\r\n", LOGIN
    )
    decision = decided(decision)
    assert decision.result is Result.PASS
    assert {finding.severity for finding in decision.findings} == {Severity.WARNING}


def test_a_dead_end_is_over_when_a_later_stage_begins() -> None:
    evidence = Evidence(PATIENCE)
    evidence.serial("error: file `/vmlinuz-old' not found.\r\n", 1.0)
    evidence.serial("[    0.0] Linux version 6.1\r\n", 2.0)
    assert evidence.decision(15.0) is None


def test_a_panic_after_the_login_prompt_fails() -> None:
    _, decision = seen(LOGIN + "\r\n", "[   50.0] Kernel panic - not syncing: Attempted to kill init!\r\n")
    assert decided(decision).result is Result.FAIL


def test_emergency_mode_while_a_stray_prompt_stood_before_fails() -> None:
    _, decision = seen(LOGIN + "\r\n", "You are in emergency mode. After logging in, type\r\n")
    assert decided(decision).result is Result.FAIL


def test_one_reset_is_allowed_and_two_are_a_loop() -> None:
    evidence = Evidence(PATIENCE)
    evidence.reset(1.0)
    evidence.serial(LOGIN, 5.0)
    assert decided(evidence.decision(20.0)).result is Result.PASS
    evidence.reset(21.0)
    decision = decided(evidence.decision(21.0))
    assert decision.result is Result.FAIL
    assert "reboot-loop" in {finding.code for finding in decision.findings}


def test_a_login_prompt_before_a_reset_counts_no_more() -> None:
    evidence = Evidence(PATIENCE)
    evidence.serial(LOGIN, 1.0)
    evidence.reset(2.0)
    assert evidence.decision(8.0) is None


def test_a_failure_that_a_moving_source_explains_is_unproven() -> None:
    lines = ("/dev/sda1: UNEXPECTED INCONSISTENCY; RUN fsck MANUALLY.\r\n", "(initramfs) ")
    assert decided(seen(*lines)[1]).result is Result.FAIL
    decision = decided(seen(*lines, fuzzy=True)[1])
    assert decision.result is Result.UNPROVEN
    assert decision.findings[0].code == "failure-explained"
    assert decided(seen("(initramfs) ", fuzzy=True)[1]).result is Result.FAIL


def test_a_failure_after_a_read_error_of_the_source_is_unproven() -> None:
    evidence = Evidence(PATIENCE)
    evidence.failure("source-read-error", 1.0, "Input/output error")
    evidence.serial("Kernel panic - not syncing: VFS\r\n", 2.0)
    assert decided(evidence.decision(9.0)).result is Result.UNPROVEN


def test_silence_in_the_loader_fails_and_in_the_kernel_is_unproven() -> None:
    evidence = Evidence(PATIENCE)
    evidence.screen(["GRUB loading."], 1.0)
    assert evidence.decision(10.0) is None
    decision = decided(evidence.decision(12.0))
    assert (decision.result, decision.findings[0].code) == (Result.FAIL, "no-progress")
    evidence = Evidence(PATIENCE)
    evidence.serial("[    0.0] Linux version 6.1\r\n", 1.0)
    assert evidence.decision(20.0) is None
    assert evidence.decision(22.0, busy=True) is None
    decision = decided(evidence.decision(22.0))
    assert (decision.result, decision.findings[0].code) == (Result.UNPROVEN, "no-signal")


def test_a_kernel_that_is_silent_but_seen_in_the_processor_is_unproven() -> None:
    evidence = Evidence(PATIENCE)
    evidence.screen(["GRUB loading.", "Welcome to GRUB!"], 1.0)
    evidence.kernel_runs(5.0)
    assert evidence.decision(15.0) is None
    assert decided(evidence.decision(25.0)).result is Result.UNPROVEN


def test_silence_in_graphics_is_unproven() -> None:
    evidence = Evidence(PATIENCE)
    evidence.screen(None, 1.0)
    assert evidence.decision(15.0) is None
    assert decided(evidence.decision(25.0)).result is Result.UNPROVEN


def test_progress_and_announced_waits_put_the_end_off() -> None:
    evidence = Evidence(PATIENCE)
    evidence.serial("[    0.0] Linux version 6.1\r\n", 1.0)
    evidence.progress(15.0)
    assert evidence.decision(30.0) is None
    evidence.serial("dracut-initqueue[300]: Warning: dracut-initqueue timeout - starting timeout scripts\r\n", 31.0)
    assert evidence.decision(60.0) is None
    assert decided(evidence.decision(72.0)).result is Result.UNPROVEN


def test_time_up_is_unproven_unless_something_stands() -> None:
    evidence = Evidence(PATIENCE)
    evidence.serial("[    0.0] Linux version 6.1\r\n", 99.0)
    assert evidence.expired(100.0).result is Result.UNPROVEN
    evidence.serial(LOGIN, 100.0)
    assert evidence.expired(102.0).result is Result.PASS


def test_the_first_screen_line_is_seen_once() -> None:
    evidence = Evidence(PATIENCE)
    for now in range(1, 9):
        evidence.screen(["SeaBIOS (version 1.16.2)", "GRUB loading."], float(now))
    assert [signal.code for signal in evidence.signals] == ["firmware", "loader"]
    assert decided(evidence.decision(11.5)).result is Result.FAIL  # the same screen again is no progress


def test_plain_drops_terminal_control() -> None:
    assert plain("\x1b[0;32m  OK  \x1b[0m] Started\r\n") == "  OK  ] Started\n"
    assert plain("\x1b]0;title\x07a\x1b[2Jb\x1b[3;1Hc") == "a\nb\nc"


@given(st.lists(st.text(max_size=60), max_size=20))
def test_no_output_breaks_the_reader(pieces: list[str]) -> None:
    evidence = Evidence(PATIENCE)
    for number, piece in enumerate(pieces):
        evidence.serial(piece, float(number))
        evidence.screen(piece.split("\n"), float(number))
        evidence.decision(float(number))
    assert "\x1b" not in plain("".join(pieces)) or "".join(pieces).endswith("\x1b")
    assert evidence.expired(1000.0).result in set(Result)


@given(st.binary(max_size=TEXT_BYTES + 2))
def test_any_memory_is_text_or_none(memory: bytes) -> None:
    lines = decode_text(memory)
    assert lines is None or (len(lines) == 25 and all(len(line) <= 80 for line in lines))


def test_a_text_screen_is_decoded() -> None:
    line = "Booting from Hard Disk..."
    memory = b"".join(bytes([letter, 7]) for letter in line.encode().ljust(80)) + b"\x00\x07" * (80 * 24)
    assert decode_text(memory) == (line, *[""] * 24)
    assert decode_text(bytes(range(256)) * 16) is None
    assert decode_text(bytes(TEXT_BYTES)) is None


@pytest.mark.parametrize(
    ("text", "code", "says"),
    [
        ("Kernel panic - not syncing: VFS: Unable to mount root fs on unknown-block(0,0)\n", "kernel-panic", "unknown-block(0,0)"),
        ("---[ end Kernel panic - not syncing: No working init found. ]---\n", "kernel-panic", "No working init found"),
        (
            "[ TIME ] Timed out waiting for device dev-disk-by\\x2duuid-11.device - /dev/disk/by-uuid/11.\n"
            "[DEPEND] Dependency failed for data.mount - /data.\n"
            "You are in emergency mode. After logging in, type \"journalctl -xb\"\n",
            "emergency-mode",
            "data.mount - /data failed",
        ),
        ("[FAILED] Failed to mount srv.mount - /srv.\nGive root password for maintenance\n", "maintenance-shell", "/srv failed"),
        ("[FAILED] Failed to mount srv.mount - /srv.\nYou are in emergency mode.\n", "mount-failed", "srv.mount - /srv"),
    ],
)  # fmt: skip
def test_a_failure_says_its_cause(text: str, code: str, says: str) -> None:
    evidence = Evidence(PATIENCE)
    evidence.serial(text, 1.0)
    decision = decided(evidence.decision(60.0))
    [message] = [finding.message for finding in decision.findings if finding.code == code]
    assert says in message


def test_units_that_print_without_end_are_bounded() -> None:
    evidence = Evidence(PATIENCE)
    for number in range(1000):
        evidence.serial(f"[FAILED] Failed to start unit {number}.\n", 1.0)
    evidence.serial("You are in emergency mode.\n", 2.0)
    decision = decided(evidence.decision(60.0))
    assert all(len(finding.message) < 1000 for finding in decision.findings)
