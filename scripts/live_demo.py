"""What scripts/demo runs once the machine is set up."""

from __future__ import annotations

import contextlib
import json
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tests.machines.builder import build
from tests.machines.physical import PhysicalMachine
from tests.machines.recipe import RECIPES

P2V = Path(sys.executable).with_name("p2v")
_TIMES: list[tuple[str, float]] = []


def main() -> int:
    """Run the demonstration; 0 when every verdict was boots/pass."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.mkdtemp(prefix="p2v-demo-"))
    started = time.monotonic()
    print(
        f"results go to {folder}; {platform.processor() or platform.machine()}, Python {platform.python_version()}",
        flush=True,
    )
    with step("build the source machine (cached after the first time)"):
        built = build(RECIPES["bios-lvm"], report=_tell)
    with contextlib.ExitStack() as stack:
        with step("boot it as the physical source"):
            source = stack.enter_context(PhysicalMachine(built))
        source.start_writer()
        connection = ["--identity", str(source.identity), "--known-hosts", str(source.known_hosts)]
        address = f"ssh://root@127.0.0.1:{source.ssh_port}"
        run("inspect", address, *connection)
        codes = [
            run("convert", address, "--to", "libvirt", "-o", str(folder / "libvirt"), *connection),
        ]
        left = source.run("lvs --noheadings -o lv_name; pgrep -fa p2v || true").stdout
        print(f"left on the source: {' '.join(str(left).split())}")
        print(f"the writer had {len(source.stop_writer())} changes acknowledged meanwhile")
    # The same machine for another platform: from the folder, without asking the source again.
    codes.append(run("convert", str(folder / "libvirt"), "--to", "vmware-workstation", "-o", str(folder / "vmware")))
    codes += [run("boot", str(folder / "libvirt")), run("boot", str(folder / "vmware"))]
    print("\nwall time")
    for name, seconds in [*_TIMES, ("all", time.monotonic() - started)]:
        print(f"  {seconds:7.1f} s  {name}")
    for name in ("libvirt", "vmware"):
        show_result(folder / name)
    print("every step ended well" if not any(codes) else f"exit codes: {codes}")
    return max(codes)


def show_result(folder: Path) -> None:
    """The verdict and the stages that the conversion recorded in the folder."""
    record = json.loads((folder / "machine.json").read_bytes())
    verdict = record["verdict"]
    print(
        f"\n{folder}: verdict {verdict['level']}/{verdict['result']}; {', '.join(sorted(p.name for p in folder.iterdir()))}"
    )
    for stage in record["stages"]:
        print(f"  {stage['seconds']:7.1f} s  {stage['name']}{': ' + stage['detail'] if stage['detail'] else ''}")


def run(*words: str) -> int:
    """Run a p2v command as a user would, with its output on the terminal."""
    print(f"\n$ p2v {shlex.join(words)}", flush=True)
    with step(f"p2v {words[0]} {' '.join(words[2:4]) if words[0] == 'convert' else ''}".strip()):
        return subprocess.run([P2V, *words], check=False).returncode


@contextlib.contextmanager
def step(name: str) -> Iterator[None]:
    """Time one step."""
    started = time.monotonic()
    try:
        yield
    finally:
        _TIMES.append((name, time.monotonic() - started))


def _tell(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
