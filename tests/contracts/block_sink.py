"""What every ``BlockSink`` must do: K1 to K7 of ``formats.block``, one test or more for each number.

An implementation's test module inherits ``BlockSinkContract`` and gives one fixture:

    class TestMine(BlockSinkContract):
        @pytest.fixture
        def made(self, tmp_path):         # a new sink of ``SIZE`` bytes, and a way to read what it stored by another route
            ...
            yield Made(sink, lambda: path.read_bytes())

``Made.content`` is called after ``flush`` and ``close``. Tests of random access skip on a sequential sink and the other way round.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from formats.block import BlockSink
from tests.contracts.block_source import MIB

SIZE = 4 * MIB + 3 * 65536 + 512
"""Bytes of the sink under test: whole sectors, but no whole number of grains, clusters or pages."""


@dataclass(frozen=True, slots=True)
class Made:
    """A new sink, and how to read what was stored in it after it was flushed and closed."""

    sink: BlockSink
    content: Callable[[], bytes]

    def stored(self) -> bytes:
        """Flush, close and read back."""
        self.sink.flush()
        self.sink.close()
        return self.content()


def noise(length: int, seed: int = 0) -> bytes:
    """Bytes that are not zero and do not compress."""
    return random.Random(seed).randbytes(length)


class BlockSinkContract:
    """Inherit, and give the fixture ``made``."""

    @pytest.fixture
    def made(self) -> Iterator[Made]:
        """A new sink of ``SIZE`` bytes."""
        raise NotImplementedError

    @pytest.fixture
    def sink(self, made: Made) -> BlockSink:
        """The sink alone."""
        return made.sink

    def test_is_a_block_sink(self, sink: BlockSink) -> None:
        assert isinstance(sink, BlockSink)
        assert sink.size == SIZE

    def test_k1_ascending_writes_are_stored_whole(self, made: Made) -> None:
        expected = bytearray(SIZE)
        position = 0
        for number, length in enumerate([512, 65536, 131072 - 512, MIB, 65536]):
            data = noise(length, number)
            made.sink.write(memoryview(data), position)
            expected[position : position + length] = data
            position += length
        tail = noise(SIZE - 4 * MIB, 9)
        made.sink.write(memoryview(tail), 4 * MIB)
        expected[4 * MIB :] = tail
        assert made.stored() == expected

    def test_k1_unaligned_writes_are_stored_whole(self, made: Made) -> None:
        _random_access_only(made.sink)
        expected = bytearray(SIZE)
        for start, length in [(1, 1), (511, 2), (65535, 65538), (3 * MIB + 77, 100_003), (SIZE - 1, 1), (5000, 0)]:
            data = noise(length, start)
            made.sink.write(memoryview(data), start)
            expected[start : start + length] = data
        assert made.stored() == expected

    def test_k1_the_buffer_is_the_callers_again(self, made: Made) -> None:
        buffer = bytearray(noise(65536))
        made.sink.write(memoryview(buffer), 0)
        kept = bytes(buffer)
        buffer[:] = bytes(65536)
        assert made.stored()[:65536] == kept

    def test_k2_zeroed_ranges_read_as_zeroes(self, made: Made) -> None:
        data = noise(65536)
        made.sink.zero(0, 65536)
        made.sink.write(memoryview(data), 65536)
        made.sink.zero(2 * 65536, SIZE - 2 * 65536)
        assert made.stored() == bytes(65536) + data + bytes(SIZE - 2 * 65536)

    def test_k2_zero_wipes_what_was_written(self, made: Made) -> None:
        _random_access_only(made.sink)
        expected = bytearray(noise(SIZE))
        made.sink.write(memoryview(bytes(expected)), 0)
        wiped = [(0, 1), (1000, 5000), (MIB - 1, MIB + 2), (3 * MIB, 65536), (SIZE - 513, 513), (4 * MIB + 5, 0)]
        for start, length in wiped:
            made.sink.zero(start, length)
            expected[start : start + length] = bytes(length)
        assert made.stored() == expected

    @pytest.mark.parametrize(("start", "length"), [(-1, 1), (SIZE, 1), (SIZE - 512, 1024), (1, SIZE), (1 << 70, 1)])
    def test_k3_a_range_outside_raises_and_writes_nothing(self, made: Made, start: int, length: int) -> None:
        with pytest.raises(ValueError, match="outside"):
            made.sink.write(memoryview(noise(length)), start)
        with pytest.raises(ValueError, match="outside"):
            made.sink.zero(start, length)
        assert made.stored() == bytes(SIZE)

    def test_k4_a_new_sink_reads_as_zeroes(self, made: Made) -> None:
        assert made.stored() == bytes(SIZE)

    def test_k4_what_lies_between_writes_reads_as_zeroes(self, made: Made) -> None:
        made.sink.write(memoryview(noise(65536)), 65536)
        made.sink.write(memoryview(noise(65536)), 3 * MIB)
        stored = made.stored()
        expected = bytearray(SIZE)
        expected[65536:131072] = expected[3 * MIB : 3 * MIB + 65536] = noise(65536)
        assert stored == expected

    def test_k5_after_flush_everything_can_be_read_by_another_route(self, made: Made) -> None:
        data = noise(MIB)
        made.sink.write(memoryview(data), 0)
        made.sink.flush()
        if made.sink.random_access:
            made.sink.write(memoryview(data), MIB)
            made.sink.flush()
            data += data
        made.sink.close()
        assert made.content() == data + bytes(SIZE - len(data))

    def test_k6_any_order_any_number_of_times(self, made: Made) -> None:
        _random_access_only(made.sink)
        generator = random.Random(6)
        expected = bytearray(SIZE)
        for number in range(80):
            start = generator.randrange(SIZE)
            length = generator.randrange(min(SIZE - start, 1 << generator.randrange(1, 21)) + 1)
            if number % 3 == 2:
                made.sink.zero(start, length)
                expected[start : start + length] = bytes(length)
            else:
                data = noise(length, number)
                made.sink.write(memoryview(data), start)
                expected[start : start + length] = data
        assert made.stored() == expected

    def test_k6_several_threads_write_at_once(self, made: Made) -> None:
        _random_access_only(made.sink)
        step = 3 * 512 * 7 + 5  # neighbours share sectors, clusters and pages
        wrong: list[BaseException] = []

        def work(worker: int) -> None:
            try:
                for number in range(worker, SIZE // step, 6):
                    if number % 5 == 0:
                        made.sink.zero(number * step, step)
                    else:
                        made.sink.write(memoryview(noise(step, number)), number * step)
            except BaseException as error:
                wrong.append(error)

        threads = [threading.Thread(target=work, args=(worker,)) for worker in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []
        parts = [bytes(step) if number % 5 == 0 else noise(step, number) for number in range(SIZE // step)]
        assert made.stored() == b"".join(parts).ljust(SIZE, b"\0")

    def test_k6_a_sequential_sink_refuses_to_go_back(self, made: Made) -> None:
        if made.sink.random_access:
            pytest.skip("random access")
        data = noise(65536)
        made.sink.write(memoryview(data), MIB)
        for start in (0, MIB - 512, MIB, MIB + 512):
            with pytest.raises(ValueError, match=r"."):
                made.sink.write(memoryview(noise(512, 3)), start)
        made.sink.zero(2 * MIB, 65536)
        with pytest.raises(ValueError, match=r"."):
            made.sink.zero(MIB, 512)
        made.sink.write(memoryview(data), 3 * MIB)
        expected = bytearray(SIZE)
        expected[MIB : MIB + 65536] = expected[3 * MIB : 3 * MIB + 65536] = data
        assert made.stored() == expected

    def test_k7_close_is_idempotent_and_writing_afterwards_raises(self, sink: BlockSink) -> None:
        sink.write(memoryview(noise(512)), 0)
        sink.close()
        sink.close()
        with pytest.raises((ValueError, OSError)):
            sink.write(memoryview(noise(512)), 512)
        with pytest.raises((ValueError, OSError)):
            sink.zero(1024, 512)
        with pytest.raises((ValueError, OSError)):
            sink.flush()


def _random_access_only(sink: BlockSink) -> None:
    if not sink.random_access:
        pytest.skip("sequential")
