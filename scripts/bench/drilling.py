"""What a drill costs on top of the boot itself: from the command to the signal that decides, beside a bare QEMU that boots the same disk.

The bare QEMU is started by hand with what anybody would give it for this disk: the raw image under a snapshot, the same accelerator,
processors, memory, controller and card. Its clock runs from before the start until the login prompt is on its serial port. A drill's clock
runs from before the command until it says that it has seen the same prompt there, and the whole command is shown beside it: that includes
the seconds in which the prompt must stand, the proofs and the report. Both run in turn, so that a busy computer hurts both.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import select
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from p2v.emulator import find_program, proven_accelerator
from tests.machines.builder import build
from tests.machines.recipe import RECIPES

_BACKUP = Path(sys.executable).with_name("p2v-backup")
_PROMPT = re.compile(rb"[\w.-]+ login: ")
_LIMIT = 900.0
_TARGET = 1.1


def main() -> None:
    """Run both in turn and print what they took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument(
        "--machine", choices=[n for n, r in RECIPES.items() if r.firmware == "bios"], default="bios-plain"
    )
    parser.add_argument("--folder", type=Path, default=None, help="where to work; default: the temporary folder")
    options = parser.parse_args()
    disk = build(RECIPES[options.machine]).disk
    print(f"{options.machine}: {disk.stat().st_size >> 20} MiB, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    bare, drilled = [], []
    with tempfile.TemporaryDirectory(prefix="p2v-bench-", dir=options.folder) as work:
        environment = {"P2V_REPOSITORY": f"{work}/repository", "P2V_PASSWORD": "bench", "XDG_STATE_HOME": work}
        os.environ.update(environment)
        image = Path(work, "bench.raw")
        image.symlink_to(disk)
        for words in (("init",), ("backup", str(image))):
            _backup(*words)
        for number in range(options.runs):
            bare.append(bare_boot(disk, Path(work)))
            seen, whole, drill = drill_boot()
            drilled.append(seen)
            print(
                f"run {number + 1}: bare QEMU {bare[-1]:.1f} s; drill {drilled[-1]:.1f} s to the prompt, {whole:.1f} s to the end of "
                f"the command, {drill['bytes_read'] >> 20} MiB read"
            )
    ratio = statistics.median(drilled) / statistics.median(bare)
    print(
        f"{'met   ' if ratio <= _TARGET else 'MISSED'} time to the signal against a bare boot: {ratio:.3f} (target {_TARGET})"
    )


def bare_boot(disk: Path, folder: Path) -> float:
    """Seconds until a QEMU that nobody watches shows the login prompt on its serial port."""
    program = find_program()
    accelerator = proven_accelerator(program).value
    fast = "tcg,thread=multi,tb-size=512" if accelerator == "tcg" else accelerator
    argv = [
        *(str(program.path), "-nodefaults", "-display", "none", "-machine", "pc", "-accel", fast),
        *(
            "-cpu",
            "max,la57=off,svm=off" if accelerator == "tcg" else "host",
            "-smp",
            str(min(2, os.cpu_count() or 1)),
            "-m",
            "1024",
        ),
        *(
            "-drive",
            f"if=none,id=d,snapshot=on,cache=unsafe,format=raw,file={disk}",
            "-device",
            "virtio-blk-pci,drive=d",
        ),
        *("-device", "isa-vga", "-netdev", "user,id=n,restrict=on", "-device", "virtio-net-pci,netdev=n,romfile="),
        *("-serial", "stdio", "-monitor", "none"),
    ]
    began = time.monotonic()
    process = subprocess.Popen(
        argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, env={**os.environ, "TMPDIR": str(folder)}
    )
    seen = b""
    try:
        while time.monotonic() - began < _LIMIT and process.stdout is not None:
            if select.select([process.stdout], [], [], 1)[0]:
                seen = (seen + os.read(process.stdout.fileno(), 65536))[-4096:]
                if _PROMPT.search(seen):
                    return time.monotonic() - began
        raise SystemExit("the bare QEMU did not show its prompt")
    finally:
        process.kill()
        process.wait()


def drill_boot() -> tuple[float, float, dict[str, Any]]:
    """Seconds until a drill says that it saw the prompt, seconds of the whole command, and the drill as its JSON has it."""
    began = time.monotonic()
    process = subprocess.Popen(
        [_BACKUP, "drill", "bench", "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    seen = 0.0
    for line in process.stderr or ():
        if not seen and "login-prompt (serial" in line:
            seen = time.monotonic() - began
    out, _ = process.communicate()
    whole = time.monotonic() - began
    [drill] = json.loads(out)["data"]["drills"]
    if not seen or drill["result"] != "pass":
        raise SystemExit(f"the drill did not pass: {drill['reason']}")
    return seen, whole, drill


def _backup(*words: str) -> dict[str, Any]:
    done = subprocess.run([_BACKUP, *words, "--json", "-q"], stdout=subprocess.PIPE, check=False)
    answer: dict[str, Any] = json.loads(done.stdout)
    if answer["exit_code"]:
        raise SystemExit(f"p2v-backup {words[0]} failed: {answer['errors']}")
    return answer


if __name__ == "__main__":
    main()
