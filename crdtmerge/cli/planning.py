"""``crdtmerge plan``: what a strategy must know of the whole input, computed once and kept as a file."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from crdtmerge.cli.console import emit, say, tell
from crdtmerge.cli.replica_options import (
    Align,
    AsJson,
    Exclude,
    Inputs,
    Missing,
    Roles,
    Settings,
    StatisticsOfEach,
    Tasks,
    Threads,
    Weights,
    named_paths,
)
from crdtmerge.cli.statistics import counting


def plan(
    models: Annotated[
        list[Path], typer.Argument(metavar="MODEL", help="Checkpoints: .safetensors files or folders, in any order.")
    ],
    strategy: Annotated[str, typer.Option(metavar="NAME", help="One of `crdtmerge strategies` that makes a plan.")],
    out: Annotated[Path, typer.Option("-o", "--out", metavar="FILE", help="The plan's file.")],
    base: Annotated[
        Path | None, typer.Option(metavar="MODEL", help="The model from which the others were fine-tuned.")
    ] = None,
    settings: Settings = None,
    align: Align = None,
    inputs: Inputs = None,
    weight: Weights = None,
    role: Roles = None,
    task: Tasks = None,
    stats: StatisticsOfEach = None,
    dtype: Annotated[str | None, typer.Option(metavar="D", help="Of the merged model.")] = None,
    exclude: Exclude = None,
    missing: Missing = None,
    device: Annotated[str, typer.Option(metavar="cpu|cuda", help="Where programs and arithmetic run.")] = "cpu",
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Compute the plan of a merge: coefficients, masks, adapters, a genome.

    `crdtmerge merge` with the same models and options and --plan FILE applies it anywhere, with the same bytes, without
    the program and the data. Interrupted, the same command goes on where it stopped.
    """
    from crdtmerge.cli.merging import check_device, parsed, statistics_of
    from crdtmerge.errors import UsageError
    from crdtmerge.resolve import plan_file
    from crdtmerge.resolve.asking import claims, recipe_of
    from crdtmerge.resolve.beside import Beside
    from crdtmerge.resolve.inner import forget
    from crdtmerge.resolve.merging import Merge, Options
    from crdtmerge.weights.cache import DigestCache

    begin = time.perf_counter()
    asked = {"dtype": dtype, "missing": missing, "exclude": exclude or (), "align": align}
    recipe, t = recipe_of(strategy, parsed(settings or []), **asked)
    said = claims(len(models), weights=weight, t=t, roles=role, tasks=task)
    check_device(device)
    beside = Beside(statistics_of(models, stats or []), named_paths("--input", inputs))
    plan_file.check_place(out)
    with ExitStack() as stack:
        show = stack.enter_context(counting(quiet=as_json))
        options = Options(threads, device, False, DigestCache(), show, out)
        one = stack.enter_context(Merge(list(zip(models, said, strict=True)), recipe, base, options, beside))
        if one.needs.plan == "none":
            raise UsageError(f"strategy '{strategy}' makes no plan with these parameters: merge at once.")
        made = one.plan
        plan_file.write(out, made, one.unplanned_id, one.recipe.inputs)
        forget(out)
        notes = list(one.notes)
    seconds = round(time.perf_counter() - begin, 6)
    for note in notes:
        say(f"note: {note}")
    if as_json:
        emit(
            {
                "out": str(out),
                "strategy": strategy,
                "digest": made.digest.hex(),
                "merge_id": one.unplanned_id.hex(),
                "inputs": {name: digest.hex() for name, digest in one.recipe.inputs.items()},
                "seconds": seconds,
            }
        )
        return
    tell(f"plan of {strategy} of {len(models)} models -> {out}")
    tell(f"  in {seconds:.2f} s; apply it with `crdtmerge merge ... --plan {out}`")
    tell(f"  digest   {made.digest.hex()}")
    tell(f"  merge id {one.unplanned_id.hex()}")
