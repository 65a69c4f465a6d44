"""Random bits are Philox4x32-10, named by what they are for, the same however they are cut."""

from __future__ import annotations

import itertools
import math
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from crdtmerge.numerics import kernels, philox
from crdtmerge.numerics.philox import Stream
from tests.numerics import random123
from tests.numerics.examples import examples

ZEROS, ONES = (0,) * 4, (0xFFFFFFFF,) * 4

ANSWERS = [
    (ZEROS, (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (ONES, (0xFFFFFFFF, 0xFFFFFFFF), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
"""The known answers that Random123 publishes for philox4x32-10: counter, key, words."""

word = st.integers(0, 2**32 - 1)
streams = st.builds(Stream, word, word, word, word)


def block(counter: random123.Words, key: tuple[int, int]) -> random123.Words:
    c0, c1, c2, c3 = counter
    x0, x1, x2, x3 = philox.philox(torch.tensor([c0]), torch.tensor([c1]), Stream(*key, c2, c3))
    return int(x0), int(x1), int(x2), int(x3)


@pytest.mark.parametrize(("counter", "key", "words"), ANSWERS)
def test_the_published_answers_are_given(
    counter: random123.Words, key: tuple[int, int], words: random123.Words
) -> None:
    assert random123.philox(counter, key) == words
    assert block(counter, key) == words


@examples(300)
@given(st.tuples(word, word, word, word), st.tuples(word, word))
def test_every_block_equals_that_of_python_integers(counter: random123.Words, key: tuple[int, int]) -> None:
    assert block(counter, key) == random123.philox(counter, key)


@examples(150)
@given(streams, st.one_of(st.integers(0, 100), st.integers(2**34 - 30, 2**34 + 30), st.integers(0, 2**61)), word)
def test_the_word_of_an_element_is_word_i_mod_4_of_block_i_div_4(s: Stream, start: int, length: int) -> None:
    stop = start + length % 40
    assert philox.words(s, start, stop).tolist() == [
        random123.word((s.k0, s.k1, s.c2, s.c3), i) for i in range(start, stop)
    ]


@examples(100)
@given(streams, st.lists(st.integers(0, 1000), max_size=8), st.integers(0, 2**40))
def test_any_cut_of_a_tensor_gives_the_same_words(s: Stream, cuts: list[int], offset: int) -> None:
    ends = [0, *sorted(cuts), 1000]
    parts = [philox.words(s, offset + start, offset + stop) for start, stop in itertools.pairwise(ends)]
    assert torch.equal(torch.cat(parts), philox.words(s, offset, offset + 1000))


@examples(60)
@given(streams, st.one_of(st.integers(0, 100), st.integers(2**32 - 5, 2**32 + 5), st.integers(0, 2**60)))
def test_the_kernel_draws_the_blocks_of_the_definition(s: Stream, first: int) -> None:
    out = np.empty(40, np.uint32)
    kernels._philox_words(first, np.array(s, np.uint32), out)
    index = torch.arange(first, first + 10)
    assert out.tolist() == torch.stack(philox.philox(index & philox.MASK, index >> 32, s), dim=1).reshape(-1).tolist()


@examples(40)
@given(streams, st.integers(0, 7), st.integers(1, 3000))
def test_the_kernel_keeps_what_is_below_the_bound_also_where_upper_halves_tie(s: Stream, at: int, count: int) -> None:
    start = 8 * 1024 * at
    words = philox.words(s, start, start + count).numpy()
    for bound in (int(words[count // 2]), int(words[0]) + 1, 0, 1 << 32, 1 << 31, (1 << 31) + 1):
        tau = np.arange(1, count + 1, dtype=np.float32)
        for tile in range(0, count, kernels.TILE):
            part = tau[tile : tile + kernels.TILE]
            halves = [np.empty(kernels.TILE // 2, np.uint32) for _ in range(2)]
            stream, zero, twice = np.array(s, np.uint32), np.float32(0), np.float32(2)
            kernels._drop(part, stream, start + tile, part.size, np.uint64(bound), twice, zero, *halves)
        assert (tau == np.where(words < bound, 2 * np.arange(1, count + 1), 0)).all()


names = st.tuples(st.binary(max_size=40), st.text(max_size=8), st.binary(max_size=40), st.text(max_size=20))


@examples(200)
@given(names)
def test_a_stream_is_named_by_a_digest_of_what_it_is_for(named: tuple[bytes, str, bytes, str]) -> None:
    assert tuple(philox.stream(*named)) == random123.name(*named)


@examples(200)
@given(names, names)
def test_another_seed_purpose_contribution_or_tensor_is_another_stream(
    one: tuple[bytes, str, bytes, str], other: tuple[bytes, str, bytes, str]
) -> None:
    assert (philox.stream(*one) == philox.stream(*other)) == (one == other)
    for place in range(4):
        changed = list(one)
        changed[place] = other[place]
        assert (philox.stream(*changed) == philox.stream(*one)) == (one[place] == other[place])  # type: ignore[arg-type]


def test_names_cannot_run_into_each_other() -> None:
    assert philox.stream(b"ab", "c", b"", "t") != philox.stream(b"a", "bc", b"", "t")
    assert philox.stream(b"a", "b", b"x", "yz") != philox.stream(b"a", "b", b"xy", "z")


@examples(300)
@given(st.decimals(min_value="1e-30", max_value=1, allow_nan=False, places=30).filter(lambda d: d > 0))
def test_keep_below_is_the_floor_of_density_times_2_to_the_32(density: Decimal) -> None:
    assert philox.keep_below(density) == math.floor(Fraction(density) * 2**32)


@pytest.mark.parametrize(
    ("density", "bound"),
    [
        ("1", 4294967296),
        ("0.5", 2147483648),
        ("0.1", 429496729),
        ("0.3", 1288490188),
        ("0.9999999999999999999999999999999999999999", 4294967295),
        ("1e-11", 0),
    ],
)
def test_keep_below_knows_decimals_exactly(density: str, bound: int) -> None:
    assert philox.keep_below(Decimal(density)) == bound


def chi_square(values: np.ndarray, bins: int) -> float:
    counts = np.bincount(values, minlength=bins)
    expected = len(values) / bins
    return float((((counts - expected) ** 2) / expected).sum())


@pytest.mark.parametrize("shift", [0, 8, 16, 24])
def test_every_byte_of_the_words_is_uniform(shift: int) -> None:
    """255 degrees of freedom: mean 255, standard deviation 22.6; five of them on each side."""
    words = philox.words(philox.stream(b"seed", "drop", b"id", "w"), 0, 1 << 18).numpy()
    assert 142 < chi_square((words >> shift) & 255, 256) < 368
    for lane in range(4):
        assert 142 < chi_square((words[lane::4] >> shift) & 255, 256) < 368


def test_neighbours_and_streams_are_not_correlated() -> None:
    """Correlations of 2^18 pairs of uniform numbers stay within five times 2^-9."""
    one = philox.words(philox.stream(b"seed", "drop", b"a", "w"), 0, 1 << 18).numpy() / 2**32
    for other in (b"b", b"c"):
        two = philox.words(philox.stream(b"seed", "drop", other, "w"), 0, 1 << 18).numpy() / 2**32
        assert abs(np.corrcoef(one, two)[0, 1]) < 5 * 2**-9
    for lag in (1, 2, 3, 4, 64):
        assert abs(np.corrcoef(one[lag:], one[:-lag])[0, 1]) < 5 * 2**-9
