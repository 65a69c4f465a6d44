"""Every test has a digest cache and a state folder of its own, and no setting of the user's reaches it."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def _own_settings(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CRDTMERGE_CACHE", "XDG_STATE_HOME"):
        folder: Path = tmp_path_factory.mktemp(name.lower())
        monkeypatch.setenv(name, str(folder))
    for name in ("CRDTMERGE_KERNELS", "CRDTMERGE_BLOCK", "ATEN_CPU_CAPABILITY"):
        monkeypatch.delenv(name, raising=False)
