"""Kernels prove themselves before they are trusted, and whatever runs, the bytes are those of the definition."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import crdtmerge.numerics
from crdtmerge import limits
from crdtmerge.errors import UsageError
from crdtmerge.numerics import compiled, fused, kernels
from crdtmerge.numerics.answers import ANSWERS
from crdtmerge.numerics.fused import Kernels
from crdtmerge.resolve.merge import merge
from tests.numerics import definitions
from tests.strategies.models import Model, equal, family

KEYS = definitions.keys()
ROOT = Path(__file__).parents[2]


def test_there_is_an_answer_for_every_kernel_and_no_other() -> None:
    assert sorted(ANSWERS) == sorted("/".join(key) for key in KEYS)
    assert len(set(ANSWERS.values())) == len(ANSWERS), "no two kernels have one answer"


@pytest.mark.parametrize("key", KEYS, ids="/".join)
def test_the_stored_answers_are_those_of_the_definition_and_of_the_kernels(key: tuple[str, str, str]) -> None:
    stored = ANSWERS["/".join(key)]
    assert definitions.answer(*key) == stored
    assert fused.answer(*key) == stored
    assert fused.proven(*key)


# ---------------------------------------------------------------- which arithmetic is chosen


def test_the_variable_chooses_and_size_does_where_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(fused.VARIABLE, raising=False)
    assert fused.choose(limits.KERNEL_BYTES_MIN - 1) == Kernels(may_compile=False)
    assert fused.choose(limits.KERNEL_BYTES_MIN) == Kernels(may_compile=True)
    for said, chosen in (("torch", None), ("numba", Kernels(may_compile=True))):
        monkeypatch.setenv(fused.VARIABLE, said)
        assert fused.choose(0) == fused.choose(1 << 40) == chosen


@pytest.mark.parametrize("wrong", ["wrong", "NUMBA", "torch ", "0"])
def test_an_unknown_choice_is_refused(monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    monkeypatch.setenv(fused.VARIABLE, wrong)
    models, _ = family(2)
    with pytest.raises(UsageError, match=f"CRDTMERGE_KERNELS = {wrong!r}: must be torch or numba"):
        merge(models, strategy="linear")


@pytest.mark.parametrize("wrong", ["0", "65535", "100000", "-65536", "many", ""])
def test_a_block_that_is_no_multiple_of_65536_is_refused(monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    monkeypatch.setenv("CRDTMERGE_BLOCK", wrong)
    models, _ = family(2)
    with pytest.raises(UsageError, match=r"CRDTMERGE_BLOCK = .*must be a multiple of 65536"):
        merge(models, strategy="linear")


# ---------------------------------------------------------------- kernels that are wrong or cannot be loaded


@pytest.fixture
def unproven() -> Iterator[None]:
    """Nothing is proven yet, and nothing of what was proven in here is remembered."""
    fused._proven.cache_clear()
    fused._module.cache_clear()
    yield
    fused._proven.cache_clear()
    fused._module.cache_clear()


def last_bit_off(real: Any) -> Any:
    """A kernel whose first result, in the array it fills or returns, is off by the last bit."""

    def sabotaged(*arguments: Any) -> Any:
        before = [x.copy() if isinstance(x, np.ndarray) else None for x in arguments]
        found = real(*arguments)
        if found is not None:
            found[1][:1] ^= 1
            return found
        filled = next(x for x, old in zip(arguments, before, strict=True) if old is not None and (x != old).any())
        flat = filled.reshape(-1).view({2: np.uint16, 4: np.uint32, 8: np.uint64}[filled.itemsize])
        flat[:1] ^= flat.dtype.type(1)
        return None

    return sabotaged


def merged_by(how: str, patch: pytest.MonkeyPatch, strategy: str, threads: int = 1) -> tuple[Model, list[str]]:
    """A merge, and the warnings it gave."""
    patch.setenv(fused.VARIABLE, how)
    models, base = family(3, "BF16", shapes={"a": (300,), "b": (70_000,), "c": (5, 9)})
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        origin = base if strategy in ("ties", "dare") else None
        one = merge(models, strategy=strategy, base=origin, threads=threads)
        result = {name: x.clone() for name, x in one.items()}
    return result, [str(warning.message) for warning in seen if issubclass(warning.category, RuntimeWarning)]


SABOTAGE = [
    ("affine", "linear", "affine/BF16/BF16"),
    ("consensus", "dare", "consensus/BF16/BF16"),
    ("gram", "slerp", "gram/BF16/"),
    ("count", "ties", "count/BF16/"),
]


@pytest.mark.usefixtures("unproven")
@pytest.mark.parametrize(("kernel", "strategy", "key"), SABOTAGE)
def test_a_wrong_kernel_is_found_out_warned_of_once_and_left_out(
    monkeypatch: pytest.MonkeyPatch, kernel: str, strategy: str, key: str
) -> None:
    monkeypatch.setattr(kernels, kernel, last_bit_off(getattr(kernels, kernel)))
    one, said = merged_by("numba", monkeypatch, strategy)
    assert len(said) == 1
    assert key in said[0]
    assert "merging with torch, which gives the same bytes more slowly" in said[0]
    again, said = merged_by("numba", monkeypatch, strategy)
    assert said == []
    definition, _ = merged_by("torch", monkeypatch, strategy)
    assert equal(one, definition)
    assert equal(again, definition)


@pytest.mark.usefixtures("unproven")
def test_a_wrong_collecting_kernel_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "collect", last_bit_off(kernels.collect))
    one, _ = merged_by("numba", monkeypatch, "ties")
    definition, _ = merged_by("torch", monkeypatch, "ties")
    assert equal(one, definition)


@pytest.mark.usefixtures("unproven")
def test_threads_that_ask_at_once_are_warned_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow_and_wrong(kind: str, dtype: str, out: str) -> str:
        time.sleep(0.3)
        return "wrong"

    monkeypatch.setattr(fused, "answer", slow_and_wrong)
    _, said = merged_by("numba", monkeypatch, "linear", threads=2)
    assert len(said) == 1


@pytest.mark.usefixtures("unproven")
def test_kernels_that_cannot_be_loaded_are_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    definition, _ = merged_by("torch", monkeypatch, "linear")
    monkeypatch.delattr(crdtmerge.numerics, "kernels")
    monkeypatch.setitem(sys.modules, "crdtmerge.numerics.kernels", None)
    one, said = merged_by("numba", monkeypatch, "linear")
    assert len(said) == 1
    assert "cannot be loaded" in said[0]
    assert equal(one, definition)


# ---------------------------------------------------------------- what is imported


def in_child(program: str, *arguments: str) -> list[dict[str, Any]]:
    """The lines of JSON that a program prints in a fresh process in which nothing is said of kernels."""
    environment = {name: value for name, value in os.environ.items() if name != fused.VARIABLE}
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


LOADED = """
import json, sys
def say(name):
    modules = {"torch": "torch", "numba": "numba", "kernels": "crdtmerge.numerics.kernels"}
    print(json.dumps({"strategy": name} | {key: module in sys.modules for key, module in modules.items()}))
"""

NOTHING_COMPILED = """
import sys
from pathlib import Path
from crdtmerge.numerics import compiled
compiled._path = lambda: Path(sys.argv[1]) / "none"
"""

SMALL = (
    LOADED
    + """
import numpy as np
from crdtmerge.resolve.merge import merge
a, b, base = ({"w": np.arange(n, n + 9, dtype=np.float32)} for n in (1, 5, 0))
for name in ("weight_average", "slerp", "task_arithmetic", "ties", "dare_ties", "magmax"):
    merge([a, b], strategy=name, base=base)
    say(name)
"""
)

LARGE = (
    LOADED
    + """
from crdtmerge.recipe import Recipe
from crdtmerge.replica.contribution import Claim
from crdtmerge.resolve.merging import Merge, Options
class Nowhere:
    def write(self, name, offset, data):
        pass
models, base = [(path, Claim()) for path in sys.argv[1:-1]], sys.argv[-1]
for name in ("weight_average", "linear", "slerp", "task_arithmetic", "ties", "dare", "dare_ties", "magmax"):
    with Merge(models, Recipe(name), base, Options(threads=1)) as one:
        one.run(Nowhere(), folder=False)
    say(name)
"""
)


def test_small_merges_never_wait_for_a_compiler(tmp_path: Path) -> None:
    said = in_child(NOTHING_COMPILED + SMALL, str(tmp_path))
    assert len(said) == 6
    for one in said:
        assert not one["numba"], one
        assert not one["kernels"], one
    assert said[0]["torch"], "the definition is torch"


def test_small_merges_use_what_was_compiled_before() -> None:
    for key in ("affine/F32/F32", "gram/F32/", "count/F32/", "consensus/F32/F32"):
        kind, dtype, out = key.split("/")
        assert fused.proven(kind, dtype, out)
        assert compiled.known(key)
    for one in in_child(SMALL):
        assert one["kernels"], one
        assert not one["torch"], one


def written(path: Path, number: int, elements: int) -> Path:
    """A file of two bfloat16 tensors of random numbers around one."""
    bits = np.random.default_rng(number).integers(0x3E00, 0x4080, elements).astype("<u2")
    half = elements  # the first tensor holds half of the bytes
    table = {
        "a": {"dtype": "BF16", "shape": [elements // 2], "data_offsets": [0, half]},
        "b": {"dtype": "BF16", "shape": [elements - elements // 2], "data_offsets": [half, 2 * elements]},
    }
    header = json.dumps(table).encode()
    header += b" " * (-len(header) % 8)
    path.write_bytes(len(header).to_bytes(8, "little") + header + bits.tobytes())
    return path


def test_large_merges_of_files_never_load_torch(tmp_path: Path) -> None:
    elements = limits.KERNEL_BYTES_MIN // 6 // 2 * 2 + 2
    paths = [written(tmp_path / f"{i}.safetensors", i, elements) for i in range(3)]
    assert sum(path.stat().st_size for path in paths) > limits.KERNEL_BYTES_MIN
    said = in_child(LARGE, *map(str, paths))
    assert len(said) == 8
    for one in said:
        assert one["kernels"], one
        assert not one["torch"], one
