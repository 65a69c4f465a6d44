"""What holds for all tests: one thread inside libraries, and modules that are compiled once, not by every process.

Tests run side by side, and threads that spin starve each other; a test that starts a process waits for its imports.
"""

from __future__ import annotations

import os
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
