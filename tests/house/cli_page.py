"""docs/cli.md from the program's own help: ``python -m tests.house.cli_page > docs/cli.md``."""

from __future__ import annotations

from typer.main import get_command
from typer.testing import CliRunner

from crdtmerge.cli.app import app

HEAD = """# Command line

Generated from `--help` (`make docs`). Every command exits with 0 when it is done, 1 when a check failed, 2 on bad
input or usage. With `--json` there is one JSON document on standard output; notes, progress and errors go to standard
error.

Environment: `CRDTMERGE_CACHE` is the folder of the digest cache (`$XDG_CACHE_HOME/crdtmerge` by default);
`CRDTMERGE_KERNELS=torch|numba` chooses the arithmetic and `CRDTMERGE_BLOCK` the elements read at a time (a multiple of
65536), neither of which changes a byte.
"""


def page() -> str:
    """The whole page."""
    sections = [HEAD]
    for name in _names(get_command(app)):
        shown = CliRunner().invoke(
            app, [*name.split(), "--help"], env={"COLUMNS": "100", "TERMINAL_WIDTH": "100"}, prog_name="crdtmerge"
        )
        assert shown.exit_code == 0, shown.output
        sections.append(f"## crdtmerge {name}\n\n```\n{shown.output.strip()}\n```\n")
    return "\n".join(sections)


def _names(group: object, before: str = "") -> list[str]:
    """The commands of a group and of the groups in it, sorted."""
    commands = group.commands  # type: ignore[attr-defined]
    found = []
    for name in sorted(commands):
        inner = hasattr(commands[name], "commands")
        found += _names(commands[name], f"{before}{name} ") if inner else [f"{before}{name}"]
    return found


if __name__ == "__main__":
    print(page(), end="")
