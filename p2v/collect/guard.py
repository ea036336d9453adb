"""The guard: a POSIX shell script on the source that freezes, snapshots, and cleans up after itself whatever happens.

It is four processes of one script, with nothing on disk:

    top       waits for the pipeline below; its standard input and output are the collector's
    main      takes commands, one a line: ``beat freeze snapshot thaw sync end``; before each act it writes into a pipe what will have to
              be undone
    warden    holds the other end of that pipe, ignores signals; when main is gone, however that came, it thaws and removes what was written
    monitor   kills main when the collector was silent for too long, an act lasts for ever, or top is gone
    timer     while something is frozen: thaws it at the deadline, also when all others hang

While lvcreate runs, its parent holds the pipe open, so the warden acts only after it: a snapshot that is being made is removed too.
All processes carry ``p2v-guard-RUN`` in their argument list, by which ``cleanup`` tells the snapshots of a living guard from leftovers.
"""

from __future__ import annotations

import contextlib
import re
import secrets
import shlex
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from formats.errors import ToolkitError
from p2v.config import FREEZE_SECONDS
from p2v.errors import CommandError, ConsistencyError, LinkLostError
from p2v.session import RemoteProcess, Session

SILENCE_SECONDS = 60
"""After this long without a beat the guard takes the collector for dead."""

ACT_SECONDS = 900
"""How long one act may last: on a busy server ``sync`` alone takes minutes. While it lasts the guard hears no beat and expects none."""

_ANSWER_SECONDS = 180.0
_LEAST_ANSWER_SECONDS = 30.0
_NAME = re.compile(r"p2v-[0-9a-f]{8}-\d{1,4}")
_LVM_WORD = re.compile(r"[A-Za-z0-9_.+][A-Za-z0-9_.+-]*")

# No /etc/lvm/backup or archive: they would keep metadata with our snapshots in it. No dmeventd: it would outlive us.
_LVM_CONFIG = 'backup{backup=0 archive=0} activation{monitoring=0} devices{hints="none"}'

_SCRIPT = r"""
LC_ALL=C LVM_SUPPRESS_FD_WARNINGS=1 PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin; export LC_ALL LVM_SUPPRESS_FD_WARNINGS PATH
C=@CONFIG@
mount_of() { M=; case $1 in @MOUNTS@ esac; }
plan_of() { V=; case $1 in @SNAPSHOTS@ esac; }
self() { read -r SELF rest </proc/self/stat; }
say() { printf '%s\n' "$*" >&3; }
nap() { sleep "$1" & NAP=$!; wait "$NAP"; }
thaw_all() { for i in @MOUNT_NUMBERS@; do mount_of "$i"; fsfreeze -u "$M" 2>/dev/null; done; }
warden() {
  trap '' HUP INT TERM PIPE
  frozen= made=
  while read -r what which; do
    case $what in
      freeze) frozen="$frozen $which";;
      thawed) frozen=;;
      snapshot) made="$made $which";;
    esac
  done
  for i in $frozen; do mount_of "$i"; fsfreeze -u "$M" 2>/dev/null; done
  for i in $made; do plan_of "$i"; remove "$V/$S"; done
  say bye
}
remove() {
  tries=0
  while lvs --config "$C" "$1" >/dev/null 2>&1; do
    out=$(lvremove -f --config "$C" "$1" 2>&1 </dev/null) && break
    tries=$((tries+1))
    [ $tries -lt @TRIES@ ] || { say "left $1" $out; return; }
    sleep 1
  done
  say "removed $1"
}
monitor() {
  trap 'BEAT=1 LIMIT=@SILENCE@' USR1
  trap 'BEAT=1 LIMIT=@ACT@' USR2
  trap 'kill $NAP 2>/dev/null; exit 0' TERM
  trap '' HUP INT PIPE
  quiet=0 BEAT= LIMIT=@SILENCE@
  while kill -0 "$1" 2>/dev/null; do
    nap 5
    if [ -n "$BEAT" ]; then BEAT=; quiet=0; kill "$NAP" 2>/dev/null; else quiet=$((quiet+5)); fi
    if [ $quiet -ge $LIMIT ] || ! kill -0 $$ 2>/dev/null; then kill -KILL "$1" 2>/dev/null; fi
  done
}
timer() {
  trap 'kill $NAP 2>/dev/null; exit 0' TERM
  trap '' HUP INT PIPE
  nap @FREEZE@
  thaw_all
}
freeze() {
  sync
  timer >/dev/null 2>&1 3>&- 5>&- </dev/null & TIMER=$!
  r=0
  for i in @MOUNT_NUMBERS@; do
    mount_of "$i"
    printf 'freeze %s\n' "$i"
    out=$(fsfreeze -f "$M" 2>&1) || { r=1; say "error $M:" $out; break; }
  done
  return $r
}
thaw() {
  r=0
  for i in @MOUNT_NUMBERS@; do mount_of "$i"; out=$(fsfreeze -u "$M" 2>&1) || { r=1; say "error $M:" $out; }; done
  echo thawed
  [ -z "$TIMER" ] || kill "$TIMER" 2>/dev/null
  TIMER=
  return $r
}
snapshot() {
  for i in @SNAPSHOT_NUMBERS@; do
    plan_of "$i"
    printf 'snapshot %s\n' "$i"
    out=$(lvcreate --config "$C" -y -s -p r -l "$E" -n "$S" "$V/$L" 2>&1 </dev/null 3>&-; echo "rc=$?")
    case $out in *rc=0) read -r up rest </proc/uptime; say "made $i $up";; *) say "error $V/$L:" $out; return 1;; esac
  done
}
status() { for i in @SNAPSHOT_NUMBERS@; do plan_of "$i"; say "state $i" $(dmsetup status "$D" 2>&1); done; }
main() {
  exec 5>&1
  self
  trap '' USR1 USR2  # a monitor that has not set its traps yet must not die of a beat
  MAIN=$SELF TIMER=
  monitor "$MAIN" >/dev/null 2>&1 3>&- 5>&- </dev/null & MONITOR=$!
  say ready
  while read -r command; do
    kill -USR1 "$MONITOR" 2>/dev/null
    case $command in
      freeze|snapshot|thaw|sync) kill -USR2 "$MONITOR" 2>/dev/null; $command; say "done $command $?";;
      beat) status; say "done beat 0";;
      end) break;;
    esac
    kill -USR1 "$MONITOR" 2>/dev/null
  done
  [ -z "$TIMER" ] || thaw
  kill "$MONITOR" 2>/dev/null
}
exec 3>&1
main | warden
"""

_CLEANUP = r"""
LC_ALL=C LVM_SUPPRESS_FD_WARNINGS=1 PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin; export LC_ALL LVM_SUPPRESS_FD_WARNINGS PATH
command -v lvs >/dev/null 2>&1 || exit 0
C=@CONFIG@
lvs --config "$C" --noheadings --separator / -o vg_name,lv_name,lv_attr 2>/dev/null | while IFS=/ read -r v l a rest; do
  v=${v#"${v%%[! ]*}"}
  case $l in p2v-????????-*) ;; *) continue;; esac
  case $a in s*|S*) ;; *) continue;; esac
  n=${l#p2v-}; n=${n%%-*}
  case $n in *[!0-9a-f]*) continue;; esac
  g="p2v-guard""-$n"
  if grep -qsF "$g" /proc/[0-9]*/cmdline; then echo "held $v/$l"; continue; fi
  if out=$(lvremove -f --config "$C" "$v/$l" 2>&1 </dev/null); then echo "removed $v/$l"; else echo "left $v/$l" $out; fi
done
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotPlan:
    """A snapshot to be made: of ``group/volume``, called ``name``, with room for ``extents`` changed extents."""

    group: str
    volume: str
    name: str
    extents: int

    @property
    def device_name(self) -> str:
        """The device mapper's name of the snapshot: hyphens inside a name are doubled."""
        return f"{self.group.replace('-', '--')}-{self.name.replace('-', '--')}"

    @property
    def path(self) -> str:
        """The snapshot's device."""
        return f"/dev/mapper/{self.device_name}"


def new_run() -> str:
    """A name for one run: 8 hexadecimal digits."""
    return secrets.token_hex(4)


def script(
    mounts: Sequence[str],
    snapshots: Sequence[SnapshotPlan],
    *,
    silence: int = SILENCE_SECONDS,
    freeze: int = FREEZE_SECONDS,
    act: int = ACT_SECONDS,
) -> str:
    """The guard for these file systems and snapshots, as shell text."""
    for plan in snapshots:
        if not (_LVM_WORD.fullmatch(plan.group) and _LVM_WORD.fullmatch(plan.volume) and _NAME.fullmatch(plan.name)):
            raise ValueError(f"{plan.group}/{plan.volume} is no LVM name")
    cases = " ".join(f"{n}) M={shlex.quote(mount)};;" for n, mount in enumerate(mounts))
    plans = " ".join(
        f"{n}) V={plan.group} L={plan.volume} S={plan.name} D={shlex.quote(plan.device_name)} E={plan.extents};;"
        for n, plan in enumerate(snapshots)
    )
    values = {
        "CONFIG": shlex.quote(_LVM_CONFIG),
        "MOUNTS": cases,
        "SNAPSHOTS": plans,
        "MOUNT_NUMBERS": " ".join(str(n) for n in range(len(mounts))),
        "SNAPSHOT_NUMBERS": " ".join(str(n) for n in range(len(snapshots))),
        "SILENCE": str(silence),
        "FREEZE": str(freeze),
        "ACT": str(act),
        "TRIES": str(2 * silence),
    }
    return re.sub(r"@([A-Z_]+)@", lambda match: values[match[1]], _SCRIPT)


class Guard:
    """The collector's side of a guard; a context manager, leaving it ends the guard and waits until it has cleaned up. Thread-safe.

    ``lost`` is called once, from another thread, when the snapshots can no longer be trusted: one overflowed, or the guard is gone.
    """

    def __init__(
        self,
        process: RemoteProcess,
        host: str,
        snapshots: Sequence[SnapshotPlan],
        *,
        silence: int,
        lost: Callable[[str], None],
    ) -> None:
        self._process, self._host, self._snapshots = process, host, snapshots
        self._lost = lost
        # Beyond its silence the guard ends itself there: who then still waits for an answer waits in vain.
        self._beat_answer = max(silence, _LEAST_ANSWER_SECONDS)
        self._lock = threading.Lock()
        self._rest = b""
        self._stopped = threading.Event()
        self._closed = False
        self.failure = ""
        self.leftovers: list[str] = []
        self.fill = 0.0
        self._pulse = threading.Thread(target=self._beat, args=(silence / 6,), name="guard-beat", daemon=True)

    @classmethod
    def start(
        cls,
        session: Session,
        run: str,
        mounts: Sequence[str],
        snapshots: Sequence[SnapshotPlan],
        *,
        silence: int = SILENCE_SECONDS,
        freeze: int = FREEZE_SECONDS,
        lost: Callable[[str], None] = lambda _: None,
    ) -> Guard:
        """Start a guard for ``mounts`` and ``snapshots``; nothing is frozen or made yet."""
        text = script(mounts, snapshots, silence=silence, freeze=freeze)
        process = session.start(["sh", "-c", text, f"p2v-guard-{run}"], root=True, silence=ACT_SECONDS)
        guard = cls(process, session.host, snapshots, silence=silence, lost=lost)
        try:
            guard._expect("ready")
        except BaseException:
            process.kill()
            raise
        guard._pulse.start()
        return guard

    def freeze(self) -> None:
        """Freeze the file systems; ``ConsistencyError`` when one cannot be."""
        self._ask("freeze", "a file system cannot be frozen")

    def thaw(self) -> None:
        """Thaw them; ``ConsistencyError`` when they were thawed before (deadline, administrator): what was read may be torn."""
        self._ask("thaw", "the freeze did not last until all was read")

    def sync(self) -> None:
        """Write the host's dirty pages to its disks."""
        self._ask("sync", "sync failed")

    def snapshot(self) -> float:
        """Make the snapshots; returns the seconds between the first and the last. ``ConsistencyError`` when LVM refuses."""
        lines = self._ask("snapshot", "a snapshot cannot be made")
        times = [float(line.split()[2]) for line in lines if re.fullmatch(r"made \d+ [\d.]+", line)]
        return max(times) - min(times) if times else 0.0

    def check(self) -> None:
        """Ask for the snapshots' state now; ``ConsistencyError`` when one of them is no longer whole."""
        if not self._closed and not self.failure:
            self._look(self._ask("beat", "the guard does not answer"))
        if self.failure:
            raise self.error()

    def error(self) -> ConsistencyError:
        """What is raised instead of data once the snapshots are lost."""
        return ConsistencyError(
            f"the snapshots on {self._host} are lost: {self.failure}",
            advice="Give the volume group more free extents or capture at a time with fewer writes, then run the command again.",
            subject=self._host,
        )

    def _look(self, lines: Sequence[str]) -> None:
        for line in lines:
            match = re.fullmatch(r"state (\d+) (.*)", line)
            if match is None or int(match[1]) >= len(self._snapshots):
                continue
            plan = self._snapshots[int(match[1])]
            usage = re.search(r" snapshot (\d+)/(\d+)", match[2])
            if usage is not None:
                self.fill = max(self.fill, int(usage[1]) / max(int(usage[2]), 1))
            elif " snapshot " in match[2]:
                self._fail(f"the snapshot of {plan.group}/{plan.volume} overflowed ({match[2].split()[-1]})")
            else:
                self._fail(f"the snapshot of {plan.group}/{plan.volume} is gone ({match[2][-100:]})")

    def _fail(self, why: str) -> None:
        if not self.failure and not self._closed:
            self.failure = why
            self._lost(why)

    def _beat(self, interval: float) -> None:
        made = False
        while not self._stopped.wait(interval):
            try:
                lines = self._ask("beat", "the guard does not answer")
            except ToolkitError as error:
                self._fail(error.message)
                return
            # before they are made the snapshots' devices are missing
            made = made or any(" snapshot " in line for line in lines)
            if made:
                self._look(lines)

    def _ask(self, command: str, trouble: str) -> list[str]:
        with self._lock:
            if self._closed:
                return []
            self._process.settimeout(self._beat_answer if command == "beat" else ACT_SECONDS)
            try:
                self._process.write(f"{command}\n".encode())
            except CommandError as error:
                raise self._ended() from error
            lines = self._expect(f"done {command} ")
        if not lines[-1].endswith(" 0"):
            said = (
                "; ".join(line.removeprefix("error ") for line in lines if line.startswith("error "))
                or "no reason was given"
            )
            raise ConsistencyError(
                f"{trouble} on {self._host}: {said}",
                advice="See the message above; without a snapshot the copy is fuzzy.",
                subject=self._host,
            )
        return lines

    def _expect(self, start: str) -> list[str]:
        """Lines up to the one that starts so."""
        lines: list[str] = []
        while True:
            line = self._line()
            if line is None:
                raise self._ended()
            lines.append(line)
            if line.startswith(start):
                return lines
            if len(lines) > 10_000:
                raise ConsistencyError(f"the guard on {self._host} answers nonsense", subject=self._host)

    def _ended(self) -> ConsistencyError:
        return ConsistencyError(
            f"the guard on {self._host} ended: {self._process.stderr_tail()[-300:] or 'it was killed'}",
            advice="It has thawed and removed what it made. Run the command again.",
            subject=self._host,
        )

    def _line(self) -> str | None:
        while b"\n" not in self._rest:
            piece = self._process.read(65536)
            if not piece or len(self._rest) > 1 << 20:
                return None
            self._rest += piece
        line, _, self._rest = self._rest.partition(b"\n")
        return line.decode("utf-8", "replace")

    def abandon(self) -> None:
        """The link is cut: let the guard find out by itself and clean up there; waits for nothing."""
        self._stopped.set()
        self._closed = True
        self._process.kill()

    def close(self) -> None:
        """End the guard and wait for what it removed; idempotent. What it could not remove is in ``leftovers``."""
        self._stopped.set()
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._process.settimeout(_ANSWER_SECONDS)
            with contextlib.suppress(ToolkitError):
                self._process.write(b"end\n")
            self._process.close_input()
            deadline = time.monotonic() + _ANSWER_SECONDS
            with contextlib.suppress(LinkLostError):
                while time.monotonic() < deadline and (line := self._line()) is not None:
                    if line.startswith("left "):
                        self.leftovers.append(line.removeprefix("left "))
            self._process.kill()
        if self._pulse.is_alive() and threading.current_thread() is not self._pulse:
            self._pulse.join(5.0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def cleanup(session: Session) -> tuple[list[str], list[str]]:
    """Remove snapshots that killed runs left and that no living guard holds: (what was removed, what could not be, with the reason)."""
    text = _CLEANUP.replace("@CONFIG@", shlex.quote(_LVM_CONFIG))
    result = session.run("sh -s", root=True, input=text.encode(), timeout=_ANSWER_SECONDS)
    lines = result.text.splitlines()
    removed = [line.removeprefix("removed ") for line in lines if line.startswith("removed ")]
    kept = [line.partition(" ")[2] for line in lines if line.startswith(("left ", "held "))]
    return removed, kept
