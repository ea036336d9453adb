"""The command as a script meets it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

_MAIN = "from backup.cli import main; main()"


class Shell:
    """Runs p2v-backup as a process of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {
            **os.environ,
            "P2V_REPOSITORY": str(folder / "repository"),
            "P2V_PASSWORD": "correct horse",
            "XDG_CACHE_HOME": str(folder / "cache"),
            "XDG_STATE_HOME": str(folder / "state"),
            "PYTHONPATH": str(Path(__file__).parents[2]),
        }

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", _MAIN, *arguments]
        return subprocess.Popen(
            command, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def __call__(
        self, *arguments: str, expect: int = 0, place: Path | None = None, **environment: str
    ) -> dict[str, Any]:
        before = dict(self.environment)
        self.environment |= environment | ({"P2V_REPOSITORY": str(place)} if place else {})
        try:
            process = self.start(*arguments, "--json")
        finally:
            self.environment = before
        out, err = process.communicate(timeout=240)
        assert process.returncode == expect, err
        document: dict[str, Any] = json.loads(out)
        assert document["exit_code"] == expect
        assert "correct horse" not in out + err
        return document
