"""What one reading of a tensor says of it."""

from __future__ import annotations

from typing import NamedTuple


class Facts(NamedTuple):
    """What pass 1 learns of a tensor: its digest (32 bytes); for floats, (count, first index) of NaN and infinity."""

    digest: bytes
    nonfinite: tuple[int, int] | None
