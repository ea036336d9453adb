"""The emulator with the real QEMU: disks, overlays, screen, console, network, and that nothing is left behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from formats import qemu_img
from formats.machine import Firmware
from p2v.emulator import (
    Accelerator,
    Chipset,
    Controller,
    Drive,
    Emulator,
    Hardware,
    Network,
    NicModel,
    acceleration,
    arguments,
    create_overlay,
    glyphs,
    process,
)
from p2v.emulator.screen import parse_ppm, png_of
from p2v.errors import EmulatorError
from tests.p2v.boot_sector import boot_disk
from tests.requirement import needs

pytestmark = needs("qemu-system-x86_64", "qemu-img", "qemu-nbd")

TCG = Accelerator.TCG


def until(condition: Callable[[], bool], seconds: float = 20) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.05)
    return False


def shows(emulator: Emulator, text: str) -> bool:
    return until(lambda: any(text in line for line in emulator.screen_text() or ()))


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


@pytest.fixture
def hello(tmp_path: Path) -> Path:
    return boot_disk(tmp_path / "disk.raw", [("screen", "hello, screen"), ("serial", "hello, serial\n")])


def test_screen_serial_counters_and_picture(tmp_path: Path, hello: Path) -> None:
    with Emulator(Hardware(), [Drive(path=hello)], folder=tmp_path, accelerator=TCG) as emulator:
        assert shows(emulator, "hello, screen")
        assert until(lambda: emulator.console_log.read_bytes() == b"hello, serial\r\n")
        assert emulator.console.take() == "hello, serial\r\n"
        assert emulator.bytes_read()[0] >= 512
        assert not emulator.processors_dead()
        emulator.screenshot(tmp_path / "screen.png")
        pid = emulator.pid
    assert (tmp_path / "screen.png").read_bytes().startswith(b"\x89PNG")
    assert not alive(pid)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["console.log", "disk.raw", "screen.png"]


@pytest.mark.parametrize("controller", list(Controller))
@pytest.mark.parametrize("chipset", [Chipset.PC, Chipset.Q35])
def test_every_controller_starts_with_three_disks(
    tmp_path: Path, hello: Path, controller: Controller, chipset: Chipset
) -> None:
    other = [tmp_path / f"{number}.raw" for number in range(2)]
    for path in other:
        path.write_bytes(bytes(1 << 20))
    drives = [Drive(path=hello, serial="ABC123"), *(Drive(path=path) for path in other)]
    nic = list(NicModel)[list(Controller).index(controller) % len(NicModel)]
    hardware = Hardware(controller=controller, chipset=chipset, nic=nic, memory=256 << 20)
    with Emulator(
        hardware, drives, folder=tmp_path, accelerator=TCG, network=Network(mac="52:54:00:00:00:01")
    ) as emulator:
        assert shows(emulator, "hello, screen")
        assert len(emulator.bytes_read()) == 3
        assert emulator.forwarded_port(22) > 0


def test_an_image_is_not_written_and_a_throw_away_overlay_has_no_name(tmp_path: Path) -> None:
    disk = tmp_path / "disk.raw"
    # The sector writes itself to sector 8 (INT 13h, AH=43h with a packet at 0x7d00) and then says so.
    code = bytes.fromhex("31c08ed88ec08ed0bc007c b443 b000 b280 be007d cd13 7213 ba f803 b04b ee f4 ebfd")
    sector = bytearray(code.ljust(0x100, b"\xf4"))
    sector += bytes.fromhex("1000 0100 007c 0000 0800000000000000")
    content = bytes(sector).ljust(510, b"\0") + b"\x55\xaa" + bytes((1 << 20) - 512)
    disk.write_bytes(content)
    disk.chmod(0o444)
    with Emulator(Hardware(), [Drive(path=disk)], folder=tmp_path, accelerator=TCG) as emulator:
        assert until(lambda: emulator.console.take() == "K")
        names = [entry for entry in tmp_path.rglob("*") if entry.is_file() and entry.stat().st_size > 60_000]
        assert names == [disk]
    assert disk.read_bytes() == content


def test_a_kept_overlay_holds_the_writes_and_names_no_backing_file(tmp_path: Path) -> None:
    disk, overlay = tmp_path / "disk.raw", tmp_path / "kept.qcow2"
    code = bytes.fromhex("31c08ed88ec08ed0bc007c b443 b000 b280 be007d cd13 7213 ba f803 b04b ee f4 ebfd")
    sector = bytes(code.ljust(0x100, b"\xf4")) + bytes.fromhex("1000 0100 007c 0000 0800000000000000")
    disk.write_bytes((sector.ljust(510, b"\0") + b"\x55\xaa").ljust(1 << 20, b"\0"))
    with (
        pytest.raises(EmulatorError, match="does not exist"),
        Emulator(Hardware(), [Drive(path=disk, overlay=overlay)], folder=tmp_path, accelerator=TCG),
    ):
        pass
    create_overlay(overlay, 1 << 20)
    with Emulator(Hardware(), [Drive(path=disk, overlay=overlay)], folder=tmp_path, accelerator=TCG) as emulator:
        assert until(lambda: emulator.console.take() == "K")
        emulator.execute("quit")
    assert "backing-filename" not in qemu_img.info(overlay, "qcow2").detail
    with qemu_img.serve(overlay, "qcow2") as uri:
        flat = tmp_path / "flat.raw"
        subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "raw", uri, str(flat)], check=True)
    assert flat.read_bytes()[8 * 512 : 8 * 512 + 64] == sector[:64]
    assert disk.read_bytes()[8 * 512 : 9 * 512] == bytes(512)


def test_boots_from_an_nbd_uri(tmp_path: Path, hello: Path) -> None:
    with (
        qemu_img.serve(hello, "raw") as uri,
        Emulator(Hardware(), [Drive(uri=uri)], folder=tmp_path, accelerator=TCG) as emulator,
    ):
        assert shows(emulator, "hello, screen")


def test_a_path_with_a_comma(tmp_path: Path) -> None:
    folder = tmp_path / "a,b = c"
    folder.mkdir()
    disk = boot_disk(folder / "d,isk.raw", [("screen", "comma")])
    with Emulator(Hardware(), [Drive(path=disk)], folder=folder, accelerator=TCG) as emulator:
        assert shows(emulator, "comma")


def test_a_backing_file_of_an_image_is_not_opened(tmp_path: Path, hello: Path) -> None:
    image = tmp_path / "top.qcow2"
    command = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", str(hello), "-F", "raw", str(image)]
    subprocess.run(command, check=True)
    with Emulator(Hardware(), [Drive(path=image, format="qcow2")], folder=tmp_path, accelerator=TCG) as emulator:
        assert shows(emulator, "No bootable device")


def test_a_raw_disk_that_looks_like_qcow2_stays_raw(tmp_path: Path, hello: Path) -> None:
    image = tmp_path / "trap.raw"
    command = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", str(hello), "-F", "raw", str(image)]
    subprocess.run(command, check=True)
    with Emulator(Hardware(), [Drive(path=image)], folder=tmp_path, accelerator=TCG) as emulator:
        assert shows(emulator, "No bootable device")


def test_missing_disk_and_missing_nbd_server_are_emulator_errors(tmp_path: Path) -> None:
    for drive in (Drive(path=tmp_path / "none.raw"), Drive(uri=f"nbd+unix:///x?socket={tmp_path}/none")):
        with (
            pytest.raises(EmulatorError, match="QEMU broke off") as caught,
            Emulator(Hardware(), [drive], folder=tmp_path, accelerator=TCG),
        ):
            pass
        assert caught.value.advice
    assert list(tmp_path.glob(".work-*")) == []


def test_a_drive_is_one_thing() -> None:
    with pytest.raises(ValueError, match="either"):
        Drive()
    with pytest.raises(ValueError, match="either"):
        Drive(uri="nbd://h/x", path=Path("x"))
    with pytest.raises(EmulatorError, match="not an NBD URI"):
        arguments.base_node(Drive(uri="http://example.org/x"))


def test_uefi_has_its_own_variables(tmp_path: Path, hello: Path) -> None:
    files = arguments.find_ovmf() if any(Path(code).exists() for code, _ in arguments._OVMF) else pytest.skip("no OVMF")
    before = files.variables.read_bytes()
    hardware = Hardware(firmware=Firmware.UEFI, chipset=Chipset.Q35)
    with Emulator(hardware, [Drive(path=hello)], folder=tmp_path, accelerator=TCG) as emulator:
        assert until(lambda: emulator.console.total > 0, 60)
    assert files.variables.read_bytes() == before


def test_missing_firmware_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(arguments, "_OVMF", (("/none/code", "/none/vars"),))
    with (
        pytest.raises(EmulatorError) as caught,
        Emulator(Hardware(firmware=Firmware.UEFI), folder=tmp_path, accelerator=TCG),
    ):
        pass
    assert "ovmf" in caught.value.advice


def test_missing_qemu_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(process, "_NAME", "qemu-system-none")
    process.find_program.cache_clear()
    try:
        with pytest.raises(EmulatorError) as caught:
            process.find_program()
        assert "qemu-system-x86" in caught.value.advice
    finally:
        monkeypatch.undo()
        process.find_program.cache_clear()


def test_too_many_disks_for_a_controller(tmp_path: Path, hello: Path) -> None:
    hardware = Hardware(controller=Controller.LSI53C895A)
    with (
        pytest.raises(EmulatorError, match="do not fit"),
        Emulator(hardware, [Drive(path=hello)] * 8, folder=tmp_path, accelerator=TCG),
    ):
        pass


def test_the_network_lets_nothing_out(tmp_path: Path) -> None:
    options = arguments.network(Network(address="192.168.7.20/24", gateway="192.168.7.1"), Hardware())
    assert "restrict=on" in options[1]
    assert "net=192.168.7.0/24" in options[1]
    assert "host=192.168.7.1" in options[1]
    assert "hostfwd=tcp:127.0.0.1:0-192.168.7.20:22" in options[1]
    assert "dns=192.168.7.2" in options[1]
    assert arguments.network(Network(address="10.1.2.3/32"), Hardware())[1].endswith("10.0.2.15:22")
    assert arguments.network(None, Hardware()) == ["-nic", "none"]


def test_a_static_network_is_accepted_by_qemu(tmp_path: Path, hello: Path) -> None:
    network = Network(address="192.168.7.1/24", gateway="192.168.7.254")
    with Emulator(Hardware(), [Drive(path=hello)], folder=tmp_path, accelerator=TCG, network=network) as emulator:
        with socket.create_connection(("127.0.0.1", emulator.forwarded_port(22)), timeout=5):
            pass
        with pytest.raises(EmulatorError, match="not forwarded"):
            emulator.forwarded_port(80)


def test_direct_reset_and_power_off_are_events(tmp_path: Path) -> None:
    disk = boot_disk(tmp_path / "off.raw", [("screen", "off")], ending="power-off")
    with Emulator(Hardware(), [Drive(path=disk)], folder=tmp_path, accelerator=TCG) as emulator:
        assert until(lambda: any(event.name == "SHUTDOWN" and event.data["guest"] for event in emulator.events()))
        emulator.screenshot(tmp_path / "after.png")  # the machine stands, its screen can still be read
    disk = boot_disk(tmp_path / "reset.raw", [("screen", "reset")], ending="reset")
    with Emulator(Hardware(), [Drive(path=disk)], folder=tmp_path, accelerator=TCG, stop_on_reset=True) as emulator:
        assert until(lambda: any(event.data.get("reason") == "guest-reset" for event in emulator.events()))


def test_dead_processors_are_known(tmp_path: Path) -> None:
    disk = boot_disk(tmp_path / "halt.raw", [("screen", "stop")], ending="halt")
    with Emulator(Hardware(cpus=2), [Drive(path=disk)], folder=tmp_path, accelerator=TCG) as emulator:
        assert shows(emulator, "stop")
        assert until(emulator.processors_dead)


def test_a_kernel_is_told_from_firmware_and_loader(tmp_path: Path, hello: Path) -> None:
    proof = tmp_path / "proof.raw"  # ends in long mode with paging
    proof.write_bytes((acceleration._PROOF.ljust(510, b"\0") + b"\x55\xaa").ljust(1 << 20, b"\0"))
    with Emulator(Hardware(), [Drive(path=proof)], folder=tmp_path, accelerator=TCG) as emulator:
        assert until(emulator.kernel_runs)
    with Emulator(Hardware(), [Drive(path=hello)], folder=tmp_path, accelerator=TCG) as emulator:
        assert shows(emulator, "hello, screen")
        assert not emulator.kernel_runs()
    hardware = Hardware(firmware=Firmware.UEFI, chipset=Chipset.Q35)
    with Emulator(hardware, [Drive(path=hello)], folder=tmp_path, accelerator=TCG) as emulator:
        assert until(lambda: emulator.console.total > 0, 60)
        assert not emulator.kernel_runs()


def test_the_console_log_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from p2v.emulator import console

    monkeypatch.setattr(console, "LOG_LIMIT", 1000)
    serial = console.SerialConsole(tmp_path / "log")
    serial.peer.sendall(b"x" * 5000)
    assert until(lambda: serial.total == 5000)
    assert len(serial.take()) == 1000
    serial.close()
    assert (tmp_path / "log").stat().st_size == 1000


def test_console_text_is_cut_at_whole_characters(tmp_path: Path) -> None:
    from p2v.emulator import console

    serial = console.SerialConsole(tmp_path / "log")
    try:
        for piece, shown in ((b"a\xc3", "a"), (b"\xa4\x1b[1", "ä"), (b";3Hb", "\x1b[1;3Hb"), (b"\xffc", "\ufffdc")):
            total = serial.total + len(piece)
            serial.peer.sendall(piece)
            assert until(lambda total=total: serial.total == total)  # type: ignore[misc]
            assert serial.take() == shown
    finally:
        serial.close()


def test_a_picture_becomes_a_png() -> None:
    import struct
    import zlib

    png = png_of(*parse_ppm(b"P6\n2 1\n255\n" + bytes([255, 0, 0, 0, 0, 255])))
    assert struct.unpack(">II", png[16:24]) == (2, 1)
    start = png.index(b"IDAT") + 4
    length = struct.unpack(">I", png[start - 8 : start - 4])[0]
    assert zlib.decompress(png[start : start + length]) == b"\0" + bytes([255, 0, 0, 0, 0, 255])
    for broken in (b"P5\n2 1\n255\n" + bytes(6), b"P6\n2 2\n255\n" + bytes(6), b"P6\n99999 99999\n255\n"):
        with pytest.raises(ValueError, match="PPM"):
            parse_ppm(broken)


def test_a_console_on_a_frame_buffer_is_read(tmp_path: Path) -> None:
    rows = {letter: glyph for glyph, letter in glyphs.font().items()}
    if not rows:
        pytest.skip("no VGA BIOS to take the font from")
    width, height = 1280, 800
    text = ["[    8.332] Kernel panic - not syncing: VFS: Unable to mount root fs", "", "metal1 login: "]
    picture = bytearray(width * height * 3)
    for line, content in enumerate(text):
        for column, letter in enumerate(content):
            for y, bits in enumerate(rows[letter] if letter != " " else bytes(16)):
                for x in range(8):
                    if bits << x & 0x80:
                        place = ((line * 16 + y) * width + column * 8 + x) * 3
                        picture[place : place + 3] = bytes([170, 170, 170])
    lines = glyphs.read_text(width, height, memoryview(picture))
    assert lines is not None
    assert list(lines[:3]) == [line.rstrip() for line in text]
    assert glyphs.read_text(width, height, memoryview(bytes(len(picture)))) is None
    assert glyphs.read_text(width, height, memoryview(bytes(range(256)) * (len(picture) // 256))) is None
    assert glyphs.read_text(width, height, memoryview(b"")) is None


# -- nothing is left -------------------------------------------------------------------------------------------------

_CHILD = """
import sys, time
from pathlib import Path
from p2v.emulator import Accelerator, Drive, Emulator, Hardware
with Emulator(Hardware(), [Drive(path=Path(sys.argv[1]))], folder=Path(sys.argv[2]), accelerator=Accelerator.TCG) as emulator:
    print(emulator.pid, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def child(tmp_path: Path, hello: Path) -> Iterator[subprocess.Popen[str]]:
    argv = [sys.executable, "-c", textwrap.dedent(_CHILD), str(hello), str(tmp_path)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        yield process
        process.kill()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_qemu_dies_with_its_parent(child: subprocess.Popen[str], number: signal.Signals) -> None:
    assert child.stdout is not None
    pid = int(child.stdout.readline())
    assert alive(pid)
    os.kill(child.pid, number)
    child.wait(20)
    assert until(lambda: not alive(pid), 5)


def test_qemu_outlives_the_thread_that_entered_but_not_the_context(tmp_path: Path, hello: Path) -> None:
    started: list[Emulator] = []

    def start() -> None:
        emulator = Emulator(Hardware(), [Drive(path=hello)], folder=tmp_path, accelerator=TCG)
        started.append(emulator.__enter__())

    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
    emulator = started[0]
    assert shows(emulator, "hello, screen")
    pid = emulator.pid
    emulator.__exit__(None, None, None)
    assert not alive(pid)
    emulator.__exit__(None, None, None)


def test_a_qemu_that_is_killed_is_an_error(tmp_path: Path, hello: Path) -> None:
    with Emulator(Hardware(), [Drive(path=hello)], folder=tmp_path, accelerator=TCG) as emulator:
        os.kill(emulator.pid, signal.SIGKILL)
        with pytest.raises(EmulatorError, match="QEMU broke off"):
            for _ in range(100):
                emulator.check()
                time.sleep(0.05)
        with pytest.raises(EmulatorError):
            emulator.screen_text()


# -- acceleration ----------------------------------------------------------------------------------------------------


def test_the_proof_ends_under_tcg_and_not_without_time() -> None:
    program = process.find_program()
    assert acceleration.runs_code(program, TCG, seconds=60)
    assert not acceleration.runs_code(program, TCG, seconds=0.01)


def test_the_answer_is_kept_for_this_boot_and_this_qemu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    asked: list[Accelerator] = []

    def proof(_program: process.Program, accelerator: Accelerator) -> bool:
        asked.append(accelerator)
        return True

    monkeypatch.setattr(acceleration, "runs_code", proof)
    monkeypatch.setattr(os, "access", lambda *_: True)
    program = process.find_program()
    assert acceleration.proven_accelerator(program) is Accelerator.KVM
    assert acceleration.proven_accelerator(program) is Accelerator.KVM
    assert len(asked) == 1
    monkeypatch.setattr(acceleration, "_boot_id", lambda: "another boot")
    acceleration.proven_accelerator(program)
    assert len(asked) == 2
    (tmp_path / "p2v-toolkit" / "acceleration.json").write_text("{damaged")
    acceleration.proven_accelerator(program)
    assert len(asked) == 3
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert acceleration.proven_accelerator(program) is TCG
