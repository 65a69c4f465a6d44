"""The commands together, and what becomes of errors: one line on stderr, exit 0 done, 1 a check failed, 2 bad input.

Imports stay small: a command imports what it needs when it runs, so that --help answers at once.
"""

from __future__ import annotations

import signal
import sys
from typing import Annotated

import typer

from crdtmerge import __version__
from crdtmerge.cli import (
    beginning,
    contributing,
    demo,
    exchanging,
    history,
    inspection,
    keeping,
    laws,
    looking,
    merging,
    planning,
    resolving,
    serving,
    signing,
    statistics,
    strategy_list,
    symmetry,
    verification,
)
from crdtmerge.cli.console import emit, fail
from crdtmerge.errors import CrdtMergeError

app = typer.Typer(
    name="crdtmerge",
    help="Merge models so that the same set and the same recipe give the same bytes on any machine.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"crdtmerge {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options of the program itself."""


COMMANDS = (
    (merging.merge, "merge ft-a/ ft-b/ ft-c/ --base base/ --strategy ties --set density=0.3 -o merged/"),
    (verification.verify, "verify merged/"),
    (inspection.inspect, "inspect merged/"),
    (strategy_list.strategies, "strategies ties"),
    (laws.laws, "laws ties --dim 64"),
    (statistics.stats, "stats fisher ft-a/ --program model.pt2 --data examples.safetensors"),
    (planning.plan, "plan a/ b/ --strategy dam --input program=m.pt2 --input data=x.safetensors -o dam.plan"),
    (symmetry.symmetry, "symmetry --program model.pt2 -o model.symmetry.json"),
    (demo.demo, "demo -o digits"),
    (beginning.init, "init pool --base base/ --strategy ties --set density=0.3"),
    (contributing.add, "add ft-a/ -C pool --weight 2"),
    (contributing.remove, "remove 3f2a91c4 -C pool --reason 'trained on the test set'"),
    (contributing.retract, "retract 3f2a91c4 -C pool --reason poisoned"),
    (looking.status, "status -C pool"),
    (history.log, "log -C pool"),
    (looking.show, "show 3f2a91c4 -C pool"),
    (resolving.resolve, "resolve -C pool -o merged/"),
    (resolving.recipe, "recipe slerp -C pool"),
    (exchanging.export, "export -C pool -o state.safetensors"),
    (exchanging.include, "import state.safetensors -C pool"),
    (serving.sync, "sync https://peer:7070 -C pool"),
    (serving.serve, "serve -C pool --peer https://peer:7070"),
    (keeping.fsck, "fsck -C pool"),
    (keeping.gc, "gc -C pool"),
)
KEY_COMMANDS = (
    (signing.show, "keys show -C pool"),
    (signing.import_key, "keys import key.pem -C pool"),
    (signing.trust, "keys trust KEY -C pool --url https://peer:7070"),
    (signing.distrust, "keys distrust KEY -C pool"),
    (signing.invite, "keys invite https://this.host:7070 -C pool"),
    (signing.grant, "keys grant 91c4… --role curator -C pool"),
    (signing.revoke, "keys revoke 91c4… -C pool"),
)
app.add_typer(signing.app)
for group, commands in ((app, COMMANDS), (signing.app, KEY_COMMANDS)):
    for command, example in commands:
        name = example.split()[1 if group is signing.app else 0]
        group.command(name, epilog=f"Example: crdtmerge {example}")(command)


_UNREADABLE: type[Exception] = typer.BadParameter.__mro__[1]
"""What the command-line library raises for every request that it cannot read."""


class _Interrupted(BaseException):
    """Ctrl-C. Not KeyboardInterrupt, which the command-line library would turn into its own exit."""


def _interrupt(number: int, frame: object) -> None:
    raise _Interrupted


def run() -> None:
    """Run the program; errors of ours become one line and exit code 2."""
    signal.signal(signal.SIGINT, _interrupt)
    as_json = "--json" in sys.argv[1:]
    try:
        code = app(standalone_mode=False)
    except CrdtMergeError as error:
        sys.exit(fail(error, as_json=as_json))
    except _UNREADABLE as error:
        if as_json:
            emit({"error": {"kind": "UsageError", "message": error.format_message()}})  # type: ignore[attr-defined]
        error.show()  # type: ignore[attr-defined]
        sys.exit(2)
    except _Interrupted:
        print("interrupted; nothing was left behind", file=sys.stderr)
        sys.exit(130)
    sys.exit(code if isinstance(code, int) else 0)
