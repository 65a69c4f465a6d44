"""The permutation groups of a program, tried on made-up inputs.

    {"symmetry": the one text, "frozen": calls that are not understood, "change": largest change, "failing": groups}

Parameters: those of ``probes``. Each of ``SEEDS`` trials reorders all groups at random; where a result changes, the
groups that change it alone are named.
"""

from __future__ import annotations

import math

from crdtmerge.programs.context import Context, Result
from crdtmerge.programs.probes import probe
from crdtmerge.symmetry.check import failing, lifted
from crdtmerge.symmetry.derive import derived

SEEDS = 3


def run(context: Context) -> Result:
    """``symmetry``: values alone; ``change`` is None where it is not finite."""
    exported = context.program.exported
    found = derived(exported)
    inputs = probe(context)[0].inputs
    change, wrong = 0.0, dict[int, None]()
    for seed in range(SEEDS if found.symmetry.groups else 0):
        moved, bad = failing(lifted(exported), exported.state_dict, found.symmetry, inputs, seed)
        change = max(change, moved)
        wrong |= dict.fromkeys(bad)
        context.progress(seed + 1, SEEDS)
    return Result(
        {
            "symmetry": found.symmetry.encode().decode(),
            "frozen": list(found.frozen),
            "change": change if math.isfinite(change) else None,
            "failing": sorted(wrong),
        },
        {},
    )
