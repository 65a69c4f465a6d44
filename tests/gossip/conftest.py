"""The same settings as the tests of ``pool``: folders of their own, and in this process no disk is waited for."""

from __future__ import annotations

from tests.pool.conftest import _own_settings

__all__ = ["_own_settings"]
