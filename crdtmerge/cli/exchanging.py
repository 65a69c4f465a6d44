"""``crdtmerge export`` and ``import``: a pool's state as one file, by whatever way files travel."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from crdtmerge.cli.console import emit, progress, tell
from crdtmerge.cli.replica_options import HERE, AsJson, PoolFolder, Threads, counted, size


def export(
    out: Annotated[Path, typer.Option("-o", "--out", metavar="FILE", help="A new .safetensors file.")],
    since: Annotated[
        list[str] | None,
        typer.Option(metavar="ID", help="Only what a replica with this head lacks; once for each of its heads."),
    ] = None,
    pool: PoolFolder = HERE,
    as_json: AsJson = False,
) -> None:
    """Write the pool's state, tensors included, as one file that `crdtmerge import` and `init --from` read."""
    from crdtmerge.pool.replica import Replica

    with Replica.open(pool) as replica:
        heads = [replica.find(prefix) for prefix in since or []]
        nbytes = replica.export(out, heads)
        report = {"out": str(out), "pool": replica.pool_id.hex(), "bytes": nbytes, "ops": len(replica.opset)}
        report["heads"] = [head.hex() for head in replica.heads]
    if as_json:
        emit(report)
    else:
        tell(f"{out}: {size(nbytes)}, the state of pool {report['pool']}")


def include(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What `crdtmerge export` wrote.")],
    pool: PoolFolder = HERE,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Join an exported state into this replica: all of it, checked to the last byte, or nothing."""
    from crdtmerge.pool.replica import Replica

    with Replica.open(pool) as replica, progress(quiet=as_json) as show:
        joined, new = replica.include(file, threads=threads, progress=show)
        root = replica.root.hex()
    if as_json:
        emit({"new_ops": len(joined.new), "new_bytes": new, "root": root})
    else:
        tell(f"{counted(len(joined.new), 'operation')} and {size(new)} that are new here")
        tell(f"  root {root}")
