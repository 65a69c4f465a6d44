"""Items in batches: as many together as a message takes, or may be on their way at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")


def batches(
    items: Iterable[Item], nbytes: Callable[[Item], int], *, bytes_max: int, count_max: int
) -> Iterator[list[Item]]:
    """Batches of at most so many items and bytes; an item that is larger alone is one by itself.

    >>> list(batches([3, 3, 9, 1], int, bytes_max=6, count_max=10))
    [[3, 3], [9], [1]]
    """
    batch: list[Item] = []
    room = bytes_max
    for item in items:
        room -= nbytes(item)
        if batch and (room < 0 or len(batch) == count_max):
            yield batch
            batch, room = [], bytes_max - nbytes(item)
        batch.append(item)
    if batch:
        yield batch
