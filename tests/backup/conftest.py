"""What several modules of these tests use."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.backup.shell import Shell


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    """The command, with a repository made for it."""
    made = Shell(tmp_path)
    made("init")
    return made
