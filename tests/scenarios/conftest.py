"""Every test keeps digests and keys in folders of its own, and no setting of the user's reaches it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.scenarios.worlds import KINDS, World, worlds


@pytest.fixture(autouse=True)
def _own_settings(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    home: Path = tmp_path_factory.mktemp("settings")
    monkeypatch.setenv("CRDTMERGE_CACHE", str(home / "cache"))
    monkeypatch.setenv("XDG_STATE_HOME", str(home / "state"))
    for name in ("CRDTMERGE_KERNELS", "CRDTMERGE_BLOCK", "ATEN_CPU_CAPABILITY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(params=KINDS)
def world(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[World]:
    """Pools of MergeState values, and pools of Replica folders."""
    yield from worlds(request.param, tmp_path)
