"""Makes a golden repository: ``python -m tests.backup.golden FOLDER``. Done once for each version of the format, and kept for ever."""

from __future__ import annotations

import hashlib
import json
import random
import sys
from pathlib import Path

from backup.check import add_record
from backup.store.local import LocalStore
from tests.backup.repositories import PASSWORD, back_up, contents, new_repository, opened
from tests.fakes.tracked_origin import TrackedOrigin


def make(folder: Path) -> None:
    """Two points of two disks: random and compressible data, zeroes, two spans, a short end, growth, a record, a second key."""
    root = folder / "repository"
    root.mkdir(parents=True)
    store = LocalStore(root)
    new_repository(store)
    generator = random.Random(1)
    origin = TrackedOrigin({"boot": (16 << 20) + 5 * 512, "data": 300_000})
    origin.write("boot", generator.randbytes(20_000), 0)
    origin.write("boot", b"text that compresses " * 5000, 3 << 20)
    origin.write("boot", generator.randbytes(3000), (16 << 20) - 700)
    origin.write("data", generator.randbytes(10_000), 290_000)
    points = {}
    first = back_up(store, origin)
    points[first.name] = contents(origin)
    origin.grow("data", 400_000)
    origin.write("data", b"the end", 399_993)
    origin.write("boot", bytes(4096), 3 << 20)
    second = back_up(store, origin, first)
    points[second.name] = contents(origin)
    repository = opened(store)
    add_record(repository, first, {"kind": "verified", "time": "2026-01-01T00:00:00+00:00"})
    facts = {
        "password": PASSWORD.reveal(),
        "paper": repository.keyring.paper(),
        "points": {
            name: {disk: hashlib.sha256(content).hexdigest() for disk, content in disks.items()}
            for name, disks in points.items()
        },
    }
    (folder / "facts.json").write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    make(Path(sys.argv[1]))
