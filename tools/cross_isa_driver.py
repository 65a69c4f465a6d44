"""The digest matrix of every class E strategy: what cross_isa.sh runs on each machine, and the table of its results.

    python tools/cross_isa_driver.py cases CASES.json          what is tried: the rows of tests/strategies and defaults
    python tools/cross_isa_driver.py run COLUMN CASES.json     one column, as JSON on stdout
    python tools/cross_isa_driver.py table FOLDER COLUMN...    all columns beside each other, as Markdown

RULES
- ``run`` imports the package, numpy and torch alone, so that it runs wherever these do. Kernels are chosen by
  CRDTMERGE_KERNELS.
- Inputs come from SHAKE-256 and are turned into floats by exact steps only: every machine merges the same bits.
- "plain torch" is a control: a digest of ordinary operations, which does differ between these machines.
- A cell is the output digest and the digest of the receipt of one merge. A merge that fails is no cell: it is named.
- ``table`` exits with 1 where a cell differs from the first column's, with 2 where one is missing.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import math
import platform
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from crdtmerge.errors import CrdtMergeError
from crdtmerge.resolve.merge import merge
from crdtmerge.strategies import registry
from crdtmerge.strategies.parameters import Filled
from crdtmerge.testing.case import SYMMETRY, symmetry_file

ROOT = Path(__file__).resolve().parent.parent
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
WEIGHTS = ("1", "0.3", "2.5", "0.75")

SHAPES: dict[str, tuple[int, ...]] = {
    "blocks.0.attn.weight": (24, 20),
    "blocks.0.conv.weight": (5, 3, 2, 2),
    "blocks.0.norm.bias": (33,),
    "blocks.1.attn.weight": (20, 24),
    "empty": (0, 4),
    "scale": (),
}
LONG: dict[str, tuple[int, ...]] = {"long": (70_001,)}
"""More than one block of 65,536 elements."""

Case = dict[str, Any]
State = dict[str, torch.Tensor]


# ---------------------------------------------------------------- what is tried


def cases() -> dict[str, Any]:
    """Every variant of every class E strategy that the tests know, and why others are left out.

    The first variant of each in all types; the others in two, which are computed in float32 and float64.
    """
    rows = [row for module in _modules() for row in getattr(module, "ROWS", ())]
    found: list[Case] = []
    left_out: dict[str, str] = {}
    for name in registry.names():
        mine = [row for row in rows if row.strategy == name]
        asked: list[tuple[dict[str, Any], Any]] = [(dict(row.params), row) for row in mine] or [({}, None)]
        for params, row in asked:
            strategy = registry.get(name)
            try:
                needs = strategy.needs(Filled(name, strategy.Params, params).general)
            except CrdtMergeError as refusal:
                left_out[name] = str(refusal)
                continue
            label = " ".join([name, *(f"{key}={value}" for key, value in params.items())])
            if not needs.exact or needs.plan == "model":
                left_out[label] = "class P"
            elif set(needs.inputs) - {SYMMETRY}:
                left_out[label] = f"needs the files {', '.join(needs.inputs)}"
            else:
                case = _case(label, name, params, needs, row)
                first = params == asked[0][0]
                found += [case | {"dtype": dtype} for dtype in (DTYPES if first else ("BF16", "F32"))]
                if first and needs.unit == "element" and not needs.stats:
                    found.append(case | {"dtype": "BF16", "long": True})
    return {"cases": found, "left_out": left_out}


def _modules() -> list[Any]:
    sys.path.insert(0, str(ROOT))
    files = sorted((ROOT / "tests" / "strategies").glob("rows_*.py"))
    return [importlib.import_module(f"tests.strategies.{path.stem}") for path in [Path("models.py"), *files]]


def _case(label: str, name: str, params: dict[str, Any], needs: Any, row: Any) -> Case:
    k = min(max(getattr(row, "k", 3), needs.min_k), needs.max_k or 4, 4)
    weights = list(getattr(row, "weights", ()) or WEIGHTS)[:k]
    roles = list(getattr(row, "roles", ()))[:k]
    plain = {key: value if isinstance(value, int | str | list | dict) else str(value) for key, value in params.items()}
    return {
        "label": label,
        "strategy": name,
        "params": plain,
        "weights": weights,
        "roles": roles or ([needs.roles[0]] * k if needs.roles else []),
        "base": needs.base != "unused",
        "stats": list(needs.stats),
        "models": list(needs.models),
        "inputs": list(needs.inputs),
        "k": k,
    }


# ---------------------------------------------------------------- one column


def numbers(seed: str, count: int) -> torch.Tensor:
    """``count`` values in [-1, 1) as float64."""
    raw = np.frombuffer(hashlib.shake_256(seed.encode()).digest(8 * count), "<i8")
    return torch.from_numpy(raw.astype(np.float64) / 2.0**63)


def state(who: str, dtype: str, shapes: dict[str, tuple[int, ...]]) -> State:
    """The model ``base``, or one fine-tuned from it."""
    made: State = {}
    for name, shape in shapes.items():
        values = numbers(f"base/{name}", math.prod(shape))
        if who != "base":
            values = values + 0.125 * numbers(f"{who}/{name}", math.prod(shape))
        made[name] = values.to(DTYPES[dtype]).reshape(shape)
    return made


def statistic(kind: str, who: str, shapes: dict[str, tuple[int, ...]]) -> State:
    """A Gram matrix of whole numbers for each matrix, or one nonnegative number for each element."""
    made: State = {}
    for name, shape in shapes.items():
        if kind != "gram":
            values = numbers(f"{kind}/{who}/{name}", math.prod(shape))
            made[name] = (values * values).to(torch.float32).reshape(shape)
        elif len(shape) == 2 and 0 not in shape:
            inputs, rows = shape[1], 2 * shape[1]
            raw = hashlib.shake_256(f"{kind}/{who}/{name}".encode()).digest(rows * inputs)
            x = np.frombuffer(raw, np.int8).reshape(rows, inputs).astype(np.int64)
            made[name] = torch.from_numpy((x.T @ x).astype(np.float64))
    return made


def cell(case: Case) -> str:
    """Digests of the output and of the receipt of one merge, 16 hexadecimal digits each."""
    shapes = LONG if case.get("long") else SHAPES
    dtype, who = case["dtype"], [f"model {i}" for i in range(case["k"])]
    merged = merge(
        [state(one, dtype, shapes) for one in who],
        strategy=case["strategy"],
        base=state("base", dtype, shapes) if case["base"] else None,
        weights=case["weights"],
        roles=case["roles"] or None,
        stats=[{kind: statistic(kind, one, shapes) for kind in case["stats"]} for one in who],
        inputs={name: state(name, dtype, shapes) for name in case["models"]}
        | {name: symmetry_file(tuple(shapes.items())) for name in case["inputs"]},
        threads=2,
        **case["params"],
    )
    receipt = hashlib.sha256(merged.receipt.to_bytes()).hexdigest()
    return f"{merged.receipt.output_digest.hex()[:16]} {receipt[:16]}"


def control() -> str:
    """A digest of plain torch (a sum, exponentials, a product of matrices): it differs where ours must not."""
    x = numbers("control", 300 * 200).float()
    parts = [x.sum().reshape(1), x.exp(), (x.reshape(300, 200) @ x.reshape(200, 300)).reshape(-1)]
    return hashlib.sha256(b"".join(part.numpy().tobytes() for part in parts)).hexdigest()[:8]


def column(name: str, tried: list[Case]) -> dict[str, Any]:
    """All cells of one machine, and what the machine is."""
    cells: dict[str, str] = {}
    failed: dict[str, str] = {}
    begun = time.monotonic()
    for case in tried:
        label = f"{case['label']} {case['dtype']}{' long' * bool(case.get('long'))}"
        try:
            cells[label] = cell(case)
        except (CrdtMergeError, AssertionError, RuntimeError, ValueError, TypeError, KeyError, IndexError) as fault:
            failed[label] = f"{type(fault).__name__}: {fault}"
    print(f"{name}: {len(cells)} of {len(tried)} cells, {time.monotonic() - begun:.0f} s", file=sys.stderr)
    return {
        "column": name,
        "machine": platform.machine(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "torch": torch.__version__,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "control": control(),
        "cells": cells,
        "failed": failed,
    }


# ---------------------------------------------------------------- the table


def table(folder: Path, names: list[str]) -> int:
    """Print the columns and, strategy by strategy, how many of their cells equal the first column's."""
    columns = [json.loads((folder / f"{name}.json").read_text()) for name in names]
    first = columns[0]
    print("| column | machine | torch | SIMD of torch | numpy | Python | plain torch | cells | equal |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for one in columns:
        equal = sum(one["cells"].get(label) == found for label, found in first["cells"].items())
        said = [one[key] for key in ("column", "machine", "torch", "capability", "numpy", "python", "control")]
        print("| " + " | ".join([*said, str(len(one["cells"])), str(equal)]) + " |")
    _by_strategy(columns)
    return _verdict(columns)


def _by_strategy(columns: list[dict[str, Any]]) -> None:
    groups: dict[str, list[str]] = defaultdict(list)
    for label in columns[0]["cells"]:
        groups[label.split()[0]].append(label)
    print("\n| strategy | variants x types | " + " | ".join(one["column"] for one in columns) + " |")
    print("| --- | --- |" + " --- |" * len(columns))
    for strategy, labels in sorted(groups.items()):
        marks = []
        for one in columns:
            found = {x: one["cells"][x] for x in labels if x in one["cells"]}
            differs = any(cell != columns[0]["cells"][x] for x, cell in found.items())
            marks.append("DIFFERS" if differs else "equal" if len(found) == len(labels) else "not all run")
        print("| " + " | ".join([strategy, str(len(labels)), *marks]) + " |")


def _verdict(columns: list[dict[str, Any]]) -> int:
    every = {label for one in columns for label in [*one["cells"], *one["failed"]]}
    missing = [(one["column"], label) for one in columns for label in every if label not in one["cells"]]
    differing = [
        (one["column"], label, found, columns[0]["cells"][label])
        for one in columns
        for label, found in one["cells"].items()
        if columns[0]["cells"].get(label, found) != found
    ]
    for name, label, found, wanted in sorted(differing):
        print(f"DIFFERS  {name}: {label}: {found}, not {wanted}", file=sys.stderr)
    for name, label in sorted(missing):
        why = next(one["failed"].get(label, "not run") for one in columns if one["column"] == name)
        print(f"NO CELL  {name}: {label}: {why}", file=sys.stderr)
    return 1 if differing else 2 if missing else 0


def main(verb: str, *said: str) -> int:
    """Do one of the three; the exit status."""
    if verb == "cases":
        found = cases()
        Path(said[0]).write_text(json.dumps(found, indent=1))
        print(f"cases: {len(found['cases'])}", file=sys.stderr)
        for label, why in found["left_out"].items():
            print(f"left out: {label}: {why}", file=sys.stderr)
    elif verb == "run":
        json.dump(column(said[0], json.loads(Path(said[1]).read_text())["cases"]), sys.stdout, indent=1)
    else:
        return table(Path(said[0]), list(said[1:]))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
