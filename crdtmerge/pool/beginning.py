"""The folder of a new replica: made under another name, so that it appears whole or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from crdtmerge.errors import OutputError
from crdtmerge.pool.room import Room
from crdtmerge.replica.contribution import Manifest
from crdtmerge.replica.genesis import Genesis

if TYPE_CHECKING:
    from crdtmerge.store.blobs import Staging


def found(room: Room, genesis: Genesis, base: Manifest | None, staging: Staging | None) -> None:
    """Keep the genesis record and the base of a new replica."""
    if staging is not None:
        staging.sync()
    with room.database.transaction():
        room.database.keep("genesis", genesis.to_bytes())
        if staging is not None:
            staging.publish(room.quota)
        if base is not None:
            room.keep_manifest(base)
            room.refresh_ready([base.id])


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder under another name, which takes its place when all went well. Raises OutputError."""
    from crdtmerge.store.disk import Disk, failing

    folder = Path(os.path.abspath(folder))  # noqa: PTH100 (links are not followed)
    staged = folder.with_name(f".{folder.name}.crdtmerge-{secrets.token_hex(4)}")
    try:
        if os.path.exists(folder) and folder.samefile("."):  # noqa: PTH110 (a link that leads nowhere is no error here)
            raise OutputError(f"{folder}: is the folder that you are in; name one that is to be made.")
        if os.path.lexists(folder) and (not folder.is_dir() or folder.is_symlink() or any(folder.iterdir())):
            raise OutputError(f"{folder}: exists and is not an empty folder; choose another place.")
        staged.mkdir(mode=0o700)
    except OSError as fault:
        raise OutputError(f"{folder}: cannot be made: {fault.strerror or fault}.") from fault
    try:
        yield staged
        with failing(folder):
            staged.rename(folder)
            Disk().sync_folder(folder.parent)
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise
