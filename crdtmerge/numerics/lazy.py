"""torch, imported when it is first used: importing it takes longer than most merges take to run.

from crdtmerge.numerics.lazy import torch
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
else:

    class _Torch:
        def __getattr__(self, name: str) -> Any:
            import torch

            return getattr(torch, name)

    torch = _Torch()

__all__ = ["torch"]
