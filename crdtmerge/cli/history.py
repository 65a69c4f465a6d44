"""``crdtmerge log``: the pool's history in words, one operation a line; and what else prints such lines."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from crdtmerge.cli.console import emit, quoted, tell
from crdtmerge.cli.replica_options import HERE, AsJson, PoolFolder, counted

if TYPE_CHECKING:
    from crdtmerge.pool.replica import Replica
    from crdtmerge.replica.op import Op


def log(
    last: Annotated[int | None, typer.Option("-n", "--last", metavar="N", min=1, help="Only the last N.")] = None,
    pool: PoolFolder = HERE,
    as_json: AsJson = False,
) -> None:
    """Print the pool's history: who did what and why, causes before effects, and when it was seen here (UTC)."""
    from crdtmerge.pool.replica import Replica

    with Replica.open(pool) as replica, replica.snapshot():
        lines = [line_of(replica, op) for op in replica.last_ops(last)]
        own = replica.author.hex()
    if as_json:
        emit(lines)
        return
    for line in lines:
        tell_line(line, own)


def tell_line(line: dict[str, Any], own: str, indent: str = "") -> None:
    """Print an operation; the key ``own`` is called you."""
    who = "you" if line["author"] == own else line["author"][:12]
    tell(f"{indent}{line['id'][:12]}  {line['seen'] or '?':<20}  {who:<12}  {_said(line)}")
    if line["void"]:
        tell(f"{indent}{'':<14}void: {line['void']}")


def line_of(replica: Replica, op: Op) -> dict[str, Any]:
    """An operation as a JSON value."""
    seen = replica.seen(op.id)
    void = replica.opset.is_void(op.id)
    by = sorted({revoke.author.hex()[:12] for revoke in replica.opset.revoked_by(op)}) if void else []
    return {
        "id": op.id.hex(),
        "seen": datetime.fromtimestamp(seen, UTC).strftime("%Y-%m-%d %H:%M:%SZ") if seen else None,
        "author": op.author.hex(),
        "incarnation": op.incarnation.hex(),
        "seq": op.seq,
        "height": op.height,
        "kind": op.kind,
        **_told(replica, op),
        "void": f"its key was revoked by {', '.join(by)}" if by else "its right was revoked" if void else None,
    }


def _told(replica: Replica, op: Op) -> dict[str, Any]:
    """What an operation says, by kind."""
    from crdtmerge.replica.op import Add, Grant, Remove, Retract, Revoke, SetRecipe

    payload = op.payload
    told: dict[str, Any] = {}
    if isinstance(payload, Add):
        says = {name: value for name, value in payload.says.value.items() if name in ("weight", "role", "task", "note")}
        hidden = replica.opset.why_hidden(payload.content)
        told = {"content": payload.content.hex(), "says": says, "hidden": hidden.why if hidden else None}
        told["replaces"] = [one.hex() for one in payload.replaces]
    elif isinstance(payload, Retract):
        told = {"content": payload.content.hex(), "reason": payload.reason}
    elif isinstance(payload, Remove):
        ended = [replica.opset.op(one).payload for one in payload.targets]
        contents = sorted({one.content.hex() for one in ended if isinstance(one, Add | Retract)})
        told = {"contents": contents, "targets": [one.hex() for one in payload.targets], "reason": payload.reason}
    elif isinstance(payload, Grant):
        told = {"key": payload.key.hex(), "role": payload.role}
    elif isinstance(payload, Revoke):
        told = {"key": payload.key.hex(), "heads": [one.hex() for one in payload.heads], "reason": payload.reason}
    elif isinstance(payload, SetRecipe):
        told = {"recipe": dict(payload.recipe)}
    return told


def _said(line: dict[str, Any]) -> str:
    """What an operation says, in words."""
    kind, words = line["kind"], list[str]()
    if kind == "add":
        says = {name: value if name in ("weight", "role") else quoted(value) for name, value in line["says"].items()}
        note = says.pop("note", "")
        words = [line["content"][:12], *(f"{name} {value}" for name, value in says.items()), note]
        words.append(f"in place of {counted(len(line['replaces']), 'ADD')} of its own" if line["replaces"] else "")
        words.append(f"(now {line['hidden']})" if line["hidden"] else "")
    elif kind in ("remove", "unretract"):
        count = len(line["targets"])
        words = [*(content[:12] for content in line["contents"]), f"({count} seen)" if count > 1 else ""]
    elif kind == "retract":
        words = [line["content"][:12]]
    elif kind == "grant":
        words = [line["key"][:12], line["role"]]
    elif kind == "revoke":
        kept = f"(what was seen of it until then counts: {counted(len(line['heads']), 'chain')})"
        words = [line["key"][:12], kept if line["heads"] else "(nothing of it counts)"]
    elif kind == "recipe":
        words = [line["recipe"]["strategy"], *(f"{name}={value}" for name, value in line["recipe"]["params"].items())]
    reason = f"  because {quoted(line['reason'])}" if line.get("reason") else ""
    return f"{kind:<9} {'  '.join(word for word in words if word)}{reason}"
