"""Which file a name in a checkpoint folder leads to, and which links are followed.

RULES
1. A link may lead to another place in its own folder.
2. A link may lead from ``models--X/snapshots/<revision>/...`` to ``models--X/blobs/<blob>``: the Hugging Face cache
   keeps every file so.
3. Every other link is refused: a folder from elsewhere must not choose which files of this machine are read.
"""

from __future__ import annotations

import os
from pathlib import Path

from crdtmerge.errors import CheckpointError


def lead(folder: Path, name: str) -> Path:
    """The real path of ``folder/name``. Raises CheckpointError when a link leads where none may."""
    path = folder / name
    real = Path(os.path.realpath(path))
    home = Path(os.path.realpath(folder))
    if real.is_relative_to(home) or real.parent in _blobs(home):
        return real
    raise CheckpointError(
        f"{path}: is a link to {str(real)!a}, outside its folder; only links inside the folder or within "
        "the Hugging Face cache are followed. Copy the file there, or give the path it leads to."
    )


def _blobs(home: Path) -> list[Path]:
    """The blob folders that a snapshot of the Hugging Face cache may lead to."""
    return [
        at.parent.parent / "blobs"
        for at in (home, *home.parents)
        if at.parent.name == "snapshots" and at.parent.parent.name.startswith("models--")
    ]
