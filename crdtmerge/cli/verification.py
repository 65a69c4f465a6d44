"""``crdtmerge verify``: merge again and compare; exit 0 the same bytes, 1 different, 2 cannot tell."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from crdtmerge.cli.console import emit, progress, tell

EXIT = {"same": 0, "different": 1, "unknown": 2}


def verify(
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="What `crdtmerge merge -o` wrote: a folder or a .safetensors file.")
    ],
    against: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="MODEL", help="Where an input is now, also base, statistic or plan; not as inputs.json has it."
        ),
    ] = None,
    device: Annotated[str, typer.Option(metavar="cpu|cuda", help="Where the arithmetic runs.")] = "cpu",
    threads: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="The answer is the same for any number.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Merge again and compare every byte.

    The inputs are hashed anew. Exit code 0: the same bytes. 1: different. 2: cannot tell, because an input is missing
    or the build is another.
    """
    from crdtmerge.cli.merging import check_device
    from crdtmerge.pool.verifying import verify as verified

    check_device(device)
    with progress(quiet=as_json) as show:
        verdict = verified(out, against or [], threads=threads, device=device, progress=show)
    if as_json:
        receipt = verdict.receipt
        emit(
            {
                "out": str(out),
                "answer": verdict.answer,
                "reason": verdict.reason,
                "merge_id": receipt.merge_id.hex() if receipt else None,
                "output_digest": receipt.output_digest.hex() if receipt else None,
            }
        )
    else:
        tell(f"{verdict.answer}: {verdict.reason}")
    raise typer.Exit(EXIT[verdict.answer])
