"""The process that runs a program: reads messages on standard input, answers on standard output, ends with its parent.

    {"do": "open", "program": path, "digest": ..., "device": ..., "memory": bytes}    -> {"say": "ready"}
    {"do": "keep", "group": name} + tensors                           -> nothing
    {"do": "run", "job": name, "params": {...}, "groups": {...}}      -> {"say": "progress" | "state" | "done"}

Whatever is wrong is answered as {"say": "error"}. Standard input is read by a thread of its own all the time: when it
ends, because the parent closed it or died, the process ends at once, in the middle of whatever it does.
"""

from __future__ import annotations

import os
import queue
import sys
import threading
import traceback
from types import TracebackType
from typing import IO, Any

from crdtmerge.errors import CrdtMergeError
from crdtmerge.programs.bounds import bound_memory, out_of_memory
from crdtmerge.programs.messages import receive, send

MEMORY = "the program needs more memory than there is; give it less data, or run it on a larger machine"


def main() -> None:
    """Serve until standard input ends."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print must not come between the messages
    requests: queue.SimpleQueue[tuple[dict[str, Any], dict[str, Any]]] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(sys.stdin.buffer, requests), daemon=True).start()
    _quiet()
    server = _Server(answers)
    while True:
        head, tensors = requests.get()
        try:
            server.handle(head, tensors)
        except CrdtMergeError as error:
            send(answers, {"say": "error", "kind": type(error).__name__, "message": str(error)})
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            send(answers, {"say": "error", "kind": "InputError", "message": f"{MEMORY}: {error}"})


def _read(stream: IO[bytes], requests: queue.SimpleQueue[Any]) -> None:
    try:
        while (message := receive(stream)) is not None:
            requests.put(message)
    except MemoryError:
        sys.stderr.write(f"{MEMORY}.\n")
    finally:
        os._exit(0)


def _quiet() -> None:
    """One thread and deterministic algorithms: the same bits however many cores there are. No core dumps."""
    import logging
    import resource
    import warnings

    import torch

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def _last_words(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Say what happened and end at once: an ordinary exit would wait for the thread that reads."""
    traceback.print_exception(kind, error, trace)
    sys.stderr.flush()
    os._exit(1)


class _Server:
    def __init__(self, answers: IO[bytes]) -> None:
        self._answers = answers
        self._program: Any = None
        self._groups: dict[str, dict[str, Any]] = {}
        self._fed: dict[str, Any] | None = None

    def handle(self, head: dict[str, Any], tensors: dict[str, Any]) -> None:
        """Carry out one request."""
        if head["do"] == "open":
            from crdtmerge.programs.exported import Program

            if head["device"] == "cpu":  # the driver of a GPU maps memory as it likes
                bound_memory(head["memory"])
            self._program = Program(head["program"], head["digest"], head["device"])
            send(self._answers, {"say": "ready"})
        elif head["do"] == "keep":
            held = {} if head["anew"] else self._groups.get(head["group"], {})
            self._groups[head["group"]] = held | {name: x.to(self._program.device) for name, x in tensors.items()}
        else:
            self._run(head, tensors)

    def _run(self, head: dict[str, Any], tensors: dict[str, Any]) -> None:
        from crdtmerge.programs.context import Context, Saved
        from crdtmerge.programs.exported import batches
        from crdtmerge.programs.jobs import job
        from crdtmerge.programs.runner import dataless

        def progress(done: int, total: int) -> None:
            send(self._answers, {"say": "progress", "done": done, "total": total})

        def save(step: int, state: Any) -> None:
            send(self._answers, {"say": "state", "step": step}, state)

        if self._fed is None and ("data" in self._groups or not dataless(head["params"])):
            self._fed = batches(self._groups.get("data", {}), self._program)
        context = Context(
            self._program,
            self._fed or {},
            {name: self._groups[name] for name in head["groups"]},
            head["params"],
            progress,
            save,
            None if head["step"] is None else Saved(head["step"], tensors),
            self._groups.get("rest", {}),
        )
        found = job(head["job"])(context)
        send(self._answers, {"say": "done", "values": dict(found.values)}, found.tensors)


if __name__ == "__main__":
    sys.excepthook = _last_words
    main()
