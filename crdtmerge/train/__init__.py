"""Training without a centre: peers train, contribute, gossip and merge what is there, round after round.

    pool = InMemory(MergeState("weight_average"))            # or a Replica, gossiped by a Node
    peer = Peer(pool, model, TorchTrainer(module, adam, batches), rule=neighbours(ring(5).metropolis(), keys))
    peer.round()

``peer`` is one peer, ``trainer`` what it trains with, ``topology`` and ``rules`` whom it mixes with, ``weighing``
what a contribution counts, ``aligning`` and ``repair`` what models that did not start from one need, ``sampling`` whose
turn it is, ``rounds`` peers in one process with their figures.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from crdtmerge.train.aligning import Alignment
    from crdtmerge.train.facts import Facts
    from crdtmerge.train.peer import Peer
    from crdtmerge.train.pool import InMemory
    from crdtmerge.train.repair import Repairer
    from crdtmerge.train.rounds import every_step, together
    from crdtmerge.train.rules import everyone, neighbours, oneself, sampled
    from crdtmerge.train.sampling import sample
    from crdtmerge.train.topology import erdos_renyi, explicit, full, ring
    from crdtmerge.train.trainer import TorchTrainer, Trainer, shuffled
    from crdtmerge.train.weighing import Weighing

_HOMES = {
    "Alignment": "aligning",
    "Facts": "facts",
    "InMemory": "pool",
    "Peer": "peer",
    "Repairer": "repair",
    "TorchTrainer": "trainer",
    "Trainer": "trainer",
    "Weighing": "weighing",
    "erdos_renyi": "topology",
    "every_step": "rounds",
    "everyone": "rules",
    "explicit": "topology",
    "full": "topology",
    "neighbours": "rules",
    "oneself": "rules",
    "ring": "topology",
    "sample": "sampling",
    "sampled": "rules",
    "shuffled": "trainer",
    "together": "rounds",
}

__all__ = [
    "Alignment",
    "Facts",
    "InMemory",
    "Peer",
    "Repairer",
    "TorchTrainer",
    "Trainer",
    "Weighing",
    "erdos_renyi",
    "every_step",
    "everyone",
    "explicit",
    "full",
    "neighbours",
    "oneself",
    "ring",
    "sample",
    "sampled",
    "shuffled",
    "together",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'crdtmerge.train' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"crdtmerge.train.{_HOMES[name]}"), name)
