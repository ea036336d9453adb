"""`python -m tests.machines build|run|list`: make the test machines and boot one by hand."""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
import time
from pathlib import Path

from tests.machines.builder import build, cache_folder, keys, machine_key
from tests.machines.errors import MachineError
from tests.machines.physical import PhysicalMachine
from tests.machines.recipe import RECIPES


def _report(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _list() -> None:
    cache = cache_folder()
    machine_keys = keys(cache)
    for recipe in RECIPES.values():
        entry = cache / f"{recipe.name}-{machine_key(recipe, machine_keys)}"
        print(f"{recipe.name}\t{entry / 'disk.raw' if entry.is_dir() else '(not built)'}")


def _run(name: str, port: int, overlay: Path | None) -> None:
    machine = build(RECIPES[name], report=_report)
    _report(f"booting {name} ...")
    start = time.monotonic()
    with PhysicalMachine(machine, port=port, overlay=overlay) as physical:
        _report(f"up after {time.monotonic() - start:.0f} s; console: {physical.console}; Ctrl-C cuts the power")
        print(shlex.join(physical.ssh_command()), flush=True)
        signal.pause()


def main() -> int:
    """Run the command line and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.machines", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (("build", "make a machine's disk and print its path"), ("run", "boot a machine and wait")):
        command = commands.add_parser(name, help=text)
        command.add_argument("recipe", choices=sorted(RECIPES))
        if name == "run":
            command.add_argument("--port", type=int, default=0, help="SSH port on 127.0.0.1 (default: a free one)")
            command.add_argument("--overlay", type=Path, help="qcow2 overlay that keeps what is written")
    commands.add_parser("list", help="list the machines and where they are")
    arguments = parser.parse_args()
    try:
        if arguments.command == "list":
            _list()
        elif arguments.command == "build":
            print(build(RECIPES[arguments.recipe], report=_report).disk)
        else:
            _run(arguments.recipe, arguments.port, arguments.overlay)
    except MachineError as error:
        _report(str(error))
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
