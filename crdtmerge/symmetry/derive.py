"""Permutation groups of a network, found in its graph: parameters that may be reordered together.

    x W1^T -> relu -> W2^T    reordering the rows of W1 and the columns of W2 alike changes nothing

Every dimension of every value is a product of atoms (``atoms``); each call unites those that must be reordered alike
(``rules``); what the program is given, gives back, or does by operators that no rule understands is frozen. What is
left free are the groups. A rule that is missing costs groups; it never makes one that is wrong.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.export.graph_signature import InputKind, OutputKind

from crdtmerge.symmetry.atoms import Atoms, Dim, IrregularError
from crdtmerge.symmetry.groups import Axis, Group, Symmetry
from crdtmerge.symmetry.rules import POINTING, RULES
from crdtmerge.symmetry.values import Call, NotUnderstoodError, Uses, Value, shape_of, tensors_in

if TYPE_CHECKING:
    from torch import Tensor
    from torch.export import ExportedProgram
    from torch.fx import GraphModule, Node

INLINED = ("wrap_with_set_grad_enabled", "wrap_with_autocast")
"""Calls of a graph inside the graph that change how it is run, not what it computes."""

ODD = (LookupError, TypeError, ValueError, AttributeError)
"""What a rule raises for a form of its operator that it was not written for: as good as not understood."""

STATISTICS = ("running_mean", "running_var")
"""Buffers that belong to channels. Other buffers are the same in every model, and are frozen."""


class Carrier(NamedTuple):
    """A value of the graph along which a group's units lie.

    The dimension ``dimension`` of the value of ``node`` is the row-major product of ``factors``, of which the one at
    ``at`` is the units. ``consumed`` says that a sum with a parameter runs over it: it is what the next layer sees.
    """

    node: str
    dimension: int
    factors: tuple[int, ...]
    at: int
    consumed: bool = False


@dataclass(frozen=True)
class Derived:
    """What was found in a program.

    ``frozen``: calls that no rule understands, each once, in the order of the graph. ``carriers``: for each group the
    activations along which its units lie, best first: those that a parameter consumes, then the others, both in the
    order of the graph.
    """

    symmetry: Symmetry
    frozen: tuple[str, ...]
    carriers: tuple[tuple[Carrier, ...], ...]


def derived(exported: ExportedProgram) -> Derived:
    """The permutation groups of an exported program.

    Groups come in the order of the parameters, and are those of at least two elements with an axis in a parameter that
    the results depend on. Parameters that share memory are one, under each of their names.
    """
    return _Walk(exported).found()


class _Walk:
    def __init__(self, exported: ExportedProgram) -> None:
        self.atoms, self.uses = Atoms(), Uses()
        self.frozen: dict[str, str] = {}
        self.exported = exported
        self.parameters: dict[str, Value] = {}
        self.activations: dict[str, Value] = {}
        given = self._placeholders()
        outputs = self._run(exported.graph_module, given, outermost=True)
        self._bound(outputs)

    def found(self) -> Derived:
        """Groups, what was frozen, carriers."""
        atoms = self.atoms
        alive = self._alive()
        consumed = {(name, dim, atom) for name, dim, held in self.uses.columns for atom in atoms.flat(held)}
        axes: dict[int, list[Axis]] = {}
        tensors: dict[str, tuple[tuple[int, ...], ...]] = {}
        for name, value in self.parameters.items():
            position = 0
            factors = []
            for i, dim in enumerate(value.dims):
                runs = list(self._factors(dim))
                factors.append(tuple(size for size, _ in runs))
                for at, (_, atom) in enumerate(runs):
                    if atom is not None:
                        axes.setdefault(atom, []).append(Axis(name, position + at, (value.node, i, atom) in consumed))
                position += len(runs)
            tensors[name] = tuple(factors)
        kept = [atom for atom, held in axes.items() if any(axis.tensor in alive for axis in held)]
        groups = tuple(Group(atoms.size(atom) or 0, tuple(axes[atom])) for atom in kept)
        named = {axis.tensor for group in groups for axis in group.axes}
        symmetry = Symmetry(groups, {name: dims for name, dims in tensors.items() if name in named}, self._tied(named))
        frozen = tuple(f"{target} (first at {node})" for target, node in self.frozen.items())
        return Derived(symmetry, frozen, tuple(self._carriers(kept)))

    def _tied(self, named: set[str]) -> tuple[tuple[str, ...], ...]:
        """Names of one parameter each, in their order."""
        sharing: dict[int, list[str]] = {}
        for name, value in self.parameters.items():
            if name in named:
                sharing.setdefault(id(value), []).append(name)
        return tuple(tuple(sorted(names)) for names in sharing.values() if len(names) > 1)

    def _factors(self, dim: Dim) -> Iterator[tuple[int, int | None]]:
        """(size, free atom) of a dimension's factors; frozen neighbours as one, with None."""
        still = 1
        some = False
        for atom in self.atoms.flat(dim):
            if self.atoms.frozen(atom):
                still *= self.atoms.size(atom) or 0
                continue
            if still > 1:
                yield still, None
            still, some = 1, True
            yield self.atoms.size(atom) or 0, atom
        if still != 1 or not some:
            yield still, None

    def _carriers(self, kept: Sequence[int]) -> Iterator[tuple[Carrier, ...]]:
        places = {(node, dim) for node, dim in self.uses.activations}
        found: dict[int, list[Carrier]] = {atom: [] for atom in kept}
        for node, value in self.activations.items():
            for i, dim in enumerate(value.dims):
                runs = list(self._factors(dim))
                for at, (_, atom) in enumerate(runs):
                    if atom in found:
                        sizes = tuple(size for size, _ in runs)
                        found[atom].append(Carrier(node, i, sizes, at, (node, i) in places))
        for held in found.values():
            yield tuple(sorted(held, key=lambda carrier: not carrier.consumed))

    def _placeholders(self) -> list[Value]:
        """Values of the graph's inputs: parameters and channels' statistics are free, all else is frozen."""
        exported = self.exported
        nodes = [node for node in exported.graph.nodes if node.op == "placeholder"]
        held = exported.state_dict
        shared: dict[Any, Value] = {}
        given = []
        for node, spec in zip(nodes, exported.graph_signature.input_specs, strict=True):
            meta = node.meta.get("val")
            shape = shape_of(meta) if isinstance(meta, torch.Tensor) else ()
            name = spec.target or ""
            free = spec.kind == InputKind.PARAMETER or (
                spec.kind == InputKind.BUFFER and spec.persistent is not False and _statistic(node, name)
            )
            if free and name in held:
                value = shared.setdefault(_memory(held[name]), self._parameter(name, shape))
                self.parameters[name] = value
            else:
                value = Value([self.atoms.dim(size, frozen=True) for size in shape], shape)
                value.live = spec.kind == InputKind.USER_INPUT
                value.mask = _masks(meta)
            given.append(value)
        for name, x in held.items():
            if name not in self.parameters and _memory(x) in shared:
                self.parameters[name] = shared[_memory(x)]
        self._freeze_overlapping()
        return given

    def _parameter(self, name: str, shape: tuple[Any, ...]) -> Value:
        dims = [self.atoms.dim(size) for size in shape]
        return Value(dims, shape, origin=((name, tuple(frozenset((i,)) for i in range(len(shape)))),), node=name)

    def _freeze_overlapping(self) -> None:
        """Parameters that share memory in different shapes are reordered by nothing."""
        seen: dict[int, list[tuple[int, int, Value]]] = {}
        for name, value in self.parameters.items():
            x = self.exported.state_dict[name]
            start, length = x.storage_offset(), sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) + 1
            others = seen.setdefault(x.untyped_storage().data_ptr(), []) if x.numel() else []
            for begin, end, other in others:
                if other is not value and start < end and begin < start + length:
                    for dim in (*value.dims, *other.dims):
                        self.atoms.freeze(dim)
            others.append((start, start + length, value))

    def _run(self, graph: GraphModule, given: Sequence[Any], *, outermost: bool = False) -> list[Any]:
        """Walk through a graph; what it gives back."""
        held: dict[Node, Any] = {}
        arguments = iter(given)
        for node in graph.graph.nodes:
            if node.op == "placeholder":
                held[node] = next(arguments)
            elif node.op == "get_attr":
                held[node] = self._attribute(graph, str(node.target))
            elif node.op == "output":
                return list(_resolved(list(node.args[0]), held))
            else:
                held[node] = self._called(node, held)
                if outermost and isinstance(held[node], Value) and held[node].live and _floating(node):
                    self.activations[node.name] = held[node]
        return []

    def _attribute(self, graph: GraphModule, target: str) -> Any:
        found: Any = graph
        for part in target.split("."):
            found = getattr(found, part)
        if isinstance(found, torch.Tensor):
            shape = shape_of(found)
            return Value([self.atoms.dim(size, frozen=True) for size in shape], shape, mask=_masks(found))
        return found

    def _called(self, node: Node, held: dict[Node, Any]) -> Any:
        """What a call gives: by the rule of its operator, or frozen with all that it is given."""
        args, kwargs = _resolved(list(node.args), held), _resolved(dict(node.kwargs), held)
        values = list(tensors_in([*args, *kwargs.values()]))
        name = _name(node)
        if name == "getitem":
            part = args[0][args[1]] if isinstance(args[0], list) else None
            if isinstance(part, Value):
                part.node, part.mask = node.name, _masks(node.meta.get("val"))
            return part
        if name in INLINED:
            module = next(i for i, arg in enumerate(args) if isinstance(arg, torch.fx.GraphModule))
            return self._run(args[module], args[module + 1 :])
        outs = _outs(node)
        found: Any = None
        try:
            found = self._by_rule(node, name, args, kwargs, outs)
        except (NotUnderstoodError, IrregularError, *ODD):
            if values:
                self.frozen.setdefault(str(node.target), node.name)
            for value in values:
                self._freeze(value)
            found = [
                Value([self.atoms.dim(size, frozen=True) for size in shape], shape) if shape is not None else None
                for shape in outs
            ]
            if not isinstance(node.meta.get("val"), list | tuple):
                found = found[0]
        for value in tensors_in([found]):
            value.live = any(x.live for x in values)
            value.node = node.name
            value.mask = _masks(node.meta.get("val"))
        return found

    def _by_rule(self, node: Node, name: str, args: list[Any], kwargs: dict[str, Any], outs: list[Any]) -> Any:
        schema = getattr(node.target, "_schema", None)
        base = name if name in RULES else name.removesuffix("_")
        if schema is None or not str(schema.name).startswith("aten::") or base not in RULES:
            raise NotUnderstoodError
        said = dict(zip((a.name for a in schema.arguments), args, strict=False)) | kwargs
        bound = {a.name: said.get(a.name, a.default_value if a.has_default_value() else None) for a in schema.arguments}
        written = [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        call = Call(base, bound, outs, self.atoms, self.uses)
        if base not in POINTING:
            for value in call.values():
                self.atoms.freeze(value.points or ())
        found = RULES[base](call)
        self._check(found, outs)
        for which in written:
            own = bound[which]
            if which == "self" and isinstance(found, Value) and isinstance(own, Value):
                self._unite(own, found)
            elif not which.startswith("running_"):
                raise NotUnderstoodError
        return found

    def _check(self, found: Any, outs: list[Any]) -> None:
        """Raise NotUnderstoodError for a result whose dimensions do not have the sizes that the graph says."""
        values = found if isinstance(found, list) else [found]
        for value, shape in zip(values, outs, strict=True):
            if value is None and shape is None:
                continue
            if len(value.dims) != len(shape):
                raise NotUnderstoodError
            for dim, size in zip(value.dims, shape, strict=True):
                total = self.atoms.total(dim)
                if type(size) is int and size > 0 and total != size:
                    raise NotUnderstoodError
                if type(size) is not int and not all(map(self.atoms.frozen, self.atoms.flat(dim))):
                    raise NotUnderstoodError
            value.shape = shape

    def _unite(self, one: Value, other: Value) -> None:
        for dim, like in zip(one.dims, other.dims, strict=True):
            self.atoms.unite(dim, like)

    def _freeze(self, value: Value) -> None:
        for dim in (*value.dims, value.points or ()):
            self.atoms.freeze(dim)

    def _bound(self, outputs: list[Any]) -> None:
        """Results are frozen; a buffer's new value is reordered as the buffer is."""
        for value, spec in zip(outputs, self.exported.graph_signature.output_specs, strict=True):
            if not isinstance(value, Value):
                continue
            buffer = self.parameters.get(spec.target or "") if spec.kind == OutputKind.BUFFER_MUTATION else None
            if buffer is None:
                self._freeze(value)
                continue
            self.atoms.freeze(value.points or ())
            self._unite(buffer, value)

    def _alive(self) -> set[str]:
        """Names of the parameters that results depend on."""
        graph = self.exported.graph
        reached: set[Node] = set()
        waiting = [node for node in graph.nodes if node.op == "output" or _writes(node)]
        while waiting:
            node = waiting.pop()
            if node not in reached:
                reached.add(node)
                waiting += node.all_input_nodes
        used = {node.name for node in reached if node.op == "placeholder"}
        alive = {spec.target for spec in self.exported.graph_signature.input_specs if spec.arg.name in used}
        values = [id(value) for name, value in self.parameters.items() if name in alive]
        return {name for name, value in self.parameters.items() if id(value) in values}


def _resolved(given: Any, held: dict[Node, Any]) -> Any:
    """Arguments with values in the place of nodes."""
    if isinstance(given, torch.fx.Node):
        return held.get(given)
    if isinstance(given, list | tuple):
        return [_resolved(one, held) for one in given]
    if isinstance(given, dict):
        return {key: _resolved(one, held) for key, one in given.items()}
    return given


def _name(node: Node) -> str:
    """The operator's name without library and overload."""
    schema = getattr(node.target, "_schema", None)
    if schema is not None:
        return str(schema.name).rpartition("::")[2]
    return str(getattr(node.target, "__name__", node.target))


def _outs(node: Node) -> list[tuple[Any, ...] | None]:
    """Shapes of what a call gives, None for what is no tensor."""
    meta = node.meta.get("val")
    found = list(meta) if isinstance(meta, list | tuple) else [meta]
    return [shape_of(x) if isinstance(x, torch.Tensor) else None for x in found]


def _masks(meta: object) -> bool:
    return isinstance(meta, torch.Tensor) and meta.dtype in (torch.bool, torch.uint8)


def _floating(node: Node) -> bool:
    meta = node.meta.get("val")
    return isinstance(meta, torch.Tensor) and meta.dtype.is_floating_point


def _writes(node: Node) -> bool:
    """Whether a call changes one of its arguments."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and any(a.alias_info is not None and a.alias_info.is_write for a in schema.arguments)


def _statistic(node: Node, name: str) -> bool:
    """Whether a buffer holds statistics of channels, by its name or by its only use."""
    uses = {_name(user) for user in node.users}
    return name.rpartition(".")[2] in STATISTICS or (bool(uses) and all("batch_norm" in use for use in uses))


def _memory(x: Tensor) -> tuple[Any, ...]:
    """What is equal for tensors that are one in memory; an empty one is equal to none."""
    own = 0 if x.numel() else id(x)
    return x.untyped_storage().data_ptr(), x.storage_offset(), tuple(x.shape), tuple(x.stride()), own
