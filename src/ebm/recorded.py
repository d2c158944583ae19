"""A function as a flat list of tensor operations, recorded once and replayed.

Where tensors are small, time goes into Python and into the autograd engine, which rebuilds and
walks the same graph at every call. A record keeps that graph: the operations that a function asks
for, those of the gradients that it takes among them, are traced (`make_fx`), so a replay gives the
same bits (under autocast but for rounding: a weight that is used twice is cast twice). Compiled by
TorchInductor they are fused as well.
"""

from collections.abc import Callable, Collection, Hashable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from ebm import EBMError

Loss = tuple[Tensor, dict[str, Tensor]]
"""What is minimised, a scalar, and what is to be logged with it."""
Objective = Callable[..., Loss]
Gradient = tuple[list[Tensor | None], dict[str, Tensor]]
"""Gradient of a loss in each parameter, None where there is none, and what is to be logged."""

SAME = (torch.ops.aten.detach.default, torch.ops.aten.alias.default)
"""Operations whose result is their argument, once nobody asks for gradients."""


def kind(*inputs: Tensor) -> Hashable:
    """By what a record is found again: shapes, strides, types and devices of its inputs, and which
    of these are the same tensor."""
    names = [id(t) for t in inputs]
    pairs = zip(inputs, names, strict=True)
    return tuple((t.shape, t.stride(), t.dtype, t.device, names.index(n)) for t, n in pairs)


def record(
    function: Callable[..., Any], *inputs: Tensor, compile: bool = False, writes: bool = False
) -> Callable[..., Any]:
    """What `function` does with tensors of the same `kind` as `inputs`; to be called where
    gradients are off.

    Parameters and whatever else it looks at are held by reference: changes in place (an
    optimiser's step, `load_state_dict`) are seen, a tensor put in another's place, or another
    number, is not. If `compile`, operations are fused by TorchInductor: seconds once for each
    record, a C++ compiler is needed, and rounding differs.

    Raises EBMError where it draws random numbers or, unless it `writes`, changes a tensor that is
    not its own, as dropout and spectral normalisation do in training, or exchanges something with
    other processes; and at the first call, where TorchInductor cannot compile it.
    """
    module, constants = graph_of(function, *inputs, writes=writes)
    return partial(_compiled(module) if compile else module.forward, *constants)


class CompiledGradient:
    """The gradient of an objective, compiled once for each kind of inputs, which are tensors,
    tuples of them and what else can be hashed; a call leaves it in the `parameters` and returns
    the logs. `buffers` are what the objective may change."""

    def __init__(
        self, objective: Objective, parameters: Sequence[Tensor], buffers: Sequence[Tensor]
    ) -> None:
        self.objective, self.parameters, self.buffers = objective, parameters, buffers
        self._replays: dict[Hashable, Callable[..., Gradient]] = {}

    @torch.no_grad()
    def __call__(self, *inputs: Any) -> dict[str, Tensor]:
        leaves, structure = tree_flatten(inputs)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        others = (leaf for leaf in leaves if not isinstance(leaf, Tensor))
        if (known := (structure, *others, kind(*tensors))) not in self._replays:
            self._replays[known] = self._record(leaves, structure, tensors)
        gradients, logs = self._replays[known](*tensors)
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = None
            if gradient is not None:  # a copy: laid out as the parameter is, and nobody else's
                parameter.grad = torch.empty_like(parameter).copy_(gradient)
        return logs

    def _record(
        self, leaves: list[Any], structure: TreeSpec, tensors: list[Tensor]
    ) -> Callable[..., Gradient]:
        def gradient(*tensors: Tensor) -> Gradient:
            left = iter(tensors)
            filled = [next(left) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            with torch.enable_grad():
                loss, logs = self.objective(*tree_unflatten(filled, structure))
                found = torch.autograd.grad(loss, self.parameters, allow_unused=True)
            return list(found), {k: v.detach() for k, v in logs.items()}

        before = [buffer.clone() for buffer in self.buffers]
        replay = record(gradient, *tensors, compile=True, writes=True)
        for buffer, value in zip(self.buffers, before, strict=True):
            buffer.copy_(value)  # to record is to run once
        return replay


def _compiled(module: fx.GraphModule) -> Callable[..., Any]:
    from torch._dynamo.exc import BackendCompilerFailed

    # Each replay meets one kind of inputs only, so there is nothing to guard against; kernels that
    # were chosen by the clock could sum otherwise the next time.
    options: dict[str, Any] = {
        "guard_filter_fn": torch.compiler.skip_all_guards_unsafe,
        "deterministic": True,
    }
    compiled = torch.compile(module, dynamic=False, options=options)

    def call(*inputs: Tensor) -> Any:
        try:
            return compiled(*inputs)
        except BackendCompilerFailed as error:  # at the first call
            reason = str(error).strip().splitlines()[0]
            raise EBMError(f"compile: {reason}; without it, set compile to false") from error

    return call


def graph_of(
    function: Callable[..., Any], *inputs: Tensor, writes: bool = False
) -> tuple[fx.GraphModule, list[Tensor]]:
    """A function of constants and inputs that does what `function` does with the inputs, and those
    constants."""
    from torch.fx.experimental.proxy_tensor import make_fx  # takes a second

    module = make_fx(function)(*inputs)
    return module, _lift(module, _simplify(module, writes))


def _simplify(module: fx.GraphModule, writes: bool) -> dict[fx.Node, Tensor]:
    """Drop what does nothing; the tensors that the graph refers to, and views of them."""
    known: dict[fx.Node, Tensor] = {}
    for node in module.graph.nodes:
        if node.op == "get_attr":
            if not isinstance(getattr(module, node.target), Tensor):
                raise EBMError(
                    "Recorded: several processes exchange something there, as in batch "
                    "normalisation: set compile to false"
                )
            known[node] = getattr(module, node.target).detach()
        elif isinstance(node.target, torch._ops.OpOverload):
            _refuse_side_effects(node, () if writes else known)
            if node.target.is_view and node.args[0] in known:
                known[node] = node.target(known[node.args[0]], *node.args[1:], **node.kwargs)
            elif node.target in SAME:
                node.replace_all_uses_with(node.args[0])
    return known


def _refuse_side_effects(node: fx.Node, kept: Collection[fx.Node]) -> None:
    operation = node.target
    assert isinstance(operation, torch._ops.OpOverload)
    written = [*node.args[:1], *node.kwargs.values()] if operation._schema.is_mutable else []
    if any(isinstance(w, fx.Node) and w in kept for w in written):
        raise EBMError(f"Recorded: a tensor that is not its own is changed ({operation}): eval()?")
    if torch.Tag.nondeterministic_seeded in operation.tags:
        raise EBMError(f"Recorded: it draws random numbers ({operation}): eval()?")


def _lift(module: fx.GraphModule, known: dict[fx.Node, Tensor]) -> list[Tensor]:
    """Make arguments of the known tensors that operations use: cheaper than attributes."""
    graph, constants = module.graph, list[Tensor]()
    first = next(iter(graph.nodes))
    for node, tensor in known.items():
        if any(user not in known for user in node.users):
            with graph.inserting_before(first):
                argument = graph.placeholder(f"constant_{len(constants)}")
            node.replace_all_uses_with(argument, lambda user: user not in known)
            constants.append(tensor)
    graph.eliminate_dead_code()
    module.recompile()
    return constants
