"""Running the command line: in this process, where the arguments are the point, or in one of its own."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]


class Ran(NamedTuple):
    """What came of a command."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one document on stdout."""
        return json.loads(self.out)


def here(*arguments: object) -> Ran:
    """The program in this process: as the entry point runs it, so that all but an orderly exit is raised."""
    from crdtmerge.cli import main

    out, err, before = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["crdtmerge", *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        sys.argv = before
    return Ran(code, out.getvalue(), err.getvalue())


def environment(**settings: str) -> dict[str, str]:
    """This process's environment without settings of ours, and with these."""
    ours = ("CRDTMERGE_KERNELS", "CRDTMERGE_BLOCK", "ATEN_CPU_CAPABILITY", "PYTHONHASHSEED")
    return {name: value for name, value in os.environ.items() if name not in ours} | settings


def program(*arguments: object) -> list[str]:
    """The command line that runs the program."""
    return [sys.executable, "-m", "crdtmerge", *map(str, arguments)]


def process(*arguments: object, cwd: Path | None = None, settings: Mapping[str, str] | None = None) -> Ran:
    """The program in a process of its own."""
    done = subprocess.run(
        program(*arguments),
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment(**(settings or {})),
        timeout=120,
        check=False,
    )
    return Ran(done.returncode, done.stdout, done.stderr)
