"""The door of the op set: which operations are taken. RULES 2 to 4 of ``opset``.

Every rule depends on an operation, its past and its content alone, so that what one replica refuses, all refuse.
"""

from __future__ import annotations

from crdtmerge.errors import NotAllowedError, OpError, UsageError
from crdtmerge.recipe import Recipe
from crdtmerge.replica.architecture import Architecture
from crdtmerge.replica.contribution import Manifest
from crdtmerge.replica.genesis import Genesis
from crdtmerge.replica.log import Log
from crdtmerge.replica.members import Rank
from crdtmerge.replica.op import Add, Op, Remove, Retract, Revoke, SetRecipe, Unretract

_ACTS_ON: dict[type, type] = {Add: Add, Remove: Add, Unretract: Retract}

_IS = {Rank.NOBODY: "no member", Rank.MEMBER: "a member", Rank.CURATOR: "a curator", Rank.FOUNDER: "a founder"}


def check(log: Log, op: Op) -> None:
    """Rules 2 to 4. Raises OpError or NotAllowedError."""
    where = f"{op.kind} by {op.author.hex()[:16]}"
    parents = [log.op(one) for one in op.parents]
    if op.height != 1 + max((parent.height for parent in parents), default=0):
        raise OpError(f"{where}: height {op.height} is not one more than that of its parents.")
    if op.prev is not None:
        before = log.op(op.prev)
        if (before.author, before.incarnation, before.seq) != (op.author, op.incarnation, op.seq - 1):
            raise OpError(f"{where}: its predecessor is not the one before it in its chain.")
    _check_targets(log, op, where)
    needed = log.needed(op)
    past = log.past_of(op)
    rank = log.authority().rank(op.author, op.id, past, at_the_door=True)
    if rank < needed:
        raise NotAllowedError(_not_allowed(op, rank, needed, log.genesis))


def _check_targets(log: Log, op: Op, where: str) -> None:
    payload = op.payload
    wanted = _ACTS_ON.get(type(payload))
    targets = [log.op(one) for one in payload.targets]
    if wanted and any(type(target.payload) is not wanted for target in targets):
        raise OpError(f"{where}: acts on operations that are no {wanted.__name__.upper()}.")
    if isinstance(payload, Add) and any(target.author != op.author for target in targets):
        raise OpError(f"{where}: replaces what another key added.")
    if isinstance(payload, Revoke):
        if any(target.author != payload.key for target in targets):
            raise OpError(f"{where}: names as last valid an operation of another key.")
        if log.genesis.curators != "any" and op.author in log.genesis.curators:
            _check_revoke(log, op.author, payload, where)
    if isinstance(payload, SetRecipe):
        _check_recipe(log, payload, where)


def _check_revoke(log: Log, author: bytes, payload: Revoke, where: str) -> None:
    if not log.authority().may_revoke(author, payload.key):
        raise NotAllowedError(f"{where}: a founder is revoked only by one whom the genesis record names before it.")


def _check_recipe(log: Log, payload: SetRecipe, where: str) -> None:
    try:
        recipe = Recipe.from_canonical(payload.recipe)
        if recipe.canonical() != payload.recipe:
            raise ValueError("not in its canonical form")
    except (ValueError, KeyError, TypeError, UsageError) as fault:
        raise OpError(f"{where}: not a complete recipe ({fault}).") from None
    if recipe.base != log.genesis.base:
        raise OpError(f"{where}: its recipe has another base than the pool.")


def check_manifest(log: Log, payload: Add, manifest: Manifest) -> None:
    """Rule 3. Raises OpError or MismatchError."""
    where = f"content {payload.content.hex()[:16]}"
    if manifest.id != payload.content:
        raise OpError(f"{where}: the manifest that came with it is that of content {manifest.id.hex()[:16]}.")
    if manifest.kind != "full":
        raise OpError(f"{where}: is of kind {manifest.kind}; this version takes full models.")
    if log.genesis.architecture is not None:
        log.genesis.architecture.check(Architecture.of(manifest.rows), log.genesis.recipe, where)


def _not_allowed(op: Op, rank: Rank, needed: Rank, genesis: Genesis) -> str:
    key = op.author.hex()
    if genesis.curators == "any" and needed is Rank.FOUNDER:
        return f"{op.kind} by {key[:16]}: in this pool every key is a curator; there are no members to manage."
    was = f"the key was {_IS[rank]}, as far as it had seen"
    said = f"{op.kind} by {key[:16]}: that takes {_IS[needed]} of the pool; {was}."
    if needed is Rank.FOUNDER:
        return said
    role = "member" if needed is Rank.MEMBER else "curator"
    return f"{said} A founder makes it one with: crdtmerge keys grant {key} --role {role}"
