"""Secrets: where they come from, and that they show themselves nowhere."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from formats.errors import UsageError
from p2v.config import Secret, secret

NAME = "P2V_SSH_PASSWORD"


def test_absent_everywhere_is_none() -> None:
    assert secret(NAME, {}) is None


def test_variable_wins_over_file_and_command(tmp_path: Path) -> None:
    env = {NAME: "direct", f"{NAME}_FILE": str(tmp_path / "absent"), f"{NAME}_COMMAND": "false"}
    assert secret(NAME, env) == Secret("direct")


def test_file_gives_its_first_line(tmp_path: Path) -> None:
    path = tmp_path / "password"
    path.write_bytes(b"pa ss\r\nsecond line\n")
    found = secret(NAME, {f"{NAME}_FILE": str(path)})
    assert found is not None
    assert found.reveal() == "pa ss"


def test_command_gives_its_first_line() -> None:
    found = secret(NAME, {f"{NAME}_COMMAND": "printf 'one\\ntwo\\n'"})
    assert found is not None
    assert found.reveal() == "one"


@pytest.mark.parametrize(
    "env",
    [
        {f"{NAME}_FILE": "/nonexistent/password"},
        {f"{NAME}_COMMAND": "false"},
        {f"{NAME}_COMMAND": "'unbalanced"},
        {f"{NAME}_COMMAND": "/nonexistent/program"},
        {f"{NAME}_COMMAND": "true"},
        {f"{NAME}_COMMAND": "head -c 100000 /dev/zero"},
        {f"{NAME}_COMMAND": "printf '\\377'"},
    ],
)
def test_failures_are_usage_errors(env: dict[str, str]) -> None:
    with pytest.raises(UsageError):
        secret(NAME, env)


def test_a_failing_command_does_not_show_its_output() -> None:
    with pytest.raises(UsageError) as caught:
        secret(NAME, {f"{NAME}_COMMAND": "sh -c 'echo hunter2; exit 1'"})
    assert "hunter2" not in f"{caught.value} {caught.value.advice} {caught.value.__cause__}"


def test_a_secret_shows_itself_nowhere() -> None:
    value = Secret("hunter2")
    assert "hunter2" not in f"{value} {value!r} {[value]}"
    assert value == Secret("hunter2")
    assert value != Secret("other")
    with pytest.raises(TypeError):
        pickle.dumps(value)
