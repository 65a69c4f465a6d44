"""``crdtmerge init``: a new pool, or a new replica of one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from crdtmerge.cli.console import emit, progress, tell
from crdtmerge.cli.replica_options import Align, AsJson, Exclude, MergedDtype, Missing, Settings, asked_recipe, short


def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where; it must not exist, or be empty.")],
    base: Annotated[
        Path | None, typer.Option(metavar="MODEL", help="The model from which all contributions are fine-tuned.")
    ] = None,
    like: Annotated[
        Path | None, typer.Option(metavar="MODEL", help="A model of the pool's architecture, where there is no base.")
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="WHERE",
            help="Join an existing pool: an invitation's URL, a folder, a bucket or an export.",
        ),
    ] = None,
    strategy: Annotated[
        str | None, typer.Option(metavar="NAME", help="How the pool merges; weight_average by default.")
    ] = None,
    settings: Settings = None,
    align: Align = None,
    dtype: MergedDtype = None,
    exclude: Exclude = None,
    missing: Missing = None,
    allow_nonfinite: Annotated[
        bool, typer.Option("--allow-nonfinite", help="Take models with NaN and infinity; they propagate.")
    ] = False,
    members_only: Annotated[
        bool, typer.Option("--members-only", help="Only keys that were granted it contribute; by default any key may.")
    ] = False,
    curator: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY|any", help="A key besides your own that removes and retracts anything; or every key."
        ),
    ] = None,
    key: Annotated[
        Path | None, typer.Option(metavar="PEM", help="Sign with this Ed25519 key; by default a new one is made.")
    ] = None,
    quota: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Bytes of tensors at most, for example 500GB.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Begin a pool: a replicated set of contributions to one model.

    Base, recipe and members are fixed in the pool's first record; replicas of different pools refuse to join.
    """
    from crdtmerge.errors import UsageError
    from crdtmerge.keys import Key
    from crdtmerge.pool.replica import Replica

    own = Key.load(key) if key else None
    room = bytes_of(quota) if quota else None
    with progress(quiet=as_json) as show:
        if source is not None:
            asked = (base, like, strategy, settings, align, dtype, exclude, missing, allow_nonfinite)
            if any((*asked, curator, members_only)):
                raise UsageError("--from takes base, recipe and members from the pool that it joins; leave them out.")
            from crdtmerge.gossip import anywhere

            replica = anywhere.begin(folder, source, key=own, quota=room, progress=show)
        else:
            recipe = asked_recipe(
                strategy or "weight_average",
                settings,
                dtype,
                exclude,
                missing,
                align=align,
                allow_nonfinite=allow_nonfinite,
            )
            replica = Replica.create(
                folder,
                recipe,
                base=base,
                like=like,
                membership="members" if members_only else "open",
                curators="any" if curator == ["any"] else [key_of(text) for text in curator or []],
                key=own,
                quota=room,
                progress=show,
            )
    with replica:
        genesis = replica.genesis
        report = {
            "pool": replica.pool_id.hex(),
            "actor": replica.author.hex(),
            "folder": str(folder),
            "recipe": replica.recipe.canonical(),
            "base": genesis.base.hex() if genesis.base else None,
            "ops": len(replica.opset),
        }
    if as_json:
        emit(report)
        return
    tell(f"pool {report['pool']} in {folder}")
    tell(f"  merges by {replica.recipe.strategy}" + (f", base {short(genesis.base)}" if genesis.base else ", no base"))
    tell(f"  signs as {report['actor']}")


_SIZES = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def bytes_of(text: str) -> int:
    """A size as people write it. Raises UsageError.

    >>> bytes_of("1.5GB")
    1500000000
    """
    from crdtmerge.errors import UsageError

    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", text.strip(), re.IGNORECASE)
    if not found:
        raise UsageError(f"{text!r} is no size; write it as 500GB or 2TB.")
    return int(float(found[1]) * _SIZES[found[2].upper()])


def key_of(text: str) -> bytes:
    """A public key in hexadecimal. Raises UsageError."""
    from crdtmerge.errors import UsageError
    from crdtmerge.keys import is_small_order

    try:
        key = bytes.fromhex(text)
    except ValueError:
        key = b""
    if len(key) != 32 or is_small_order(key):
        raise UsageError(f"{text!r} is no public key: 64 hexadecimal digits, as `crdtmerge keys show` prints them.")
    return key
