"""MergeState: a pool in memory, as an immutable value."""

from crdtmerge.state.merge_state import Delta, MergeState

__all__ = ["Delta", "MergeState"]
