"""One thread inside torch: the tests run side by side already. Words of a random stream are drawn once."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest
import torch

from crdtmerge.numerics import philox

torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _words_are_drawn_once() -> Iterator[None]:
    """The laws draw the same words thousands of times; ``tests/numerics`` tries how they are drawn."""
    drawn = philox.words
    kept = functools.lru_cache(maxsize=4096)(drawn)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(philox, "words", lambda *where: kept(*where).clone())
        yield
