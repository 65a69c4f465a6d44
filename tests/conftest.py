"""What holds for all tests: libraries compute in one thread, as tests run side by side and threads that spin starve."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
