"""``crdtmerge demo``: the main job on real data in under a minute.

Trains three small networks from one start on handwritten digits, writes them as checkpoints, merges them, and shows
what the merges are worth and that neither order, threads, kernels nor process change a byte of them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from crdtmerge.cli.console import emit, say, tell

if TYPE_CHECKING:
    from crdtmerge.testing.digits import Digits, StateDict

MERGES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("weight_average", {}),
    ("ties", {"density": "0.5"}),
    ("slerp", {}),
)

ANOTHER_WAY: tuple[tuple[tuple[int, ...], int, dict[str, str]], ...] = (
    ((3, 1, 2), 1, {"CRDTMERGE_KERNELS": "torch", "PYTHONHASHSEED": "1"}),
    ((2, 3, 1), 4, {"CRDTMERGE_KERNELS": "numba", "PYTHONHASHSEED": "2"}),
)
"""How the ties merge is repeated in processes of their own: order, threads, environment."""


def demo(
    what: Annotated[
        Literal["digits", "dimat"],
        typer.Argument(help="digits: merge fine-tunes of one network. dimat: peers that train and merge over gossip."),
    ] = "digits",
    out: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--out",
            metavar="OUT",
            help="Keep the checkpoints in this new folder; else they are removed. dimat: a PNG of the curves.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Train and merge small networks on real images.

    Needs scikit-learn for its bundled digits, and matplotlib for a PNG: pip install 'crdtmerge[demo]'.
    """
    if what == "dimat":
        from crdtmerge.cli.demo_dimat import dimat

        dimat(out, as_json)
        return
    with tempfile.TemporaryDirectory(prefix="crdtmerge-demo-") as scratch:
        folder = _folder(out) or Path(scratch)
        say("training a base and three fine-tunes on handwritten digits ...")
        digits, states = _train(folder)
        say("merging ...")
        rows = [*_trained_rows(digits, states), *(_merged_row(digits, folder, *one) for one in MERGES)]
        say("merging again in other orders, threads, kernels and processes ...")
        digests = [_again(folder, *way) for way in ANOTHER_WAY]
        receipt = json.loads((folder / "ties" / "receipt.json").read_text())
        same = all(digest == receipt["output_digest"] for _, digest in digests)
        if as_json:
            emit({"models": rows, "receipt": receipt, "again": dict(digests), "same": same})
        else:
            _print(rows, receipt, digests, same, out)
    if not same:
        raise typer.Exit(1)


def _folder(out: Path | None) -> Path | None:
    from crdtmerge.errors import OutputError

    if out is None:
        return None
    try:
        out.mkdir()
    except OSError as fault:
        raise OutputError(f"{out}: cannot be made ({fault.strerror}); choose a new folder.") from None
    return out


def _train(folder: Path) -> tuple[Digits, dict[str, StateDict]]:
    """Train, and write each network as a checkpoint folder."""
    from safetensors.torch import save_file

    from crdtmerge.testing import digits

    data = digits.load()
    base, tuned = digits.family(data)
    states = {"base": base, **{f"ft-{i + 1}": state for i, state in enumerate(tuned)}}
    for name, state in states.items():
        (folder / name).mkdir()
        save_file(state, folder / name / "model.safetensors", metadata={"format": "pt"})
    return data, states


def _trained_rows(data: Digits, states: dict[str, StateDict]) -> list[dict[str, Any]]:
    from crdtmerge.testing.digits import FAVOURED, accuracy

    about = ["base, 200 images of all classes", *(f"mostly digits {f[0]} to {f[-1]}" for f in FAVOURED)]
    return [
        {"model": name, "about": text, "accuracy": accuracy(state, data.test_x, data.test_y), "digest": None}
        for (name, state), text in zip(states.items(), about, strict=True)
    ]


def _merged_row(data: Digits, folder: Path, strategy: str, params: dict[str, Any]) -> dict[str, Any]:
    """Merge the three fine-tunes through the library, save the result, and measure it from the saved file."""
    from safetensors.torch import load_file

    from crdtmerge.resolve.merge import merge
    from crdtmerge.testing.digits import accuracy

    models = [folder / f"ft-{i}" for i in (1, 2, 3)]
    merged = merge(models, strategy=strategy, base=folder / "base", **params)
    merged.save(folder / strategy)
    measured = accuracy(load_file(folder / strategy / "model.safetensors"), data.test_x, data.test_y)
    about = ", ".join(["merge of the three", *(f"{key} {value}" for key, value in params.items())])
    digest = merged.receipt.output_digest.hex()
    return {"model": strategy, "about": about, "accuracy": measured, "digest": digest}


def _again(folder: Path, order: tuple[int, ...], threads: int, settings: dict[str, str]) -> tuple[str, str]:
    """The ties merge by the command line in a process of its own: (how, output digest)."""
    models = [str(folder / f"ft-{i}") for i in order]
    command = [sys.executable, "-m", "crdtmerge", "merge", *models, "--base", str(folder / "base")]
    command += ["--strategy", "ties", "--set", "density=0.5", "--threads", str(threads), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | settings)
    kernels = settings["CRDTMERGE_KERNELS"]
    how = f"order {' '.join(map(str, order))}, {threads} threads, {kernels} kernels, a process of its own"
    return how, json.loads(done.stdout)["output_digest"]


def _print(
    rows: list[dict[str, Any]], receipt: dict[str, Any], digests: list[tuple[str, str]], same: bool, out: Path | None
) -> None:
    tell(f"\n{'model':<16}{'test accuracy':>14}   {'output digest':<16}  what it is")
    for row in rows:
        tell(f"{row['model']:<16}{row['accuracy']:>13.1%}   {(row['digest'] or '')[:16]:<16}  {row['about']}")
    tell("\nreceipt of the ties merge")
    for key in ("merge_id", "root", "recipe_id", "seed", "class", "output_digest"):
        tell(f"  {key:<14} {receipt[key]}")
    for one in receipt["contributions"]:
        tell(f"  contribution   {one['id']}  weight {one['weight']}")
    tell("\nthe same merge again")
    tell(f"  {receipt['output_digest'][:16]}  order 1 2 3, in the process that trained")
    for how, digest in digests:
        tell(f"  {digest[:16]}  {how}")
    tell("the digests are equal" if same else "THE DIGESTS DIFFER")
    if out:
        tell(f"\nverify it yourself: crdtmerge verify {out / 'ties'}")
