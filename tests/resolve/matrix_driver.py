"""Run as a program: merges the same models in many ways and prints what came out of each, as one JSON document.

    python -m tests.resolve.matrix_driver FOLDER ways|settings [DTYPE]...

``ways`` goes through everything that can be varied within a process; ``settings`` merges once with each kind of
kernels, for a parent that varies what holds for a whole process. ``pins`` prints the table of ``pinned_digests``.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import sys
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

import torch

from crdtmerge.resolve.merge import merge
from tests.resolve import models

WEIGHTS = {"a": Decimal("1"), "b": Decimal("0.3"), "c": Decimal("2.5")}

STRATEGIES: dict[str, tuple[str, dict[str, Any]]] = {
    "weight_average": ("weight_average", {}),
    "linear": ("linear", {"normalize": False}),
    "slerp": ("slerp", {}),
    "task_arithmetic": ("task_arithmetic", {"lambda": "0.7"}),
    "ties model": ("ties", {"density": "0.3", "scope": "model"}),
    "ties tensor": ("ties", {"density": "0.3", "scope": "tensor", "lambda": "1.1"}),
    "dare": ("dare", {"density": "0.3"}),
    "dare_ties": ("dare_ties", {"density": "0.3", "elect": "count"}),
    "magmax": ("magmax", {}),
}

NO_BASE = ("weight_average", "linear", "slerp")

LONG = {"long": ((1 << 20) + 70_001,), "short": (5,)}
"""More than one span of the engine, and no whole number of blocks."""


class Way(NamedTuple):
    """One way to run the same merge."""

    order: str = "abc"
    threads: int = 2
    kernels: str = "torch"
    block: int = 131072
    files: str = "one"
    rehash: bool = False


def ways() -> Iterator[Way]:
    """Everything that can be varied within a process."""
    for order in itertools.permutations("abc"):
        yield Way("".join(order))
    for i, (kernels, threads) in enumerate(itertools.product(("torch", "numba") * 2, (1, 2, 4))):
        yield Way("cab", threads, kernels, (65536, 131072, 262144)[(i + i // 3) % 3])
    for kernels, files in itertools.product(("torch", "numba"), ("shards of 2", "reordered", "mixed")):
        yield Way("bca", kernels=kernels, files=files)
    for kernels, files in itertools.product(("torch", "numba"), ("one", "shards of 3")):
        yield Way("acb", kernels=kernels, files=files, rehash=True)


def ways_of_a_long_one() -> Iterator[Way]:
    """The ways that matter for tensors of more than one span."""
    yield Way("acb", 1, "torch", 262144)
    yield Way("bac", 4, "torch", 65536, "shards of 2", rehash=True)
    yield Way("cab", 1, "numba", 65536, "reordered", rehash=True)
    yield Way("abc", 4, "numba", 196608)


def settings() -> Iterator[Way]:
    """Two ways, one with each kind of kernels."""
    yield Way("bac", kernels="torch")
    yield Way("cba", kernels="numba", files="shards of 2", rehash=True)


def written(folder: Path, dtype: str, shapes: dict[str, tuple[int, ...]]) -> dict[tuple[str, str], Path]:
    """The models in all layouts of files, as {(layout, who): path}."""
    folder.mkdir()
    paths = {}
    for who in ("base", "a", "b", "c"):
        tensors = models.state(who, dtype, shapes)
        paths["one", who] = models.save(folder / f"{who}.safetensors", tensors)
        paths["reordered", who] = models.save_reordered(folder / f"{who}-reordered.safetensors", tensors)
        for count in (2, 3):
            paths[f"shards of {count}", who] = models.save_shards(folder / f"{who}-{count}", tensors, count)
    mixture = {"base": "shards of 3", "a": "one", "b": "reordered", "c": "shards of 2"}
    return paths | {("mixed", who): paths[layout, who] for who, layout in mixture.items()}


def result(paths: dict[tuple[str, str], Path], case: str, way: Way) -> str:
    """Digests of the output and of the receipt, 16 hexadecimal digits each."""
    strategy, params = STRATEGIES[case]
    os.environ["CRDTMERGE_KERNELS"], os.environ["CRDTMERGE_BLOCK"] = way.kernels, str(way.block)
    merged = merge(
        [paths[way.files, who] for who in way.order],
        strategy=strategy,
        base=None if strategy in NO_BASE else paths[way.files, "base"],
        weights=[WEIGHTS[who] for who in way.order],
        threads=way.threads,
        rehash=way.rehash,
        **params,
    )
    receipt = hashlib.sha256(merged.receipt.to_bytes()).hexdigest()
    return f"{merged.receipt.output_digest.hex()[:16]} {receipt[:16]}"


def main(folder: Path, what: str, dtypes: list[str]) -> dict[str, Any]:
    """Every case in every way asked for, as {case: {way: result}}."""
    asked = {"ways": ways, "settings": settings, "pins": settings}[what]
    results: dict[str, dict[str, str]] = {}
    for dtype in dtypes:
        for size, shapes in (("", models.SHAPES), (" long", LONG)):
            if size and (dtype != "BF16" or what == "settings"):
                continue
            paths = written(folder / f"{dtype}{size}", dtype, shapes)
            for case in STRATEGIES:
                few = ways_of_a_long_one() if size else asked()
                results[f"{case} {dtype}{size}"] = {str(tuple(way)): result(paths, case, way) for way in few}
    return {"capability": torch.backends.cpu.get_cpu_capability(), "hash": hash("crdtmerge"), "results": results}


if __name__ == "__main__":
    _, where, mode, *types = sys.argv
    found = main(Path(where), mode, types or list(models.TYPES))
    if mode == "pins":
        for case, by_way in found["results"].items():
            assert len(set(by_way.values())) == 1, (case, by_way)
            print(f'    "{case}": "{next(iter(by_way.values()))}",')
    else:
        json.dump(found, sys.stdout)
