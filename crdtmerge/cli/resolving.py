"""``crdtmerge resolve`` and ``recipe``: the pool's set as one merged checkpoint, and how it is merged."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from crdtmerge.cli.console import Memory, emit, progress, quoted, say, tell
from crdtmerge.cli.replica_options import (
    HERE,
    Align,
    AsJson,
    Exclude,
    Inputs,
    MergedDtype,
    Missing,
    PlanFile,
    PoolFolder,
    Settings,
    Threads,
    asked_recipe,
    named_paths,
)


def resolve(
    out: Annotated[
        Path, typer.Option("-o", "--out", metavar="OUT", help="A folder, or NAME.safetensors; replaced if it is ours.")
    ],
    inputs: Inputs = None,
    plan: PlanFile = None,
    pool: PoolFolder = HERE,
    device: Annotated[str, typer.Option(metavar="cpu|cuda", help="Where the arithmetic runs.")] = "cpu",
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Merge the visible set by the pool's recipe.

    Equal sets give equal bytes on every replica. An output that already is the merge of this set is only checked.
    """
    from crdtmerge.cli.merging import check_device, check_output, print_report, report_of
    from crdtmerge.pool.replica import Replica

    begin, memory = time.perf_counter(), Memory()
    check_device(device)
    with Replica.open(pool) as replica, progress(quiet=as_json) as show:

        def advance(stage: str, done: int, total: int) -> None:
            memory.sample()
            show(stage, done, total)

        beside = named_paths("--input", inputs)
        replica.refuse_inside(out)
        check_output(out, [*beside.values(), *([plan] if plan else [])])
        resolved = replica.resolve_to(out, inputs=beside, plan=plan, threads=threads, device=device, progress=advance)
    report = report_of(resolved.receipt, out, written=resolved.nbytes, bytes_read=resolved.bytes_read)
    resident, anonymous = memory.finish()
    more: dict[str, Any] = {"merged": resolved.merged, "seconds": round(time.perf_counter() - begin, 6)}
    more |= {"fsync_seconds": round(resolved.fsync_seconds, 6)}
    report |= more | {"peak_rss_bytes": resident, "peak_anon_bytes": anonymous}
    for note in resolved.notes:
        say(f"note: {note}")
    if as_json:
        emit(report)
        return
    if not resolved.merged:
        tell("unchanged: it is the merge of this set already, to the bit")
    print_report(report)


def recipe(
    strategy: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="The strategy from now on; left out: print the recipe.")
    ] = None,
    settings: Settings = None,
    align: Align = None,
    dtype: MergedDtype = None,
    exclude: Exclude = None,
    missing: Missing = None,
    pool: PoolFolder = HERE,
    as_json: AsJson = False,
) -> None:
    """Print the pool's recipe, or change it for everyone: that takes a curator. The base stays."""
    from crdtmerge.errors import UsageError
    from crdtmerge.pool.replica import Replica

    with Replica.open(pool) as replica:
        if strategy is not None:
            replica.set_recipe(asked_recipe(strategy, settings, dtype, exclude, missing, align=align))
        elif settings or align or dtype or exclude or missing:
            raise UsageError("name the strategy too: a recipe is replaced as a whole.")
        value = replica.recipe.canonical() | {"id": replica.recipe.id.hex()}
    if as_json:
        emit(value)
        return
    tell(f"{value['strategy']} (version {value['version']})")
    for name, said in [*value["params"].items(), *((key, value[key]) for key in ("base", "dtype", "missing", "seed"))]:
        tell(f"  {name} = {'none' if said is None else said}")
    for glob in value["exclude"]:
        tell(f"  exclude {quoted(glob)}")
