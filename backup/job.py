"""What is drilled: machines in ordered groups, with what each has to answer. Read from a job file (TOML), or made from the command line.

::

    timeout = 7200                      # seconds, all in all; 0: no limit
    [[group]]
    name = "shop"
    [[group.machine]]
    machine = "db1"
    sample = "newest"                   # newest | oldest | random, or point = "ID"
    timeout = 900                       # seconds until it must have come up
    platform = "qemu"                   # default: as near as possible to the machine's own hardware
    [[group.machine.probe]]
    kind = "tcp"
    port = 5432

Keys that are not known are refused with their path.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from formats.errors import UsageError
from p2v.config import secret
from p2v.target.hardware import PLATFORM_NAMES
from p2v.target.probe import (
    PROBE_SECONDS,
    AgentProbe,
    HttpProbe,
    MarkerProbe,
    Probe,
    ScriptProbe,
    SerialProbe,
    SshProbe,
    TcpProbe,
)

SAMPLES = ("newest", "oldest", "random")
"""Which point of a machine is drilled."""

_FILE_LIMIT = 1 << 20
_WEEK = 604800

Port = Annotated[int, Meta(ge=1, le=65535)]
Seconds = Annotated[float, Meta(gt=0, le=_WEEK)]


@dataclass(frozen=True, slots=True, kw_only=True)
class DrillTarget:
    """One machine to drill. ``point`` names a point; without one ``sample`` chooses among the machine's. ``timeout`` 0 is a default."""

    machine: str = ""
    point: str = ""
    sample: str = "newest"
    timeout: float = 0.0
    platform: str = ""
    probes: tuple[Probe, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class DrillGroup:
    """Machines in the order in which they are drilled: when one does not pass, those after it are not drilled."""

    name: str
    targets: tuple[DrillTarget, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class DrillJob:
    """All that one run drills. ``timeout`` is seconds for all of it, 0: no limit."""

    groups: tuple[DrillGroup, ...]
    timeout: float = 0.0


class _Tcp(msgspec.Struct, tag_field="kind", tag="tcp", forbid_unknown_fields=True, frozen=True):
    port: Port
    name: str = ""
    expect: str = ""
    timeout: Seconds = PROBE_SECONDS


class _Http(msgspec.Struct, tag_field="kind", tag="http", forbid_unknown_fields=True, frozen=True):
    name: str = ""
    port: Port | None = None
    path: str = "/"
    host: str = "localhost"
    status: Annotated[tuple[Annotated[int, Meta(ge=100, le=599)], ...], Meta(min_length=1)] = (200,)
    contains: str = ""
    tls: bool = False
    timeout: Seconds = PROBE_SECONDS


class _Ssh(msgspec.Struct, tag_field="kind", tag="ssh", forbid_unknown_fields=True, frozen=True):
    command: str
    identity: str
    user: str = "root"
    name: str = ""
    port: Port = 22
    expect: str = ""
    timeout: Seconds = PROBE_SECONDS


class _Marker(msgspec.Struct, tag_field="kind", tag="marker", forbid_unknown_fields=True, frozen=True):
    path: str
    sha256: Annotated[str, Meta(pattern="^[0-9a-fA-F]{64}$")]
    identity: str
    user: str = "root"
    name: str = ""
    port: Port = 22
    timeout: Seconds = PROBE_SECONDS


class _Serial(msgspec.Struct, tag_field="kind", tag="serial", forbid_unknown_fields=True, frozen=True):
    command: str
    user: str
    password: str = ""  # the NAME of the secret in the environment: NAME, NAME_FILE or NAME_COMMAND
    name: str = ""
    expect: str = ""
    timeout: Seconds = PROBE_SECONDS


class _Agent(msgspec.Struct, tag_field="kind", tag="agent", forbid_unknown_fields=True, frozen=True):
    name: str = "guest agent"
    timeout: Seconds = PROBE_SECONDS


class _Script(msgspec.Struct, tag_field="kind", tag="script", forbid_unknown_fields=True, frozen=True):
    command: str
    name: str = ""
    ports: tuple[Port, ...] = ()
    timeout: Seconds = PROBE_SECONDS


_AnyProbe = _Tcp | _Http | _Ssh | _Marker | _Serial | _Agent | _Script


class _Machine(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    machine: str
    point: str = ""
    sample: Literal["newest", "oldest", "random"] = "newest"
    timeout: Annotated[float, Meta(ge=0, le=_WEEK)] = 0.0
    platform: str = ""
    probe: tuple[_AnyProbe, ...] = ()


class _Group(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    machine: Annotated[tuple[_Machine, ...], Meta(min_length=1)]
    name: str = ""


class _Job(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    group: Annotated[tuple[_Group, ...], Meta(min_length=1)]
    timeout: Annotated[float, Meta(ge=0, le=_WEEK)] = 0.0


def read_job(path: Path) -> DrillJob:
    """The job in a TOML file. ``UsageError`` with the path of the key for what it may not say; paths in it are relative to its folder."""
    try:
        with path.open("rb") as stream:
            content = stream.read(_FILE_LIMIT + 1)
    except OSError as error:
        raise UsageError(f"the job file {path} cannot be read: {error.strerror}", subject=str(path)) from None
    if len(content) > _FILE_LIMIT:
        raise UsageError(f"the job file {path} is longer than {_FILE_LIMIT} bytes", subject=str(path))
    try:
        job = msgspec.toml.decode(content, type=_Job)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"the job file {path}: {error}", advice="See README, Drills.", subject=str(path)) from None
    groups = []
    for number, group in enumerate(job.group):
        place = f"$.group[{number}]"
        machines = tuple(
            _target(path, f"{place}.machine[{index}]", machine) for index, machine in enumerate(group.machine)
        )
        groups.append(DrillGroup(name=group.name or f"group {number + 1}", targets=machines))
    return DrillJob(groups=tuple(groups), timeout=job.timeout)


def _target(path: Path, place: str, stated: _Machine) -> DrillTarget:
    if stated.platform and stated.platform not in PLATFORM_NAMES:
        raise UsageError(
            f"the job file {path}: no platform named {stated.platform!r} - at `{place}.platform`",
            advice=f"Known are: {', '.join(PLATFORM_NAMES)}",
        )
    probes = tuple(_probe(path, f"{place}.probe[{number}]", probe) for number, probe in enumerate(stated.probe))
    return DrillTarget(
        machine=stated.machine, point=stated.point, sample=stated.sample, timeout=stated.timeout, platform=stated.platform,
        probes=probes,
    )  # fmt: skip


def _probe(path: Path, place: str, stated: _AnyProbe) -> Probe:
    if isinstance(stated, _Tcp):
        return TcpProbe(
            name=stated.name or f"port {stated.port}", port=stated.port, expect=_regex(path, place, stated.expect), timeout=stated.timeout
        )  # fmt: skip
    if isinstance(stated, _Http):
        port = stated.port or (443 if stated.tls else 80)
        return HttpProbe(
            name=stated.name or f"http{'s' if stated.tls else ''} {port}{stated.path}", port=port, path=stated.path, host=stated.host,
            status=stated.status, contains=stated.contains, tls=stated.tls, timeout=stated.timeout,
        )  # fmt: skip
    if isinstance(stated, _Agent):
        return AgentProbe(name=stated.name, timeout=stated.timeout)
    if isinstance(stated, _Serial):
        password = secret(stated.password) if stated.password else None
        if stated.password and password is None:
            raise UsageError(
                f"the job file {path}: no secret {stated.password} is set - at `{place}.password`",
                advice=f"Set {stated.password}, {stated.password}_FILE or {stated.password}_COMMAND; the file holds its name only.",
            )
        return SerialProbe(
            name=stated.name or stated.command, command=stated.command, user=stated.user, password=password,
            expect=_regex(path, place, stated.expect), timeout=stated.timeout,
        )  # fmt: skip
    if isinstance(stated, _Script):
        words = shlex.split(stated.command)
        if not words:
            raise UsageError(f"the job file {path}: an empty command - at `{place}.command`")
        if "/" in words[0]:
            words[0] = str(_near(path, words[0]))
        return ScriptProbe(
            name=stated.name or stated.command, command=tuple(words), ports=stated.ports, timeout=stated.timeout
        )
    identity = _near(path, stated.identity)
    if not identity.is_file():
        raise UsageError(f"the job file {path}: there is no key {identity} - at `{place}.identity`")
    if isinstance(stated, _Marker):
        return MarkerProbe(
            name=stated.name or stated.path, path=stated.path, sha256=stated.sha256, user=stated.user, identity=identity,
            port=stated.port, timeout=stated.timeout,
        )  # fmt: skip
    return SshProbe(
        name=stated.name or stated.command, command=stated.command, user=stated.user, identity=identity, port=stated.port,
        expect=_regex(path, place, stated.expect), timeout=stated.timeout,
    )  # fmt: skip


def _near(path: Path, name: str) -> Path:
    return path.absolute().parent / Path(name).expanduser()


def _regex(path: Path, place: str, pattern: str) -> str:
    import re

    try:
        re.compile(pattern)
    except re.error as error:
        raise UsageError(
            f"the job file {path}: {pattern!r} is no regular expression: {error} - at `{place}.expect`"
        ) from None
    return pattern
