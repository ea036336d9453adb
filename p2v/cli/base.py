"""What every command shares: the application, its common options, and how a command ends."""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import cyclopts
from cyclopts import Parameter

from formats.errors import InterruptedRunError, ToolkitError, UsageError
from p2v.console import Console

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

app = cyclopts.App(
    name="p2v",
    version=lambda: metadata.version("p2v-toolkit"),
    help="Turn a running machine, a virtual machine or a disk image into a VM for any platform that is seen to boot.",
    version_flags=["--version"],
    help_format="markdown",
    default_parameter=Parameter(negative="", show_default=False),
)


@Parameter(name="*")
@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """What every command takes."""

    json: bool = False
    "Print the result as one JSON document on standard output."
    quiet: Annotated[bool, Parameter(alias="-q")] = False
    "Show errors and notices only."
    verbose: Annotated[bool, Parameter(alias="-v")] = False
    "Show what is done in detail; an unexpected error with its traceback."
    log_json: bool = False
    "Write the log on standard error as JSON lines."


@Parameter(name="*")
@dataclass(frozen=True, slots=True, kw_only=True)
class Connection:
    """How an SSH source is reached. Passwords come from P2V_SSH_PASSWORD and P2V_SUDO_PASSWORD (or _FILE, _COMMAND)."""

    identity: Annotated[Path | None, Parameter(alias="-i")] = None
    "Private key for SSH."
    known_hosts: Path | None = None
    "File of known host keys, instead of ~/.ssh/known_hosts. Unknown hosts are refused."


OUTPUT = Output()
CONNECTION = Connection()


def run_app(program: cyclopts.App, arguments: Sequence[str]) -> int:
    """Run one command line of a program and return its exit code; what cannot be parsed is a usage error like any other."""
    try:
        result = program(list(arguments), exit_on_error=False, print_error=False, result_action="return_value")
    except cyclopts.CycloptsError as error:
        program_name = program.name[0]
        name = next((word for word in arguments[:1] if not word.startswith("-")), "")
        usage = UsageError(str(error).strip(), advice=f"See: {' '.join(filter(None, (program_name, name)))} --help")
        return Console(json_output="--json" in arguments).finish(name or program_name, usage)
    return result if isinstance(result, int) else 0


def perform(name: str, output: Output, action: Callable[[Console], int | None]) -> int:
    """Run ``action`` as the command ``name``: every way it can end becomes an exit code and an honest last line."""
    console = Console(json_output=output.json, quiet=output.quiet, verbose=output.verbose, log_json=output.log_json)
    signal.signal(signal.SIGTERM, _terminate)
    signal.signal(signal.SIGHUP, _terminate)
    try:
        return console.finish(name, exit_code=action(console))
    except ToolkitError as error:
        if output.verbose:
            _traceback(console)
        return console.finish(name, error)
    except KeyboardInterrupt:
        return console.finish(name, InterruptedRunError("the run was interrupted; what it held is released"))
    except BrokenPipeError:
        # Whoever read our output has gone: nothing more can be said to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        _traceback(console)
        advice = "This is a defect of the toolkit. Please report it with the lines above."
        return console.finish(name, ToolkitError(f"unexpected error: {type(error).__name__}: {error}", advice=advice))


def _terminate(_number: int, _frame: object) -> None:
    raise KeyboardInterrupt


def _traceback(console: Console) -> None:
    import traceback

    console.log(traceback.format_exc().rstrip(), level="debug")
