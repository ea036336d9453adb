"""The text of LVM's metadata: ``key = value`` and ``name { ... }``, parsed within bounds.

Facts: ``man 5 lvm.conf`` (the syntax is the same) and lvm2 ``lib/config``. Numbers are decimal integers; floats occur
in no field read here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TypeAlias

from formats.errors import ImageError

Value: TypeAlias = int | str | list[int | str]
TextSection: TypeAlias = "dict[str, Value | TextSection]"

TEXT_MOST = 16 << 20
_DEPTH_MOST = 16

_TOKEN = re.compile(
    r"""(?P<space>\s+|\#[^\n]*)
    |(?P<text>"(?:[^"\\]|\\.)*")
    |(?P<number>-?[0-9]{1,20}(?:\.[0-9]{1,20})?(?![A-Za-z0-9_.+-]))
    |(?P<word>[A-Za-z0-9_.+-][A-Za-z0-9_.+/:@-]*)
    |(?P<mark>[={}\[\],])""",
    re.VERBOSE | re.DOTALL,
)
_ESCAPED = re.compile(r"\\(.)", re.DOTALL)


class LvmTextError(ImageError):
    """LVM's metadata text does not follow its grammar, or is out of bounds."""


def parse(text: str) -> TextSection:
    """The sections and values of the text; ``LvmTextError`` when it is malformed, too long or nested too deeply."""
    if len(text) > TEXT_MOST:
        raise LvmTextError(f"the LVM metadata has {len(text)} characters, more than {TEXT_MOST}")
    tokens = _Tokens(text)
    section = _section(tokens, 0)
    if tokens.kind:
        raise tokens.error("something follows the last section")
    return section


class _Tokens:
    """The text's tokens, one at a time: ``kind`` is empty at the end."""

    def __init__(self, text: str) -> None:
        self._stream = self._scan(text)
        self.kind = ""
        self.text = ""
        self.position = 0
        self.step()

    def _scan(self, text: str) -> Iterator[tuple[str, str, int]]:
        position = 0
        while position < len(text):
            match = _TOKEN.match(text, position)
            if match is None:
                raise LvmTextError(f"the LVM metadata is malformed at character {position}")
            if match.lastgroup != "space":
                yield match.lastgroup or "", match.group(), position
            position = match.end()

    def step(self) -> None:
        """Go to the next token."""
        self.kind, self.text, self.position = next(self._stream, ("", "", self.position))

    def take(self, mark: str) -> bool:
        """Step over ``mark`` if it is next."""
        if self.kind == "mark" and self.text == mark:
            self.step()
            return True
        return False

    def error(self, what: str) -> LvmTextError:
        """The error that says what is wrong here."""
        return LvmTextError(f"the LVM metadata is malformed at character {self.position}: {what}")


def _section(tokens: _Tokens, depth: int) -> TextSection:
    if depth > _DEPTH_MOST:
        raise tokens.error("its sections are nested too deeply")
    section: TextSection = {}
    while tokens.kind in ("word", "number", "text"):
        name = _unquoted(tokens.text) if tokens.kind == "text" else tokens.text
        tokens.step()
        if name in section:
            raise tokens.error(f"{name!r} is there twice")
        if tokens.take("{"):
            section[name] = _section(tokens, depth + 1)
            if not tokens.take("}"):
                raise tokens.error("a section is not closed")
        elif tokens.take("="):
            section[name] = _value(tokens)
        else:
            raise tokens.error("'=' or '{' is missing")
    return section


def _value(tokens: _Tokens) -> Value:
    if not tokens.take("["):
        return _scalar(tokens)
    items: list[int | str] = []
    while not tokens.take("]"):
        items.append(_scalar(tokens))
        if not tokens.take(",") and not (tokens.kind == "mark" and tokens.text == "]"):
            raise tokens.error("a list is not closed")
    return items


def _scalar(tokens: _Tokens) -> int | str:
    kind, text = tokens.kind, tokens.text
    if kind == "text":
        tokens.step()
        return _unquoted(text)
    if kind == "number":
        tokens.step()
        return text if "." in text else int(text)
    raise tokens.error("a value is missing")


def _unquoted(text: str) -> str:
    return _ESCAPED.sub(r"\1", text[1:-1])


def number(section: Mapping[str, Value | TextSection], key: str) -> int:
    """The number under ``key``, at least 0; ``LvmTextError`` if there is none."""
    value = section.get(key)
    if not isinstance(value, int) or value < 0:
        raise LvmTextError(f"the LVM metadata has no number {key!r} where one belongs")
    return value


def text(section: Mapping[str, Value | TextSection], key: str) -> str:
    """The text under ``key``; ``LvmTextError`` if there is none."""
    value = section.get(key)
    if not isinstance(value, str):
        raise LvmTextError(f"the LVM metadata has no text {key!r} where one belongs")
    return value


def words(section: Mapping[str, Value | TextSection], key: str) -> tuple[str, ...]:
    """The list of texts under ``key``; empty if there is none."""
    value = section.get(key)
    return tuple(str(item) for item in value) if isinstance(value, list) else ()


def subsections(section: Mapping[str, Value | TextSection], key: str = "") -> dict[str, TextSection]:
    """The named sections under ``key``, or in the section itself."""
    inner = section.get(key, {}) if key else section
    if not isinstance(inner, dict):
        raise LvmTextError(f"the LVM metadata has no section {key!r} where one belongs")
    return {name: value for name, value in inner.items() if isinstance(value, dict)}
