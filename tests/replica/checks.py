"""What must hold of an op set at any time: it says what the rules say of its operations, and can prove it."""

from __future__ import annotations

from typing import Any

from crdtmerge.errors import CrdtMergeError
from crdtmerge.replica import trie
from crdtmerge.replica.op import Add, Op
from crdtmerge.replica.opset import Missing, OpSet
from tests.replica.naive import Naive
from tests.replica.pools import CONTENTS, KEYS


def facts(one: OpSet) -> dict[str, Any]:
    """All that an op set says of itself."""
    return {
        "heads": one.heads(),
        "ops": tuple(op.id for op in one.ops()),
        "root": one.root,
        "state_root": one.state_root,
        "visible": one.visible(),
        "hidden": one.hidden(),
        "forks": [(fork.one.id, fork.other.id) for fork in one.forks()],
        "recipe": one.recipe,
        "live": [op.id for content in CONTENTS for op in one.live(content.id)],
        "retracts": [op.id for content in CONTENTS for op in one.retractions(content.id)],
        "void": [op.id for op in one.ops() if one.is_void(op.id)],
        "ranks": [int(one.rank(key.public)) for key in KEYS],
    }


def check_oracle(one: OpSet, oracle: Naive) -> None:
    """An op set says what the rules say of its operations."""
    found = facts(one)
    assert found["ops"] == tuple(op.id for op in sorted(oracle.ops.values(), key=lambda op: op.order)), "the operations"
    assert list(found["heads"]) == sorted(oracle.heads), "the heads are the operations that no other refers to"
    shown = {entry.id: entry for entry in found["visible"]}
    assert list(shown) == sorted(oracle.visible), "the visible contents, each once and in order"
    for content, said in oracle.visible.items():
        entry = shown[content]
        heard = {name: getattr(entry, name) for name in ("weight", "role", "files", "note", "adders")}
        heard |= {"task": entry.claim.task, "stats": dict(entry.claim.stats or {})}
        assert heard == said, f"what is said of content {content.hex()[:8]}"
    assert sorted(found["live"]) == sorted(oracle.live), "the live dots"
    assert sorted(found["retracts"]) == sorted(oracle.retracts), "the live retractions"
    assert set(found["void"]) == oracle.void, "the void operations"
    assert set(found["forks"]) == oracle.forks, "the forks"
    assert len(found["forks"]) == len(oracle.forks), "each fork once"
    assert found["recipe"] == oracle.recipe, "the recipe"
    everything = frozenset(oracle.ops)
    assert found["ranks"] == [oracle.rank(key.public, b"", everything, everything) for key in KEYS], "the ranks"
    check_hidden(one, oracle)


def check_hidden(one: OpSet, oracle: Naive) -> None:
    """What was added and is not visible is hidden, for a reason that holds."""
    hidden = one.hidden()
    assert [entry.id for entry in hidden] == sorted(oracle.contents - oracle.visible.keys()), "the hidden contents"
    for entry in hidden:
        op = oracle.ops[entry.by]
        dots = {
            dot for dot, add in oracle.ops.items() if isinstance(add.payload, Add) and add.payload.content == entry.id
        }
        reasons = {
            "retracted": entry.by in oracle.retracts and getattr(op.payload, "content", None) == entry.id,
            "removed": op.kind == "remove" and entry.by not in oracle.void and not dots.isdisjoint(op.payload.targets),
            "replaced": op.kind == "add" and entry.by not in oracle.void and not dots.isdisjoint(op.payload.targets),
            "revoked": entry.by in dots and dots <= oracle.void,
        }
        assert reasons[entry.why], f"content {entry.id.hex()[:8]} is not {entry.why} by {op.kind}"
        assert entry.why == "retracted" or dots.isdisjoint(oracle.live), "only a retraction hides a live dot"


def check_proofs(one: OpSet) -> None:
    """The root is that of the visible leaves, and each of them is proved to be under it."""
    leaves = {entry.id: entry.leaf for entry in one.visible()}
    assert one.root == trie.root(leaves), "the root is that of the visible set"
    for content, leaf in leaves.items():
        proof = one.prove(content)
        assert (proof.identity, proof.value, proof.root()) == (content, leaf, one.root), "a proof leads to the root"


def told(op: Op) -> str:
    """An operation in a line of a log."""
    key = next((at for at, key in enumerate(KEYS) if key.public == op.author), "?")
    about = getattr(op.payload, "content", getattr(op.payload, "key", b""))
    names = {manifest.id: f"content {at}" for at, manifest in enumerate(CONTENTS)}
    names |= {key.public: f"key {at}" for at, key in enumerate(KEYS)}
    what = names.get(about, about.hex()[:6])
    parents = " ".join(one.hex()[:6] for one in op.parents)
    targets = " ".join(one.hex()[:6] for one in op.payload.targets)
    return f"{op.id.hex()[:6]} key {key} {op.seq}, height {op.height}: {op.kind} {what} [{targets}] after [{parents}]"


def verdict(one: OpSet, op: Op, manifests: dict[bytes, Any]) -> str | Missing | None:
    """What an op set answers to an operation: the error, what is missing, None."""
    manifest = manifests.get(op.payload.content) if isinstance(op.payload, Add) else None
    try:
        return one.accept(op, manifest)
    except CrdtMergeError as fault:
        return f"{type(fault).__name__}: {fault}"
