"""The command line: one file a command, all printing here. ``main`` is the entry point."""

from __future__ import annotations


def main() -> None:
    """Run ``crdtmerge`` with the arguments of this process."""
    import gc

    gc.set_threshold(100_000, 20, 20)  # what start-up allocates stays; it need not be looked through again and again

    from crdtmerge.cli.app import run

    run()
