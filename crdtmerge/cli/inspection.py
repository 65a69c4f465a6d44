"""``crdtmerge inspect``: what a checkpoint holds, and the content id that a merge knows it by."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from crdtmerge.cli.console import emit, progress, say, tell


def inspect(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A .safetensors file or a checkpoint folder.")],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Print a checkpoint's tensors and content id.

    Equal contents have equal ids whatever their files look like.
    """
    from crdtmerge.numerics.workers import Workers
    from crdtmerge.resolve.gather import known
    from crdtmerge.resolve.sources import FileSource
    from crdtmerge.weights.cache import DigestCache

    source = FileSource(path)
    total = sum(entry.nbytes for entry in source.entries.values())
    done = 0
    with progress(quiet=as_json) as show, Workers() as workers:

        def advance(step: int) -> None:
            nonlocal done
            done += step
            show("reading", done, total)

        found = known(source, workers, DigestCache(), advance)
    source.close()
    for note in source.checkpoint.notes:
        say(f"note: {note}")
    rows = [
        {
            "name": name,
            "dtype": entry.dtype.name,
            "shape": list(entry.shape),
            "digest": found.facts[name].digest.hex(),
            "nonfinite": (found.facts[name].nonfinite or (0, 0))[0],
        }
        for name, entry in source.entries.items()
    ]
    if as_json:
        emit({"path": str(path), "id": found.id.hex(), "bytes": total, "tensors": rows})
        return
    width = max((len(ascii(row["name"])) for row in rows), default=0)
    for row in rows:
        bad = f"  {row['nonfinite']} NaN or infinite" if row["nonfinite"] else ""
        shape = "x".join(map(str, source.entries[str(row["name"])].shape)) or "scalar"
        tell(f"{row['name']!a:<{width}}  {row['dtype']:<5} {shape:<16} {str(row['digest'])[:16]}{bad}")
    tell(f"{len(rows)} tensors, {total} bytes")
    tell(f"content id {found.id.hex()}")
