"""An energy and its gradient as a flat list of tensor operations, recorded once and replayed.

Where tensors are small a sampler's time goes into Python and into the autograd engine, which
rebuilds and walks the same graph at every step. `Recorded` keeps that graph: forward and backward
are traced together (`make_fx`), with what autograd calls, so a replay gives the same bits.
"""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from ebm import EBMError

SAME = (torch.ops.aten.detach.default, torch.ops.aten.alias.default)
"""Operations whose result is their argument, once nobody asks for gradients."""


class Recorded:
    """An energy that samplers take like any other: `HMC(Recorded(energy, x), 0.1, 10)`.

    It is recorded for points like x [B, *] at once, and anew when points of another shape first
    come. An energy that is given more, E(x, y) of a class y say, is recorded with that:
    `Recorded(energy, x, y)`, and `recorded.given(y)` is the same record for another y.

    Parameters and whatever else the energy looks at are held by reference: changes in place (an
    optimiser's step, `load_state_dict`) are seen, a tensor put in another's place, or another
    number, is not. Where a gradient needs a graph of its own (chains that are `differentiable`),
    autograd is asked after all. If `compile`, operations are fused by TorchInductor: seconds once
    for each shape, a C++ compiler is needed, and rounding differs.

    Raises EBMError where the energy draws random numbers or changes a tensor of its own, as
    dropout and spectral normalisation do in training: put the network into `eval()`.
    """

    def __init__(
        self, energy: Callable[..., Tensor], x: Tensor, *given: Tensor, compile: bool = False
    ) -> None:
        self.energy, self.compile = energy, compile
        self._given = given
        self._replays: dict[tuple[object, ...], Callable[..., tuple[Tensor, Tensor]]] = {}
        self.value_and_gradient(x)

    def given(self, *given: Tensor) -> "Recorded":
        """The energy given others of the same kind; what is recorded is shared."""
        other = copy.copy(self)
        other._given = given
        return other

    def __call__(self, x: Tensor) -> Tensor:
        """E(x) [B], as the energy itself gives it."""
        return self.energy(x, *self._given)

    def value_and_gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """E(x) [B] and grad E(x) [B, *]."""
        inputs = x, *self._given
        kind = tuple((t.shape, t.stride(), t.dtype, t.device) for t in inputs)
        with torch.no_grad():
            if kind not in self._replays:
                self._replays[kind] = self._record(*inputs)
            return self._replays[kind](*inputs)

    def _record(self, *inputs: Tensor) -> Callable[..., tuple[Tensor, Tensor]]:
        module, constants = record(self.energy, *inputs)
        if not self.compile:
            return partial(module.forward, *constants)
        # Each replay meets one kind of points only, so there is nothing to guard against.
        options: dict[str, Any] = {"guard_filter_fn": torch.compiler.skip_all_guards_unsafe}
        return partial(torch.compile(module, dynamic=False, options=options), *constants)


def record(
    energy: Callable[..., Tensor], x: Tensor, *given: Tensor
) -> tuple[fx.GraphModule, list[Tensor]]:
    """A function of (*constants, x, *given) that returns E(x, *given) and its gradient in x, and
    those constants."""
    ones = torch.ones_like(energy(x, *given))

    def both(x: Tensor, *given: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            value = energy(x, *given)
            (gradient,) = torch.autograd.grad(value, x, ones)
        return value.detach(), gradient

    module = make_fx(both)(x, *given)
    return module, _lift(module, _simplify(module))


def _simplify(module: fx.GraphModule) -> dict[fx.Node, Tensor]:
    """Drop what does nothing; the tensors that the graph refers to, and views of them."""
    known: dict[fx.Node, Tensor] = {}
    for node in module.graph.nodes:
        if node.op == "get_attr":
            known[node] = getattr(module, node.target).detach()
        elif isinstance(node.target, torch._ops.OpOverload):
            _refuse_side_effects(node, known)
            if node.target.is_view and node.args[0] in known:
                known[node] = node.target(known[node.args[0]], *node.args[1:], **node.kwargs)
            elif node.target in SAME:
                node.replace_all_uses_with(node.args[0])
    return known


def _refuse_side_effects(node: fx.Node, known: dict[fx.Node, Tensor]) -> None:
    operation = node.target
    assert isinstance(operation, torch._ops.OpOverload)
    written = [*node.args[:1], *node.kwargs.values()] if operation._schema.is_mutable else []
    if any(isinstance(w, fx.Node) and w in known for w in written):
        raise EBMError(f"Recorded: the energy changes a tensor of its own ({operation}): eval()?")
    if torch.Tag.nondeterministic_seeded in operation.tags:
        raise EBMError(f"Recorded: the energy draws random numbers ({operation}): eval()?")


def _lift(module: fx.GraphModule, known: dict[fx.Node, Tensor]) -> list[Tensor]:
    """Make arguments of the known tensors that operations use: cheaper than attributes."""
    graph, constants = module.graph, list[Tensor]()
    x = next(iter(graph.nodes))
    for node, tensor in known.items():
        if any(user not in known for user in node.users):
            with graph.inserting_before(x):
                argument = graph.placeholder(f"constant_{len(constants)}")
            node.replace_all_uses_with(argument, lambda user: user not in known)
            constants.append(tensor)
    graph.eliminate_dead_code()
    module.recompile()
    return constants
