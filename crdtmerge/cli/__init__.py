"""The command line: one file a command, all printing here. ``main`` is the entry point."""

from __future__ import annotations


def main() -> None:
    """Run ``crdtmerge`` with the arguments of this process."""
    from crdtmerge.cli.app import run

    run()
