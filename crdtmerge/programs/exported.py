"""An exported program as a function of its parameters: run it, watch its layers, read its batches.

The graph is called with its parameters lifted, so that nothing is swapped in and out of a module, gradients flow to the
parameters, and Python that came with the program is not run.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from crdtmerge.errors import InputError, MismatchError, NeedsError, some
from crdtmerge.programs.archive import PROGRAM_BYTES_MAX, cleaned
from crdtmerge.programs.bounds import out_of_memory

if TYPE_CHECKING:
    from torch import Tensor

Tensors = Mapping[str, "Tensor"]

Visit = Callable[["torch.fx.Node", Any, tuple[Any, ...]], Any]
"""What looks at a call of the graph: the node, its value, its arguments' values; gives back the value or another."""

_NAME = re.compile(r"(?:(?P<task>.+)\.)?(?P<which>inputs(?:\.\d+)?|labels)")


class Layer(NamedTuple):
    """What a layer with a weight did in one run: the weight's name, its input and output, and the call's arguments."""

    kind: str
    weight: str
    input: Tensor
    output: Tensor
    arguments: tuple[Any, ...]


class Program:
    """A loaded program: ``parameters`` (names of the checkpoint), ``buffers``, and ``inputs``, the number of inputs."""

    def __init__(self, path: str, digest: str, device: str = "cpu") -> None:
        """Read, compare with the digest, clean and load. Raises InputError, MismatchError."""
        self.device = torch.device(device)
        self.exported = exported = _loaded(_bytes(path, digest))
        kinds = torch.export.graph_signature.InputKind
        specs = exported.graph_signature.input_specs
        outputs = exported.graph_signature.output_specs
        self.graph: torch.fx.GraphModule = exported.graph_module
        self._order = [(spec.kind, spec.target) for spec in specs]
        self._placeholder = {spec.arg.name: spec.target for spec in specs if spec.kind == kinds.PARAMETER}
        self._buffer = {spec.arg.name: spec.target for spec in specs if spec.kind == kinds.BUFFER}
        self._user = [i for i, (kind, _) in enumerate(self._order) if kind == kinds.USER_INPUT]
        self._outputs = [
            i for i, s in enumerate(outputs) if s.kind == torch.export.graph_signature.OutputKind.USER_OUTPUT
        ]
        if len(self._outputs) < len(outputs):
            raise InputError("the program changes its own buffers: export it in evaluation mode (module.eval()).")
        _refuse_dropout(self.graph)
        held = {**exported.constants, **exported.state_dict}
        self._own = {name: x.detach().to(self.device) for name, x in held.items() if isinstance(x, torch.Tensor)}
        self.parameters = [target for kind, target in self._order if kind == kinds.PARAMETER and target]
        self.buffers = [target for kind, target in self._order if kind == kinds.BUFFER and target]
        self.inputs = len(self._user)
        self._same = self._tied()

    def _tied(self) -> dict[str, list[str]]:
        """For each parameter, the others that share its memory."""
        where = {name: (x.untyped_storage().data_ptr(), x.storage_offset(), x.shape) for name, x in self._own.items()}
        sharing: dict[Any, list[str]] = {}
        for name in self.parameters:
            sharing.setdefault(where[name], []).append(name)
        return {name: sharing[where[name]] for name in self.parameters if self._own[name].numel()}

    def fitted(self, tensors: Tensors, label: str) -> dict[str, Tensor]:
        """A model's tensors by the program's names, tied ones too. Raises MismatchError."""
        found = {name: tensors[name] for name in (*self.parameters, *self.buffers) if name in tensors}
        for name in self.parameters:
            if name not in found:
                twin = next((other for other in self._same.get(name, ()) if other in tensors), None)
                if twin is None:
                    held = some(sorted(tensors), 3)
                    raise MismatchError(
                        f"the program has {name!a}, which {label} lacks (it has {held}). Export the "
                        "program from a module whose parameters have the checkpoint's names."
                    )
                found[name] = tensors[twin]
        for name, x in found.items():
            if x.shape != self._own[name].shape:
                raise MismatchError(
                    f"the program's {name!a} has shape {list(self._own[name].shape)}; that of {label} has "
                    f"{list(x.shape)}. Export the program from a module of the same architecture."
                )
        return found

    def known(self, names: Sequence[str], label: str) -> None:
        """Raise MismatchError for a tensor that the program does not have: running it could say nothing of it."""
        unknown = sorted(set(names) - {*self.parameters, *self.buffers})
        if unknown:
            raise MismatchError(
                f"{label} has tensors that the program does not use: {some(unknown)}. Leave them out with --exclude, "
                "or export a program that uses them."
            )

    def cast(self, name: str, x: Tensor) -> Tensor:
        """A tensor in the dtype that the program has it in."""
        return x.to(device=self.device, dtype=self._own[name].dtype)

    def _flat(self, tensors: Tensors, inputs: Sequence[Tensor]) -> list[Tensor]:
        given = iter(inputs)
        user = set(self._user)
        return [
            next(given) if i in user else self.cast(str(name), tensors.get(str(name), self._own[str(name)]))
            for i, (_, name) in enumerate(self._order)
        ]

    def __call__(self, tensors: Tensors, inputs: Sequence[Tensor]) -> Tensor:
        """The program's first output. Raises MismatchError where a batch does not fit it."""
        return self._guarded(lambda: self.graph(*self._flat(tensors, inputs)))

    def watched(self, tensors: Tensors, inputs: Sequence[Tensor]) -> tuple[Tensor, list[Layer]]:
        """The first output, and every linear and convolution layer in the order of the calls."""
        watcher = _Watcher(self.graph, self._placeholder)
        return self._guarded(lambda: watcher.run(*self._flat(tensors, inputs))), watcher.layers

    def visited(self, tensors: Tensors, inputs: Sequence[Tensor], visit: Visit, last: str | None = None) -> None:
        """Run with ``visit`` looking at every call's value, up to the node called ``last``. Raises MismatchError.

        ``visit(node, value, arguments)`` gives back the value, or another that takes its place.
        """
        visitor = _Visitor(self.graph, visit, last)
        self._fitting(lambda: visitor.run(*self._flat(tensors, inputs)))

    def target(self, node: Any) -> str | None:
        """The parameter or buffer that a node of the graph stands for, if it stands for one."""
        if not isinstance(node, torch.fx.Node):
            return None
        return self._placeholder.get(node.name) or self._buffer.get(node.name)

    def alone(self, name: str) -> bool:
        """Whether a tensor is used once: by one call, under one name."""
        places = {target: at for at, target in (self._placeholder | self._buffer).items()}
        node = next(n for n in self.graph.graph.nodes if n.name == places[name])
        return len(node.users) == 1 and len(self._same.get(name, ())) < 2

    def _guarded(self, run: Callable[[], Any]) -> Tensor:
        found = self._fitting(run)
        out = found[self._outputs[0]] if isinstance(found, tuple | list) else found
        assert isinstance(out, torch.Tensor), "a program's first output is a tensor"
        return out

    def _fitting(self, run: Callable[[], Any]) -> Any:
        try:
            return run()
        except (RuntimeError, AssertionError, TypeError, IndexError, ValueError) as fault:
            if out_of_memory(fault):
                raise
            raise MismatchError(
                f"the program cannot be run with this data ({str(fault).strip().splitlines()[0][:200]}). Export it "
                "with a dynamic batch dimension, and give inputs of its dtype and shape."
            ) from fault


def kind_of(node: torch.fx.Node) -> str:
    """The name of the operator that a node calls: linear, conv2d, batch_norm; "" for what is no call."""
    return str(node.target).partition(".")[2].partition(".")[0] if node.op == "call_function" else ""


class _Visitor(torch.fx.Interpreter):
    def __init__(self, graph: torch.fx.GraphModule, visit: Visit, last: str | None) -> None:
        super().__init__(graph, garbage_collect_values=True)
        self._visit, self._last, self._over = visit, last, False

    def run_node(self, n: torch.fx.Node) -> Any:
        if self._over:
            return None
        out = super().run_node(n)
        if n.op == "call_function":
            out = self._visit(n, out, self.fetch_args_kwargs_from_env(n)[0])
        self._over = n.name == self._last
        return out


class _Watcher(torch.fx.Interpreter):
    def __init__(self, graph: torch.fx.GraphModule, names: Mapping[str, str | None]) -> None:
        super().__init__(graph, garbage_collect_values=True)
        self._names = names
        self.layers: list[Layer] = []

    def run_node(self, n: torch.fx.Node) -> Any:
        out = super().run_node(n)
        kind = kind_of(n)
        if kind in ("linear", "conv1d", "conv2d", "conv3d") and isinstance(n.args[1], torch.fx.Node):
            weight = self._names.get(n.args[1].name)
            if weight:
                args, _ = self.fetch_args_kwargs_from_env(n)
                self.layers.append(Layer(kind, weight, args[0], out, (*args[1:], n.kwargs)))
        return out


def _bytes(path: str, digest: str) -> bytes:
    try:
        if Path(path).stat().st_size > PROGRAM_BYTES_MAX:
            raise InputError(f"{path}: a program of more than {PROGRAM_BYTES_MAX} bytes is not read.")
        data = Path(path).read_bytes()
    except OSError as fault:
        raise InputError(f"{path}: the program cannot be read: {fault.strerror or fault}.") from fault
    found = hashlib.sha256(data).hexdigest()
    if found != digest:
        raise MismatchError(f"{path}: the program has digest {found[:16]}; {digest[:16]} is named. It is not loaded.")
    return data


def _loaded(data: bytes) -> Any:
    archive = cleaned(data)
    try:
        return torch.export.load(archive)
    except (
        RuntimeError,
        KeyError,
        ValueError,
        TypeError,
        AssertionError,
        AttributeError,
        NotImplementedError,
    ) as fault:
        raise InputError(
            f"the program cannot be loaded by torch {torch.__version__} ({type(fault).__name__}: {str(fault)[:200]}). "
            "Export it again with this torch."
        ) from fault


def _refuse_dropout(graph: torch.fx.GraphModule) -> None:
    for node in graph.graph.nodes:
        name = str(node.target)
        if "dropout" in name and len(node.args) > 2 and node.args[2] is True:
            raise InputError("the program drops activations at random: export it in evaluation mode (module.eval()).")


@dataclass(frozen=True)
class Batches:
    """The data of one task: inputs, one tensor for each input of the program, and labels, if there are any."""

    task: str
    inputs: tuple[Tensor, ...]
    labels: Tensor | None

    @property
    def size(self) -> int:
        """The number of examples."""
        return len(self.inputs[0])

    def part(self, start: int, stop: int) -> Batches:
        """Examples start..stop-1."""
        labels = None if self.labels is None else self.labels[start:stop]
        return Batches(self.task, tuple(x[start:stop] for x in self.inputs), labels)

    def parts(self, length: int) -> list[Batches]:
        """All examples, at most ``length`` at a time."""
        return [self.part(start, min(start + length, self.size)) for start in range(0, self.size, length)]

    def cycled(self, step: int, length: int) -> Batches:
        """The batch of a step: the next ``length`` examples, from the beginning again after the last."""
        index = torch.arange(step * length, (step + 1) * length, device=self.inputs[0].device) % self.size
        labels = None if self.labels is None else self.labels[index]
        return Batches(self.task, tuple(x[index] for x in self.inputs), labels)


def batches(data: Tensors, program: Program) -> dict[str, Batches]:
    """The data of each task, by name; the task "" where the names say none. Raises NeedsError, MismatchError."""
    tasks: dict[str, dict[str, Tensor]] = {}
    for name, x in data.items():
        said = _NAME.fullmatch(name)
        if said is None:
            raise MismatchError(f"the data has {name!a}: tensors are called inputs, labels, TASK.inputs, TASK.labels.")
        tasks.setdefault(said["task"] or "", {})[said["which"]] = x.to(program.device)
    wanted = ["inputs"] if program.inputs == 1 else [f"inputs.{i}" for i in range(program.inputs)]
    found = {}
    for task, tensors in sorted(tasks.items()):
        lacks = [key for key in wanted if key not in tensors]
        if lacks:
            raise NeedsError(
                f"the data{f' of task {task!a}' if task else ''} lacks {some(lacks)}, which the program takes."
            )
        given = [tensors[key] for key in wanted] + [x for key, x in tensors.items() if key == "labels"]
        lengths = {len(x) if x.dim() else 0 for x in given}
        if len(lengths) != 1 or 0 in lengths:
            raise MismatchError(
                f"the data{f' of task {task!a}' if task else ''} has no or unequal numbers of examples."
            )
        found[task] = Batches(task, tuple(tensors[key] for key in wanted), tensors.get("labels"))
    if not found:
        raise NeedsError("the data is empty: give a safetensors file with the tensor 'inputs' [examples, ...].")
    return found
