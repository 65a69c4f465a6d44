"""``crdtmerge merge``: checkpoints in, a checkpoint and its receipt out."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from crdtmerge.cli.console import Memory, emit, progress, say, tell
from crdtmerge.cli.replica_options import Align, Inputs, PlanFile, Roles, StatisticsOfEach, Tasks, Weights, named_paths

if TYPE_CHECKING:
    from crdtmerge.resolve.merging import Merge
    from crdtmerge.resolve.receipt import Receipt


def merge(
    models: Annotated[
        list[Path], typer.Argument(metavar="MODEL", help="Checkpoints: .safetensors files or folders, in any order.")
    ],
    base: Annotated[
        Path | None, typer.Option(metavar="MODEL", help="The model from which the others were fine-tuned.")
    ] = None,
    strategy: Annotated[str, typer.Option(metavar="NAME", help="One of `crdtmerge strategies`.")] = "weight_average",
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A parameter; KEY@GLOB=VALUE for some tensors only."),
    ] = None,
    align: Align = None,
    weight: Weights = None,
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", metavar="OUT", help="A folder, or NAME.safetensors. Left out: only digests."),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(metavar="D", help="Of the result: float64, float32, bfloat16, float16.")
    ] = None,
    device: Annotated[str, typer.Option(metavar="cpu|cuda", help="Where the arithmetic runs.")] = "cpu",
    threads: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="The bytes are the same for any number.")
    ] = None,
    role: Roles = None,
    task: Tasks = None,
    stats: StatisticsOfEach = None,
    inputs: Inputs = None,
    plan: PlanFile = None,
    exclude: Annotated[
        list[str] | None, typer.Option(metavar="GLOB", help="Tensors to copy (from the base) and not merge.")
    ] = None,
    missing: Annotated[
        str | None,
        typer.Option(metavar="base|skip", help="For tensors that some models lack: the base's, or without them."),
    ] = None,
    allow_nonfinite: Annotated[
        bool, typer.Option("--allow-nonfinite", help="Take NaN and infinity; they propagate as IEEE 754 has it.")
    ] = False,
    rehash: Annotated[
        bool, typer.Option("--rehash", help="Trust no cached digest; hash the very bytes that are merged.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Merge checkpoints into one, with a receipt.

    The result and its receipt depend on the contents, weights and parameters alone: not on the order of the models,
    their file names or shards, the number of threads or the machine.
    """
    from crdtmerge.resolve.asking import claims, recipe_of
    from crdtmerge.resolve.beside import Beside
    from crdtmerge.resolve.merging import Merge, Options
    from crdtmerge.weights.cache import DigestCache

    begin, memory = time.perf_counter(), Memory()
    recipe, t = recipe_of(
        strategy,
        parsed(settings or []),
        dtype=dtype,
        missing=missing,
        exclude=exclude or (),
        allow_nonfinite=allow_nonfinite,
        align=align,
    )
    said = claims(len(models), weights=weight, t=t, roles=role, tasks=task)
    check_device(device)
    tables, further = statistics_of(models, stats or []), named_paths("--input", inputs)
    if out is not None:
        files = [*further.values(), *(path for table in tables for path in table.values())]
        check_output(out, [*models, *files, *(path for path in (base, plan) if path)])
    with ExitStack() as stack:
        show = stack.enter_context(progress(quiet=as_json))

        def advance(stage: str, done: int, total: int) -> None:
            memory.sample()
            show(stage, done, total)

        options = Options(threads, device, rehash, None if rehash else DigestCache(), advance)
        beside = Beside(tables, further, plan)
        one = stack.enter_context(Merge(list(zip(models, said, strict=True)), recipe, base, options, beside))
        receipt, fsync_seconds, written = _write(one, out)
    labels = {c.id: c.source.label for c in one.gathered.contributions}
    if one.gathered.base:
        labels[one.gathered.base.id] = one.gathered.base.source.label
    report = report_of(receipt, out, written=written, bytes_read=one.bytes_read, labels=labels)
    resident, anonymous = memory.finish()
    report |= {"seconds": round(time.perf_counter() - begin, 6), "fsync_seconds": round(fsync_seconds, 6)}
    report |= {"peak_rss_bytes": resident, "peak_anon_bytes": anonymous}
    for note in one.notes:
        say(f"note: {note}")
    if as_json:
        emit(report)
    else:
        print_report(report)


def parsed(settings: list[str]) -> dict[str, Any]:
    """``KEY=VALUE`` and ``KEY@GLOB=VALUE`` as parameters. Raises UsageError."""
    from crdtmerge.errors import UsageError

    params: dict[str, Any] = {}
    rules: dict[str, list[dict[str, str]]] = {}
    for setting in settings:
        target, equals, value = setting.partition("=")
        key, at, glob = target.partition("@")
        if not equals or not key or (at and not glob):
            raise UsageError(f"--set {setting}: write it as KEY=VALUE, or KEY@GLOB=VALUE for some tensors.")
        if at:
            rules.setdefault(key, []).append({"filter": glob, "value": value})
        elif key in params:
            raise UsageError(f"--set {key} is given twice, as {params[key]} and {value}.")
        else:
            params[key] = value
    for key, items in rules.items():
        params[key] = items + ([{"value": params[key]}] if key in params else [])
    return params


def statistics_of(models: list[Path], said: list[str]) -> list[dict[str, Path]]:
    """``NAME=FILE`` in the order of the models, or ``MODEL:NAME=FILE``, as a table for each model. Raises UsageError.

    >>> statistics_of([Path("a"), Path("b")], ["fisher=x", "fisher=y"])[1]["fisher"].name
    'y'
    >>> statistics_of([Path("a"), Path("b")], ["b:fisher=y", "a:fisher=x"])[1]["fisher"].name
    'y'
    """
    from crdtmerge.errors import UsageError

    tables: list[dict[str, Path]] = [{} for _ in models]
    in_order: dict[str, list[Path]] = {}
    for one in said:
        target, equals, file = one.partition("=")
        model, colon, name = target.rpartition(":")
        if not (equals and name and file and bool(model) == bool(colon)):
            raise UsageError(f"--stats {one}: write it as NAME=FILE, once for each model, or as MODEL:NAME=FILE.")
        if not colon:
            in_order.setdefault(name, []).append(Path(file))
            continue
        bound = [table for table, path in zip(tables, models, strict=True) if path == Path(model)]
        if not bound:
            raise UsageError(f"--stats {one}: {model} is none of the models: {', '.join(map(str, models))}.")
        if name in bound[0]:
            raise UsageError(f"--stats {model}:{name} is given twice, as {bound[0][name]} and {file}.")
        for table in bound:
            table[name] = Path(file)
    for name, files in in_order.items():
        if any(name in table for table in tables):
            raise UsageError(
                f"--stats {name} is given in the order of the models and also as MODEL:{name}; choose one."
            )
        if len(files) != len(models):
            raise UsageError(f"--stats {name}: {len(files)} files for {len(models)} models; give one for each model.")
        for table, path in zip(tables, files, strict=True):
            table[name] = path
    return tables


def check_device(device: str) -> None:
    """Raise UsageError unless the device is there."""
    from crdtmerge.errors import UsageError
    from crdtmerge.numerics.lazy import torch

    if device != "cpu" and not device.startswith("cuda"):
        raise UsageError(f"device = {device!r}: must be cpu or cuda.")
    if device != "cpu" and not torch.cuda.is_available():
        raise UsageError("this build of torch sees no CUDA device; the bytes are the same with --device cpu.")


def check_output(out: Path, inputs: list[Path]) -> None:
    """Raise OutputError where the output would replace an input, or something that is not ours."""
    from crdtmerge.errors import OutputError
    from crdtmerge.resolve.merge import is_folder
    from crdtmerge.weights.place import replaces_ours

    target = out.resolve()
    for path in inputs:
        source = path.resolve()
        inside = target.parent == source and target.suffix == ".safetensors"
        if target == source or target in source.parents or inside:
            raise OutputError(f"{out}: would replace the input {path}; choose another -o.")
    try:
        replaces_ours(out, is_folder(out))
    except OSError as fault:
        raise OutputError(f"{out}: cannot be looked at: {fault.strerror}.") from None


class _Nowhere:
    def write(self, name: str, offset: int, data: object) -> None:
        """Drop what is merged: only its digest was asked for."""


def _write(one: Merge, out: Path | None) -> tuple[Receipt, float, int]:
    """(receipt, seconds of fsync, bytes written)."""
    from crdtmerge.resolve.merge import into_files

    if out is None:
        return one.run(_Nowhere(), folder=True), 0.0, 0
    return into_files(one, out)


def report_of(
    receipt: Receipt,
    out: Path | None,
    *,
    written: int,
    bytes_read: int,
    labels: Mapping[bytes, str] | None = None,
) -> dict[str, Any]:
    """A merge as a JSON value; ``labels`` are the paths of the inputs, by content id."""
    recipe, paths = receipt.recipe, labels or {}
    return {
        "out": str(out) if out else None,
        "merge_id": receipt.merge_id.hex(),
        "root": receipt.root.hex(),
        "recipe_id": recipe.id.hex(),
        "strategy": recipe.strategy,
        "version": recipe.version,
        "class": "E" if receipt.exact else "P",
        "seed": recipe.seed_for(receipt.root).hex(),
        "contributions": [
            {"path": paths.get(content), "id": content.hex(), "weight": str(claim.weight)}
            for content, claim in receipt.contributions
        ],
        "base": {"path": paths.get(recipe.base), "id": recipe.base.hex()} if recipe.base else None,
        "tensors": len(receipt.tensors),
        "output_digest": receipt.output_digest.hex(),
        "bytes_read": bytes_read,
        "bytes_written": written,
    }


def print_report(report: dict[str, Any]) -> None:
    """A merge for people."""
    rate = report["bytes_read"] / max(report["seconds"] - report["fsync_seconds"], 1e-9) / 1e9
    where = report["out"] or "nowhere (no -o)"
    tell(f"{report['strategy']} of {len(report['contributions'])} models, {report['tensors']} tensors -> {where}")
    tell(f"  in {report['seconds']:.2f} s ({report['fsync_seconds']:.2f} s of it fsync), {rate:.1f} GB/s")
    for contribution in report["contributions"]:
        tell(f"  {contribution['id'][:16]}  weight {contribution['weight']:<6}  {contribution['path'] or ''}".rstrip())
    if report["base"]:
        tell(f"  {report['base']['id'][:16]}  base           {report['base']['path'] or ''}".rstrip())
    tell(f"  root          {report['root']}")
    tell(f"  merge id      {report['merge_id']}")
    tell(f"  output digest {report['output_digest']}")
