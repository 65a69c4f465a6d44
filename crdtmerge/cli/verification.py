"""``crdtmerge verify``: merge again and compare; exit 0 the same bytes, 1 different, 2 cannot tell."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from crdtmerge.cli.console import emit, progress

EXIT = {"same": 0, "different": 1, "unknown": 2}


def verify(
    out: Annotated[Path, typer.Argument(help="What `crdtmerge merge -o` wrote: a folder or a .safetensors file.")],
    against: Annotated[
        list[Path] | None, typer.Option(help="Where an input is now (the base too); instead of inputs.json.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[int | None, typer.Option(min=1)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Merge again from the inputs, hashed anew, and compare every byte.

    Exit code 0: the same bytes. 1: different. 2: cannot tell, because an input is missing or the build is another.
    """
    from crdtmerge.cli.merging import check_device
    from crdtmerge.resolve.verify import verify as verified

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
        print(f"{verdict.answer}: {verdict.reason}")
    raise typer.Exit(EXIT[verdict.answer])
