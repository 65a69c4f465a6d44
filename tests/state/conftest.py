"""Every test keeps digests and keys in folders of its own, and no setting of the user's reaches it."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def _own_settings(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    home: Path = tmp_path_factory.mktemp("settings")
    monkeypatch.setenv("CRDTMERGE_CACHE", str(home / "cache"))
    monkeypatch.setenv("XDG_STATE_HOME", str(home / "state"))
    for name in ("CRDTMERGE_KERNELS", "CRDTMERGE_BLOCK", "ATEN_CPU_CAPABILITY"):
        monkeypatch.delenv(name, raising=False)
