"""``crdtmerge keys``: who signs here, and who else may do what."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from crdtmerge.cli.console import emit, tell
from crdtmerge.cli.replica_options import HERE, AsJson, PoolFolder, Reason

app = typer.Typer(
    name="keys", help="The replica's key, and the members of its pool.", no_args_is_help=True, rich_markup_mode=None
)

KeyText = Annotated[str, typer.Argument(metavar="KEY", help="A public key, 64 hexadecimal digits.")]


def show(pool: PoolFolder = HERE, as_json: AsJson = False) -> None:
    """Print the key that signs here and its rank, then every key that is known in the pool."""
    from crdtmerge.pool.replica import Replica

    with Replica.open(pool) as replica:
        own = replica.author
        trusted = {peer.key: peer.url for peer in replica.peers.every()}
        others = sorted((replica.known_keys() | trusted.keys()) - {own})
        ranks = {key: replica.opset.rank(key).name.lower() for key in [own, *others]}
        folder = str(replica.folder / "key.pem")
    if as_json:
        keys = [
            {"key": key.hex(), "rank": rank, "trusted": key in trusted, "url": trusted.get(key)}
            for key, rank in ranks.items()
        ]
        emit({"key": own.hex(), "file": folder, "rank": ranks[own], "keys": keys})
        return
    for key, rank in ranks.items():
        peer = f"  trusted peer{' at ' + url if (url := trusted[key]) else ''}" if key in trusted else ""
        tell(f"{key.hex()}  {rank}" + (f"  signs here ({folder})" if key == own else peer))


def import_key(
    pem: Annotated[Path, typer.Argument(metavar="PEM", help="A private Ed25519 key in PEM.")],
    pool: PoolFolder = HERE,
    as_json: AsJson = False,
) -> None:
    """Sign with another key from now on. The old one is replaced; keep a copy if you need it."""
    from crdtmerge.keys import Key
    from crdtmerge.pool.replica import Replica

    with Replica.open(pool) as replica:
        replica.import_key(Key.load(pem))
        own = replica.author
    if as_json:
        emit({"key": own.hex()})
    else:
        tell(f"signs as {own.hex()} from now on")


def trust(
    key: KeyText,
    url: Annotated[str | None, typer.Option(metavar="URL", help="Where it listens: https://HOST:PORT.")] = None,
    pool: PoolFolder = HERE,
    as_json: AsJson = False,
) -> None:
    """Let a peer that holds this key talk to this replica. A running node learns of it within a second.

    Trust is between machines and this replica's alone; what a key may do in the pool is another matter (keys grant).
    """
    from crdtmerge.cli.beginning import key_of
    from crdtmerge.gossip import address
    from crdtmerge.pool.replica import Replica

    found = key_of(key)
    where = address.peer(f"{url}#{found.hex()}").url if url else None
    with Replica.open(pool) as replica:
        replica.peers.trust(found, where)
    if as_json:
        emit({"key": found.hex(), "url": where})
    else:
        tell(f"{found.hex()} is trusted" + (f" and listens at {where}" if where else ""))


def distrust(key: KeyText, pool: PoolFolder = HERE, as_json: AsJson = False) -> None:
    """Let a peer talk to this replica no longer."""
    from crdtmerge.cli.beginning import key_of
    from crdtmerge.errors import UsageError
    from crdtmerge.pool.replica import Replica

    found = key_of(key)
    with Replica.open(pool) as replica:
        known = replica.peers.distrust(found)
    if not known:
        raise UsageError(f"{found.hex()} is not trusted here; `crdtmerge keys show` lists who is.")
    if as_json:
        emit({"key": found.hex()})
    else:
        tell(f"{found.hex()} is trusted no longer")


def invite(
    url: Annotated[
        str, typer.Argument(metavar="URL", help="Where a node of this replica is reached: https://HOST:PORT.")
    ],
    hours: Annotated[float, typer.Option(metavar="H", min=0.001, help="How long it stands.")] = 24.0,
    pool: PoolFolder = HERE,
    as_json: AsJson = False,
) -> None:
    """Print a URL with which one new replica joins, once: crdtmerge init DIR --from URL.

    It holds a secret: hand it over where nobody else reads it.
    """
    from crdtmerge.errors import UsageError
    from crdtmerge.gossip import address
    from crdtmerge.pool.replica import Replica

    with Replica.open(pool) as replica:
        where = address.peer(f"{url}#{replica.author.hex()}")
        if where.key is None:
            raise UsageError(f"{url}: invitations need TLS: https://HOST:PORT.")
        text = address.Invitation(where, replica.peers.invite(hours * 3600)).text
    if as_json:
        emit({"invitation": text})
    else:
        tell(text)


def grant(
    key: KeyText,
    role: Annotated[
        str, typer.Option(metavar="member|curator", help="To contribute, or also to remove anything.")
    ] = "member",
    pool: PoolFolder = HERE,
    as_json: AsJson = False,
) -> None:
    """Give a key a role in the pool. Only founders can: the curators whom the pool began with."""
    from crdtmerge.cli.beginning import key_of
    from crdtmerge.errors import UsageError
    from crdtmerge.pool.replica import Replica

    if role != "member" and role != "curator":
        raise UsageError(f"role = {role!r}: must be member or curator.")
    with Replica.open(pool) as replica:
        op = replica.grant(key_of(key), "curator" if role == "curator" else "member")
    _done(as_json, op.id, f"{key.lower()} is a {role} now")


def revoke(key: KeyText, reason: Reason = None, pool: PoolFolder = HERE, as_json: AsJson = False) -> None:
    """Take back what a key may do. What it did until now and is known here still counts; nothing later does."""
    from crdtmerge.cli.beginning import key_of
    from crdtmerge.pool.replica import Replica

    with Replica.open(pool) as replica:
        op = replica.revoke(key_of(key), reason=reason)
    _done(as_json, op.id, f"{key.lower()} is revoked")


def _done(as_json: bool, op: bytes, text: str) -> None:
    if as_json:
        emit({"op": op.hex()})
    else:
        tell(text)
