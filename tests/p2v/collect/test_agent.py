"""The disk agent over a real sshd: what it reads, what it does not send, and everything that goes wrong."""

from __future__ import annotations

import ast
import hashlib
import os
import random
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from formats.block import BlockSource, Extent, Kind
from formats.errors import Notice, ReadError
from p2v import remote_writer
from p2v.collect import remote_agent
from p2v.collect.agent import Agent
from p2v.collect.blockdev import DdDisk, RemoteDisk
from p2v.errors import DiskVanishedError, LinkLostError, PrivilegeError, PythonMissingError
from p2v.session import Session
from tests.contracts.block_source import BlockSourceContract, write_sparse
from tests.loop import loop_device
from tests.p2v.proxy import proxy
from tests.p2v.sshd import PLAIN, SUDOER, SshServer, ssh_server
from tests.requirement import needs, needs_root

MIB = 1 << 20
PAGE = 4096


@pytest.fixture(scope="module")
def session(sshd: SshServer) -> Iterator[Session]:
    with Session.connect(sshd.target()) as made:
        yield made


@pytest.fixture(scope="module")
def agent(session: Session) -> Iterator[Agent]:
    with Agent.start(session) as made:
        yield made


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder on tmpfs, where files may be as large as one likes."""
    place = Path("/dev/shm")
    made = Path(tempfile.mkdtemp(prefix="p2v-agent-", dir=place if place.is_dir() else None))
    yield made
    shutil.rmtree(made)


def content(size: int, seed: int = 1) -> bytes:
    """Bytes with runs of zero pages, runs of noise and text, beginning nowhere in particular."""
    made, random_ = bytearray(), random.Random(seed)
    while len(made) < size:
        length = random_.choice([1, 511, PAGE, 3 * PAGE, 70_000, 400_000])
        made += random_.choice([bytes(length), random_.randbytes(length), b"the quick brown fox " * (length // 20 + 1)])
    return bytes(made[:size])


def read(disk: BlockSource, offset: int, length: int) -> bytes:
    buffer = bytearray(b"\xa5" * length)
    disk.readinto(memoryview(buffer), offset)
    return bytes(buffer)


def whole(disk: BlockSource) -> bytes:
    return read(disk, 0, disk.size)


@contextmanager
def broken_disk(folder: Path, sector: int) -> Iterator[Path]:
    """A file with a bad sector: blkdebug behind FUSE, so that read(2) ends with EIO."""
    image, mount = folder / "broken.raw", folder / "broken"
    image.write_bytes(content(8 * MIB))
    mount.touch()
    error = f'{{"event":"none","iotype":"read","errno":5,"sector":{sector}}}'
    debug = f'{{"driver":"blkdebug","node-name":"d","image":"f","read-only":true,"inject-error":[{error}]}}'
    command = [
        "qemu-storage-daemon",
        "--blockdev",
        f"driver=file,node-name=f,filename={image},read-only=on",
        "--blockdev",
        debug,
    ]
    daemon = subprocess.Popen(
        [*command, "--export", f"type=fuse,id=e,node-name=d,mountpoint={mount}"], stderr=subprocess.PIPE
    )
    try:
        while mount.stat().st_size == 0:
            if daemon.poll() is not None:
                assert daemon.stderr is not None
                pytest.skip(f"no FUSE export here: {daemon.stderr.read().decode().strip()}")
            time.sleep(0.05)
        yield Path(f"/proc/{os.getpid()}/root{mount}")  # the server has a mount namespace of its own
    finally:
        daemon.terminate()
        daemon.wait(20)


class RemoteContract(BlockSourceContract):
    """What every remote disk must do; ``opened`` gives the disk for a file of the host."""

    def opened(self, session: Session, agent: Agent, path: Path) -> BlockSource:
        raise NotImplementedError

    @pytest.fixture
    def source(self, session: Session, agent: Agent, folder: Path, content: bytes) -> BlockSource:
        return self.opened(session, agent, write_sparse(folder / "disk", content))

    @pytest.fixture
    def vast(self, session: Session, agent: Agent, folder: Path) -> BlockSource:
        path = folder / "vast"
        with path.open("wb") as file:
            file.truncate(16 << 40)
        return self.opened(session, agent, path)


class TestRemoteDisk(RemoteContract):
    def opened(self, session: Session, agent: Agent, path: Path) -> BlockSource:
        return agent.disk(str(path))


class TestDdDisk(RemoteContract):
    tells_zeroes = False

    def opened(self, session: Session, agent: Agent, path: Path) -> BlockSource:
        return DdDisk(session, str(path))


class TestScript:
    @pytest.mark.parametrize("script", [remote_agent, remote_writer])
    def test_it_is_python_3_4(self, script: ModuleType) -> None:
        ast.parse(Path(str(script.__file__)).read_text(), feature_version=(3, 4))

    @pytest.mark.parametrize("script", [remote_agent, remote_writer])
    def test_it_uses_only_what_the_smallest_python_has(self, script: ModuleType) -> None:
        tree = ast.parse(Path(str(script.__file__)).read_text())
        names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        names |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        # What Debian's python3-minimal has; it lacks json, queue, mmap and ctypes.
        known = {
            "array",
            "collections",
            "errno",
            "fcntl",
            "hashlib",
            "os",
            "select",
            "stat",
            "struct",
            "sys",
            "threading",
            "time",
            "zlib",
        }
        assert names <= known

    @pytest.mark.parametrize("version", ["3.6", "3.7", "3.8", "3.13"])
    def test_it_runs_on(
        self, sshd: SshServer, session: Session, folder: Path, version: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        python = _python(version)
        if python is None:
            pytest.skip(f"no Python {version} here")
        monkeypatch.setattr("p2v.session.interpreter._NAMES", str(python))
        path = folder / "disk"
        path.write_bytes(content(3 * MIB + 123))
        with Agent.start(session, channels=1) as made:
            assert made.facts["python"] == version
            assert whole(made.disk(str(path))) == path.read_bytes()

    def test_compression_pays_only_on_a_link_slower_than_compressing(self) -> None:
        text = memoryview(b"the quick brown fox " * 5000)
        for cost, wanted in ((1e-10, False), (1e-6, True)):  # 10 GB/s, 1 MB/s
            link = remote_agent.Link("auto")
            for _ in range(100):
                link.sent(MIB, cost * MIB)
                link.decide(text)
            assert link.on is wanted

    def test_noise_is_not_worth_compressing(self) -> None:
        link = remote_agent.Link("auto")
        noise = memoryview(random.Random(1).randbytes(MIB))
        for _ in range(100):
            link.sent(MIB, 1.0)
            assert not link.decide(noise)
        assert link.ratio > 0.9

    @given(st.lists(st.tuples(st.sampled_from([0, 1, 2]), st.integers(1, 9000)), max_size=12), st.integers(0, 9000))
    @settings(max_examples=200)
    def test_runs_keep_all_data_and_leave_out_zero_pages(self, parts: list[tuple[int, int]], offset: int) -> None:
        import mmap

        data = b"".join(bytes([value]) * length for value, length in parts)
        buffer = mmap.mmap(-1, len(data) + 2 * PAGE)
        begin = offset % PAGE
        buffer[begin : begin + len(data)] = data
        runs = remote_agent.find_runs(memoryview(buffer), begin, len(data), offset)
        rebuilt, position = bytearray(len(data)), 0
        for start, length in runs:
            assert start >= position
            assert length > 0
            rebuilt[start : start + length] = data[start : start + length]
            position = start + length + 1  # merged: runs never touch
        assert bytes(rebuilt) == data
        for page in range(0, len(data), PAGE):
            place = page + -offset % PAGE
            if place + PAGE <= len(data) and not any(data[place : place + PAGE]):
                assert not any(start < place + PAGE and place < start + length for start, length in runs)


def _python(version: str) -> Path | None:
    found = [
        shutil.which(f"python{version}"),
        *sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python{version}")),
    ]
    for python in found:
        if python and subprocess.run([python, "-c", ""], capture_output=True, check=False).returncode == 0:
            return Path(python)
    return None


class TestRead:
    @pytest.mark.parametrize("size", [1, PAGE, 5 * MIB, 5 * MIB + 1, 3 * MIB - 511])
    def test_a_file(self, agent: Agent, folder: Path, size: int) -> None:
        path = folder / "disk"
        path.write_bytes(content(size))
        disk = agent.disk(str(path))
        assert disk.size == size
        assert whole(disk) == path.read_bytes()
        disk.close()

    def test_any_range(self, agent: Agent, folder: Path) -> None:
        path = folder / "disk"
        data = content(4 * MIB + 77)
        path.write_bytes(data)
        disk, random_ = agent.disk(str(path)), random.Random(2)
        for _ in range(60):
            offset = random_.randrange(len(data))
            length = random_.randrange(min(len(data) - offset, 2 * MIB) + 1)
            assert read(disk, offset, length) == data[offset : offset + length]

    def test_several_threads(self, agent: Agent, folder: Path) -> None:
        path = folder / "disk"
        data = content(32 * MIB)
        path.write_bytes(data)
        disk = agent.disk(str(path))
        wrong: list[int] = []

        def work(seed: int) -> None:
            random_ = random.Random(seed)
            for _ in range(20):
                offset = random_.randrange(len(data) - 2 * MIB)
                if read(disk, offset, 2 * MIB) != data[offset : offset + 2 * MIB]:
                    wrong.append(offset)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong

    def test_zero_pages_stay_on_the_source(self, agent: Agent, folder: Path) -> None:
        path = folder / "disk"
        with path.open("wb") as file:
            file.write(bytes(16 * MIB))
            file.seek(5 * MIB + PAGE)
            file.write(b"x")
        before = agent.bytes_on_wire
        assert whole(agent.disk(str(path))) == path.read_bytes()
        assert agent.bytes_on_wire - before < 2 * PAGE + 2000

    def test_outside_the_disk_and_after_close(self, agent: Agent, folder: Path) -> None:
        path = folder / "disk"
        path.write_bytes(bytes(PAGE))
        disk = agent.disk(str(path))
        for offset, length in ((-1, 1), (0, PAGE + 1), (PAGE, 1)):
            with pytest.raises(ValueError, match="outside"):
                disk.readinto(memoryview(bytearray(length)), offset)
            with pytest.raises(ValueError, match="outside"):
                disk.extents(offset, length)
        disk.close()
        disk.close()
        with pytest.raises(ValueError, match="closed"):
            read(disk, 0, 1)

    def test_digests_are_the_hosts(self, agent: Agent, folder: Path) -> None:
        path = folder / "disk"
        data = content(5 * MIB + 17)
        path.write_bytes(data)
        disk = agent.disk(str(path))
        assert disk.hash_name == "blake2b"
        before = agent.bytes_on_wire
        found = disk.digests(MIB, len(data) - MIB, 65536)
        assert agent.bytes_on_wire - before < 10_000
        assert found == [
            hashlib.blake2b(data[at : at + 65536], digest_size=32).digest() for at in range(MIB, len(data), 65536)
        ]


class TestMap:
    def test_16_tib_cost_nothing_until_they_hold_something(self, agent: Agent, folder: Path) -> None:
        path = folder / "huge"
        size = 16 << 40
        with path.open("wb") as file:
            file.truncate(size)
            for place in (0, 1 << 40, size - MIB):
                file.seek(place)
                file.write(b"\1" * MIB)
        disk = agent.disk(str(path))
        assert disk.size == size
        extents = list(disk.extents(0, size))
        assert [(e.start, e.length) for e in extents if e.kind is Kind.DATA] == [
            (p, MIB) for p in (0, 1 << 40, size - MIB)
        ]
        assert sum(e.length for e in extents) == size
        assert read(disk, size - MIB - 1, MIB + 1) == b"\0" + b"\1" * MIB

    def test_many_extents_come_piece_by_piece(self, agent: Agent, folder: Path) -> None:
        path = folder / "holes"
        count = 3 * remote_agent.MAX_EXTENTS + 5
        with path.open("wb") as file:
            for number in range(count):
                file.seek(number * 4 * PAGE)
                file.write(b"x" * PAGE)
        disk = agent.disk(str(path))
        walk = disk.extents(PAGE, disk.size - PAGE)
        assert next(walk) == Extent(PAGE, 3 * PAGE, Kind.ZERO)
        rest = list(walk)
        assert sum(extent.kind is Kind.DATA for extent in rest) == count - 1
        assert rest[-1].end == disk.size

    def test_empty(self, agent: Agent, folder: Path) -> None:
        path = folder / "none"
        path.touch()
        disk = agent.disk(str(path))
        assert list(disk.extents(0, 0)) == []
        read(disk, 0, 0)


@needs_root()
@needs("losetup")
class TestDevice:
    @pytest.mark.parametrize("size", [8 * MIB, 8 * MIB + 512])
    def test_a_block_device_is_read_past_the_page_cache(self, agent: Agent, folder: Path, size: int) -> None:
        path = folder / "disk"
        path.write_bytes(content(size))
        with loop_device(path) as device:
            disk = agent.disk(device)
            assert (disk.size, disk.sector_size, disk.is_block, disk.direct) == (size, 512, True, True)
            assert whole(disk) == path.read_bytes()
            # The cache of the device would still show what was there before: the file is written beneath it.
            subprocess.run(["dd", f"if={device}", "of=/dev/null", "bs=1M"], check=True, capture_output=True)
            with path.open("r+b") as file:
                file.seek(MIB)
                file.write(b"changed")
            assert read(disk, MIB, 7) == b"changed"
            assert list(disk.extents(5, 100)) == [Extent(5, 100, Kind.DATA)]
            disk.close()

    def test_dd_reads_it_as_well(self, session: Session, folder: Path) -> None:
        path = folder / "disk"
        path.write_bytes(content(8 * MIB + 512))
        with loop_device(path) as device:
            disk = DdDisk(session, device)
            assert disk.direct
            assert read(disk, 5 * MIB + 13, 3 * MIB) == path.read_bytes()[5 * MIB + 13 :][: 3 * MIB]
            assert read(disk, disk.size - 700, 700) == path.read_bytes()[-700:]

    def test_a_refused_o_direct_is_a_notice(
        self, session: Session, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = folder / "disk"
        path.write_bytes(content(2 * MIB))
        # A device that refuses cannot be made here: the agent is made to ask for less than a sector, which all devices refuse.
        script = Path(remote_agent.__file__).read_text()
        broken = script.replace(
            "step = self.pread(view[got : high - low], low + got)",
            "step = self.pread(view[got + 1 * self.direct : high - low], low + got)",
        )
        assert broken != script
        monkeypatch.setattr("p2v.collect.agent._script", broken.encode)
        told: list[Notice] = []
        with loop_device(path) as device, Agent.start(session, channels=1, report=told.append) as made:
            disk = made.disk(device)
            assert whole(disk) == path.read_bytes()
            assert not disk.direct
            assert [notice.code for notice in told] == ["buffered-read"]
            disk.close()


class TestTrouble:
    def test_no_such_disk(self, agent: Agent, session: Session) -> None:
        with pytest.raises(DiskVanishedError):
            agent.disk("/dev/nonesuch")
        with pytest.raises(DiskVanishedError):
            DdDisk(session, "/dev/nonesuch")

    def test_something_that_is_no_disk(self, agent: Agent) -> None:
        for path in ("/dev/zero", "/tmp"):
            with pytest.raises(ReadError):
                agent.disk(path)

    @needs_root()
    def test_a_disk_that_may_not_be_read(self, sshd: SshServer, folder: Path) -> None:
        path = folder / "disk"
        path.write_bytes(bytes(PAGE))
        path.chmod(0o600)
        folder.chmod(0o755)
        with (
            Session.connect(sshd.target(PLAIN.name)) as made,
            Agent.start(made, root=False, channels=1) as plain,
            pytest.raises(PrivilegeError),
        ):
            plain.disk(str(path))

    @needs_root()
    @needs("sudo")
    def test_sudo_that_asks_for_a_password(self, sshd: SshServer, folder: Path) -> None:
        path = folder / "disk"
        path.write_bytes(content(MIB))
        path.chmod(0o600)
        target = sshd.target(SUDOER.name, sudo_password=sshd.password(SUDOER.name))
        with Session.connect(target) as made, Agent.start(made) as root:
            assert root.facts["uid"] == 0
            assert whole(root.disk(str(path))) == path.read_bytes()

    @needs("qemu-storage-daemon")
    def test_a_bad_sector_is_named(self, agent: Agent, session: Session, folder: Path) -> None:
        with broken_disk(folder, sector=8192) as path:
            for disk in (agent.disk(str(path)), DdDisk(session, str(path))):
                good = (folder / "broken.raw").read_bytes()
                assert read(disk, 0, 4 * MIB - PAGE) == good[: 4 * MIB - PAGE]
                with pytest.raises(ReadError, match="byte 4194304"):
                    read(disk, 4 * MIB, PAGE)
                assert read(disk, 6 * MIB, MIB) == good[6 * MIB : 7 * MIB]
                disk.close()

    def test_a_file_that_shrinks(self, agent: Agent, session: Session, folder: Path) -> None:
        for number in range(2):
            path = folder / f"disk{number}"
            path.write_bytes(content(4 * MIB))
            disk: RemoteDisk | DdDisk = agent.disk(str(path)) if number else DdDisk(session, str(path))
            os.truncate(path, 2 * MIB)
            assert read(disk, 0, 2 * MIB) == path.read_bytes()
            with pytest.raises(DiskVanishedError):
                read(disk, 2 * MIB - PAGE, MIB)

    @needs_root()
    @needs("losetup")
    def test_a_device_that_shrinks(self, agent: Agent, folder: Path) -> None:
        path = folder / "disk"
        path.write_bytes(content(4 * MIB))
        with loop_device(path) as device:
            disk = agent.disk(device)
            os.truncate(path, 2 * MIB)
            subprocess.run(["losetup", "--set-capacity", device], check=True)
            with pytest.raises(DiskVanishedError):
                read(disk, 3 * MIB, MIB)

    def test_no_python(self, session: Session, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("p2v.session.interpreter._NAMES", "nonesuch /bin/false")
        with pytest.raises(PythonMissingError):
            Agent.start(session)
        path = folder / "disk"
        path.write_bytes(content(5 * MIB + 5))
        assert whole(DdDisk(session, str(path))) == path.read_bytes()

    def test_a_link_that_is_reset(self, sshd: SshServer, folder: Path) -> None:
        path = folder / "disk"
        path.write_bytes(content(MIB))
        with proxy(sshd.port) as link, Session.connect(sshd.target(port=link.port)) as made, Agent.start(made) as cut:
            disk = cut.disk(str(path))
            link.cut()
            with pytest.raises(LinkLostError):
                read(disk, 0, MIB)

    def test_a_link_that_falls_silent_and_the_agent_that_then_leaves(
        self, sshd: SshServer, session: Session, folder: Path
    ) -> None:
        path = folder / "disk"
        path.write_bytes(content(MIB))
        with proxy(sshd.port) as link, Session.connect(sshd.target(port=link.port)) as made:
            with Agent.start(made, channels=1, silence=8.0) as cut:
                disk, pid = cut.disk(str(path)), str(cut.facts["pid"])
                assert session.run(["kill", "-0", pid]).exit_code == 0
                link.freeze()
                with pytest.raises(LinkLostError):
                    read(disk, 0, MIB)
            _wait_until_gone(session, pid)

    def test_an_idle_agent_stays(self, session: Session, folder: Path) -> None:
        path = folder / "disk"
        path.write_bytes(content(MIB))
        with Agent.start(session, channels=1, silence=8.0) as idle:
            disk = idle.disk(str(path))
            time.sleep(10)  # longer than the silence that ends an agent
            assert whole(disk) == path.read_bytes()

    def test_a_killed_agent(self, session: Session, folder: Path) -> None:
        path = folder / "disk"
        path.write_bytes(content(MIB))
        with Agent.start(session, channels=1) as killed:
            disk = killed.disk(str(path))
            session.run(["kill", "-9", str(killed.facts["pid"])], check=True)
            with pytest.raises(Exception, match=r"agent .* ended"):
                for _ in range(100):
                    read(disk, 0, MIB)

    def test_nothing_stays_on_the_source(self, session: Session, folder: Path) -> None:
        with Agent.start(session, channels=1) as made:
            pid = str(made.facts["pid"])
            files = session.run(f"ls -l /proc/{pid}/fd; cat /proc/{pid}/stat", check=True).text
            assert "/tmp" not in files
        _wait_until_gone(session, pid)

    def test_login_scripts_that_talk(self, folder: Path) -> None:
        with ssh_server(
            config='ForceCommand sh -c "echo Welcome to this host; eval \\"\\$SSH_ORIGINAL_COMMAND\\""\n'
        ) as server:
            path = folder / "disk"
            path.write_bytes(content(MIB))
            with Session.connect(server.target()) as made, Agent.start(made, root=False, channels=1) as noisy:
                assert whole(noisy.disk(str(path))) == path.read_bytes()


def _wait_until_gone(session: Session, pid: str) -> None:
    for _ in range(200):
        if session.run(["kill", "-0", pid]).exit_code != 0:
            return
        time.sleep(0.1)
    pytest.fail(f"agent {pid} is still there")


class TestCompression:
    def test_stays_off_on_a_fast_link(self, agent: Agent, folder: Path) -> None:
        path = folder / "disk"
        path.write_bytes(
            random.Random(3).randbytes(12 * MIB).hex().encode()
        )  # shrinks to half, at the cost of real data
        before = agent.compressed_replies
        assert whole(agent.disk(str(path))) == path.read_bytes()
        assert agent.compressed_replies == before

    def test_goes_on_when_the_link_is_slow(self, sshd: SshServer, folder: Path) -> None:
        path = folder / "disk"
        path.write_bytes(b"the quick brown fox " * (40 * MIB // 20))
        with (
            proxy(sshd.port, rate=6e6) as link,
            Session.connect(sshd.target(port=link.port)) as made,
            Agent.start(made) as slow,
        ):
            assert whole(slow.disk(str(path))) == path.read_bytes()
            assert slow.compressed_replies > 0
            assert slow.bytes_on_wire < 30 * MIB

    def test_always(self, session: Session, folder: Path) -> None:
        path = folder / "disk"
        path.write_bytes(content(6 * MIB + 99))
        with Agent.start(session, channels=1, compress="always") as made:
            assert whole(made.disk(str(path))) == path.read_bytes()
            assert made.compressed_replies > 0
            assert made.bytes_on_wire < 6 * MIB
