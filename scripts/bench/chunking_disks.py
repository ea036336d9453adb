"""Disks on which the chunkers are compared: Debian machines put on real file systems, and what a day makes of them.

Every disk is a sparse raw file with one file system, mounted through the kernel, so the kernel's own allocator places the blocks.
After each step the free blocks are trimmed: the toolkit copies used blocks only, and restic gets the same images.

- `first`: Debian on ext4, with a SQLite database, logs and small files;
- `day`: `first` after a day of a server: logs grow and rotate, small files come, change and go, a few rows of the database change;
- `database`: `first` after 6000 single-row changes at random places of the database;
- `update`: `first` after `apt-get dist-upgrade` with the security and stable updates (a new kernel is beside the old one then);
- `second`: another Debian machine of the same release: other packages, installed by its own run, on an ext4 of another size;
- `second-xfs`: the files of `second` on XFS, copied in another order.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

SUITE = "bookworm"
MIRROR = "http://deb.debian.org/debian"
SECURITY = "http://deb.debian.org/debian-security"
COMMON = (
    "linux-image-amd64",
    "systemd-sysv",
    "openssh-server",
    "python3",
    "perl",
    "ca-certificates",
    "vim",
    "git",
    "gcc",
)
FIRST = (*COMMON, "nginx", "postgresql", "build-essential", "imagemagick", "tcpdump")
SECOND = ("apache2", "mariadb-server", "php", "rsync", "tmux", *reversed(COMMON), "strace")
WORDS = [
    f"{word}{number}"
    for word in ("order", "customer", "item", "city", "status", "note", "price")
    for number in range(300)
]
SMALL_FILES, LOGS, ROWS = 12_000, 60, 700_000


def build(folder: Path) -> dict[str, Path]:
    """Return the disks by name, building those that `folder` has not yet. Needs root, loop devices and the Debian mirror."""
    folder.mkdir(parents=True, exist_ok=True)
    builders: dict[str, Callable[[Path, Path], None]] = {
        "first": _build_first,
        "day": lambda disk, mount: _change(folder / "first.raw", disk, mount, _live_a_day),
        "database": lambda disk, mount: _change(folder / "first.raw", disk, mount, _change_rows),
        "update": lambda disk, mount: _change(folder / "first.raw", disk, mount, _update_packages),
        "second": _build_second,
        "second-xfs": lambda disk, mount: _copy_to_xfs(folder / "second.raw", disk, mount),
    }
    return {name: _publish(folder / f"{name}.raw", builder) for name, builder in builders.items()}


def _publish(final: Path, builder: Callable[[Path, Path], None]) -> Path:
    if final.exists():
        return final
    part, mount = final.with_suffix(".part"), final.with_suffix(".mount")
    part.unlink(missing_ok=True)
    mount.mkdir(exist_ok=True)
    builder(part, mount)
    mount.rmdir()
    part.rename(final)
    return final


def _run(*command: str | Path) -> None:
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    subprocess.run([str(word) for word in command], check=True, stdout=subprocess.DEVNULL, env=environment)


@contextlib.contextmanager
def _mounted(disk: Path, mount: Path, *, read_only: bool = False) -> Iterator[Path]:
    """Mount `disk`; on leaving, trim its free blocks and unmount it."""
    _run("mount", "-o", "loop,ro,noload" if read_only else "loop", disk, mount)
    try:
        yield mount
        if not read_only:
            os.sync()  # ext4 does not trim what a transaction that is not committed yet has freed
            _run("fstrim", mount)
    finally:
        _run("umount", mount)


def _install(root: Path, packages: tuple[str, ...]) -> None:
    options = (
        "--mode=root",
        "--variant=important",
        "--aptopt=APT::Install-Recommends false",
        "--aptopt=Acquire::Languages none",
    )
    _run("mmdebstrap", *options, f"--include={','.join(packages)}", SUITE, root, MIRROR)


def _build_first(disk: Path, mount: Path) -> None:
    _make(disk, gib=5)
    with _mounted(disk, mount) as root:
        _install(root, FIRST)
        _live_a_first_year(root, random.Random(1))


def _build_second(disk: Path, mount: Path) -> None:
    _make(disk, gib=7)
    with _mounted(disk, mount) as root:
        _install(root, SECOND)


def _make(disk: Path, *, gib: int) -> None:
    with disk.open("wb") as file:
        file.truncate(gib << 30)
    _run("mke2fs", "-q", "-F", "-t", "ext4", disk)


def _copy_to_xfs(source: Path, disk: Path, mount: Path) -> None:
    with disk.open("wb") as file:
        file.truncate(6 << 30)
    _run("mkfs.xfs", "-q", disk)
    other = mount.with_suffix(".source")
    other.mkdir(exist_ok=True)
    with _mounted(source, other, read_only=True) as files, _mounted(disk, mount) as root:
        for place in sorted(files.iterdir(), reverse=True):
            _run("cp", "-a", place, root)
    other.rmdir()


def _change(base: Path, disk: Path, mount: Path, change: Callable[[Path, random.Random], None]) -> None:
    _run("cp", "--sparse=always", base, disk)
    with _mounted(disk, mount) as root:
        change(root, random.Random(2))


def _line(chance: random.Random) -> str:
    return (
        f"{chance.randrange(10**9)} host service[{chance.randrange(30000)}]: {' '.join(chance.choices(WORDS, k=8))}\n"
    )


def _small(chance: random.Random) -> str:
    return "".join(_line(chance) for _ in range(chance.randrange(1, 150)))


def _row(chance: random.Random) -> tuple[str, bytes]:
    return " ".join(chance.choices(WORDS, k=24)), chance.randbytes(chance.randrange(60, 200))


def _live_a_first_year(root: Path, chance: random.Random) -> None:
    """The data of a machine in use: files of different ages lie between each other, as they are written in turns and some go."""
    data, logs = root / "srv/data", root / "var/log/service"
    data.mkdir(parents=True)
    logs.mkdir(parents=True)
    with contextlib.closing(sqlite3.connect(root / "srv/shop.db")) as database:
        database.execute("pragma page_size = 8192")
        database.execute("create table item (id integer primary key, words text, picture blob)")
        for turn in range(20):
            rows = ROWS // 20
            database.executemany("insert into item (words, picture) values (?, ?)", (_row(chance) for _ in range(rows)))
            database.commit()
            for number in range(turn * SMALL_FILES // 20, (turn + 1) * SMALL_FILES // 20):
                (data / f"{number}.txt").write_text(_small(chance))
            _grow_logs(logs, chance, lines=600)
            os.sync()
    for number in chance.sample(range(SMALL_FILES), SMALL_FILES // 5):
        (data / f"{number}.txt").unlink()


def _grow_logs(logs: Path, chance: random.Random, *, lines: int) -> None:
    for number in range(LOGS):
        with (logs / f"{number}.log").open("a") as log:
            log.writelines(_line(chance) for _ in range(chance.randrange(lines)))


def _live_a_day(root: Path, chance: random.Random) -> None:
    data, logs = root / "srv/data", root / "var/log/service"
    for number in chance.sample(range(LOGS), 6):
        (logs / f"{number}.log").rename(logs / f"{number}.log.1")
    for hour in range(24):
        _grow_logs(logs, chance, lines=120)
        for number in range(60):
            (data / f"new-{hour}-{number}.txt").write_text(_small(chance))
        os.sync()
    kept = sorted(data.glob("[0-9]*.txt"))
    chance.shuffle(kept)
    for path in kept[:500]:
        path.write_text(_small(chance))
    for path in kept[500:800]:
        path.unlink()
    _update_rows(root, chance, count=300)


def _change_rows(root: Path, chance: random.Random) -> None:
    _update_rows(root, chance, count=6000)


def _update_rows(root: Path, chance: random.Random, *, count: int) -> None:
    with contextlib.closing(sqlite3.connect(root / "srv/shop.db")) as database:
        for _ in range(count // 100):
            places = [chance.randrange(1, ROWS) for _ in range(100)]
            database.executemany(
                "update item set words = ? where id = ?", [(_row(chance)[0], place) for place in places]
            )
            database.commit()


def _update_packages(root: Path, _chance: random.Random) -> None:
    sources = root / "etc/apt/sources.list"
    lines = [
        f"deb {MIRROR} {SUITE} main",
        f"deb {MIRROR} {SUITE}-updates main",
        f"deb {SECURITY} {SUITE}-security main",
    ]
    sources.write_text("\n".join(lines) + "\n")
    shutil.copy("/etc/resolv.conf", root / "etc/resolv.conf")
    policy = root / "usr/sbin/policy-rc.d"
    policy.write_text("#!/bin/sh\nexit 101\n")
    policy.chmod(0o755)
    proxy = [f"-oAcquire::http::Proxy={os.environ['http_proxy']}"] if "http_proxy" in os.environ else []
    for words in (["update"], ["-y", "dist-upgrade"], ["clean"]):
        _run("chroot", root, "apt-get", "-q", *proxy, *words)
    policy.unlink()
