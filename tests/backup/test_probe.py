"""P23: the storage is asked for what a repository relies on; each guarantee that it breaks is named."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from backup.errors import StoreError
from backup.store.base import NameTakenError, Store, Stored
from backup.store.layers import Faulty
from backup.store.local import LocalStore
from backup.store.memory import MemoryStore
from backup.store.probe import probe, require


class Partial(MemoryStore):
    """Writes in place: what fails in the middle stays."""

    def store(self, name: str, data: Iterable[bytes | memoryview]) -> None:
        parts: list[bytes] = []
        try:
            for part in data:
                parts.append(bytes(part))
        finally:
            super().store(name, parts)


class Late(MemoryStore):
    """A listing that shows an object only after the next one was stored."""

    def list(self, prefix: str) -> Iterator[Stored]:
        return iter(list(super().list(prefix))[:-1])


class Overwriting(MemoryStore):
    """rename(2): the last writer wins."""

    def store(self, name: str, data: Iterable[bytes | memoryview]) -> None:
        self.objects[name] = b"".join(data)


class Racing(MemoryStore):
    """Looks whether the name is taken, and writes a moment later."""

    def store(self, name: str, data: Iterable[bytes | memoryview]) -> None:
        taken = name in self.objects
        time.sleep(0.002)
        if taken:
            raise NameTakenError(name)
        self.objects[name] = b"".join(data)


class Short(MemoryStore):
    """Answers a range past the end with what there is."""

    def load(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        content = super().load(name)
        return content[offset:] if length is None else content[offset : offset + length]


class Paged(MemoryStore):
    """Forgets all pages of a listing but the first."""

    def list(self, prefix: str) -> Iterator[Stored]:
        return iter(list(super().list(prefix))[:100])


class Lingering(MemoryStore):
    """Deletes later."""

    def delete(self, name: str) -> None:
        if name.endswith("/gone") and self.objects.get(name) == b"x":
            return
        super().delete(name)


@pytest.mark.parametrize(
    ("store", "guarantee", "seen"),
    [
        (Partial(), "T1", "whose writing failed"),
        (Late(), "T2", "right after it was stored"),
        (Overwriting(), "T3", "overwritten"),
        (Racing(), "T3", "were told that they had it"),
        (Short(), "T4", "not refused"),
        (Paged(), "T5", "lacks"),
        (Lingering(), "T6", "after it was deleted"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, MemoryStore) else "",
)
def test_p23_what_a_storage_breaks_is_named(store: MemoryStore, guarantee: str, seen: str) -> None:
    broken = probe(store)
    assert (guarantee, True) in [(number, seen in text) for number, text in broken]
    with pytest.raises(StoreError, match=seen) as caught:
        require(store)
    assert "Use another storage" in caught.value.advice


def test_p23_a_good_storage_has_no_faults_and_keeps_nothing(tmp_path: Path) -> None:
    stores: list[Store] = [MemoryStore(), LocalStore(tmp_path)]
    for store in stores:
        assert probe(store) == []
        assert list(store.list("")) == []
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_p23_a_storage_that_fails_outright_says_so() -> None:
    def fail(operation: str, name: str, _when: str) -> None:
        if operation == "store" and name.endswith("large"):
            raise StoreError("quota exceeded")

    below = MemoryStore()
    with pytest.raises(StoreError, match="quota exceeded"):
        probe(Faulty(below, fail))
    assert below.objects == {}


def test_p23_on_the_command_line(tmp_path: Path) -> None:
    from tests.backup.shell import Shell

    shell = Shell(tmp_path)
    done = shell("init", "--probe")
    assert [stage["name"] for stage in done["data"]["stages"]] == ["probe"]
    assert shell("points")["data"]["points"] == []
