"""The error trees of all packages: one class owns one exit code, and both its docstring and the README say which."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from formats.errors import Notice, ToolkitError

_MODULES = [name for name in ("formats.errors", "p2v.errors", "backup.errors") if importlib.util.find_spec(name)]
_README = Path(__file__).parents[2] / "README.md"
_BY_DESIGN = {0, 3, 4, 5}  # results of a command, not errors: no class stands for them


def _classes() -> Iterator[type[ToolkitError]]:
    for name in _MODULES:
        module = importlib.import_module(name)
        for _, found in inspect.getmembers(module, inspect.isclass):
            if issubclass(found, ToolkitError) and found.__module__ == name:
                yield found


_OWNERS = [found for found in _classes() if "exit_code" in vars(found)]
_ids = [found.__name__ for found in _OWNERS]


def _documented() -> dict[int, str]:
    """The rows of the README's table of exit codes; a row may state a range."""
    section = re.search(r"^#+ Exit codes$(.*?)(?=^#+ |\Z)", _README.read_text(), re.MULTILINE | re.DOTALL)
    assert section, "README.md has no section 'Exit codes'"
    rows = re.findall(r"^\|\s*`?(\d+)`?\s*\|(.+)\|\s*$", section[1], re.MULTILINE)
    assert len({code for code, _ in rows}) == len(rows), "a code is documented twice"
    return {int(code): text.strip() for code, text in rows}


def test_no_two_classes_share_an_exit_code() -> None:
    codes = [found.exit_code for found in _OWNERS]
    assert sorted(codes) == sorted(set(codes))


@pytest.mark.parametrize("found", _OWNERS, ids=_ids)
def test_a_code_stays_in_its_packages_range(found: type[ToolkitError]) -> None:
    ranges = {
        "formats.errors": {1, 2, 13, 130, *range(20, 30)},
        "p2v.errors": {*range(30, 40), 70, 71},
        "backup.errors": {5, 10, 11, 12, *range(40, 50)},
    }
    assert found.exit_code in ranges[found.__module__]
    assert found.exit_code not in {0, 3, 4}


@pytest.mark.parametrize("found", _OWNERS, ids=_ids)
def test_the_docstring_names_the_code(found: type[ToolkitError]) -> None:
    if found is ToolkitError:
        return
    assert f"(exit {found.exit_code})" in (found.__doc__ or "")


@pytest.mark.parametrize("found", _OWNERS, ids=_ids)
def test_the_readme_documents_the_code(found: type[ToolkitError]) -> None:
    assert _documented().get(found.exit_code), f"README.md, section 'Exit codes': no row for {found.exit_code}"


def test_the_readme_documents_nothing_else() -> None:
    known = {found.exit_code for found in _classes()} | _BY_DESIGN
    # Codes of the design whose class comes with its package.
    coming = {10, 11, 12, *range(40, 50)}
    assert _documented().keys() <= known | coming
    assert {0, 2, 3, 130} <= _documented().keys()


@pytest.mark.parametrize("found", list(_classes()), ids=lambda found: found.__name__)
def test_facts_advice_and_subject_are_kept(found: type[ToolkitError]) -> None:
    error = found("facts", advice="what to do", subject="disk")
    assert (str(error), error.message, error.advice, error.subject) == ("facts", "facts", "what to do", "disk")
    assert found("facts").advice == found("facts").subject == ""


def test_every_error_is_caught_as_one() -> None:
    for found in _classes():
        with pytest.raises(ToolkitError):
            raise found("facts")


def test_a_notice_is_a_record() -> None:
    notice = Notice(code="some-thing", message="seen")
    assert notice == Notice(code="some-thing", message="seen", advice="", subject="")
    with pytest.raises(AttributeError):
        notice.code = "other"  # type: ignore[misc]
