"""What all samplers share: the state of a batch of chains, the contract of a kernel, the loop."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

Energy = Callable[[Tensor], Tensor]
S = TypeVar("S")

Schedule = float | Callable[[int], float]
"""A number, or a function that gives it for the transition that follows `step` earlier ones."""


class State(NamedTuple):
    """Where the chains are, and what is already known about that place.

    `x` [B, *]; `energy` [B] and `gradient` [B, *] at x; `acceptance` [B], the probability with
    which the last proposal was accepted. None: this kernel does not need it. `steps` counts the
    transitions made so far.
    """

    x: Tensor
    energy: Tensor | None = None
    gradient: Tensor | None = None
    acceptance: Tensor | None = None
    steps: int = 0


class Kernel(Protocol[S]):
    """A Markov transition on a batch of chains; all that it knows of them is an S."""

    def init(self, x: Tensor) -> S: ...

    def step(self, state: S) -> S: ...


@dataclass(frozen=True)
class Interspersed:
    """`kernel`, and before the first of every `every` steps `times` steps of `other`, a kernel on
    the same points, from where `start` puts those that may not be there; `acceptance` is that of
    the other's last proposal."""

    kernel: Kernel[State]
    other: Kernel[State]
    every: int
    times: int
    start: Callable[[Tensor], Tensor] = lambda x: x

    def init(self, x: Tensor) -> State:
        return self.kernel.init(x)

    def step(self, state: State) -> State:
        acceptance = state.acceptance
        if state.steps % self.every == 0:
            moved = run(self.other, self.start(state.x), self.times)
            acceptance = moved.acceptance
            state = self.kernel.init(moved.x)._replace(steps=state.steps)
        return self.kernel.step(state)._replace(acceptance=acceptance)


def run(
    kernel: Kernel[S],
    x: Tensor | S,
    steps: int,
    observe: Callable[[int, S], None] = lambda step, state: None,
) -> S:
    """`steps` transitions from points `x`, or on from a state that the kernel gave; `observe(step,
    state)` sees the start (0) and every step."""
    state = kernel.init(x) if isinstance(x, Tensor) else x
    observe(0, state)
    for step in range(1, steps + 1):
        state = kernel.step(state)
        observe(step, state)
    return state


def at(schedule: Schedule, step: int) -> float:
    """The value of a schedule at a step."""
    return schedule(step) if callable(schedule) else schedule


def at_milestones(
    kernel: Kernel[State], x: Tensor, steps: int, chains: int
) -> tuple[State, Tensor, list[int]]:
    """`run`, and on the way the first `chains` at some milestones: the last state, what they were
    [chains, T, *] and after which T steps."""
    marks, frames = milestones(steps), list[Tensor]()
    state = run(
        kernel,
        x,
        steps,
        lambda step, state: frames.append(state.x[:chains]) if step in marks else None,
    )
    return state, torch.stack(frames, 1), marks


def with_acceptance(kernel: Kernel[State], x: Tensor | State, steps: int) -> tuple[State, Tensor]:
    """`run`, and on the way the mean acceptance of every step: the last state, [steps]."""
    rates: list[Tensor] = []

    def observe(step: int, state: State) -> None:
        if step and state.acceptance is not None:  # that of a state it goes on from is none of its
            rates.append(state.acceptance.mean())

    state = run(kernel, x, steps, observe)
    return state, torch.stack(rates) if rates else torch.ones(0)


def milestones(steps: int) -> list[int]:
    """Steps at which to look at a chain of `steps`: 0, 1, 3, 10, 30 ... and the last."""
    between = (m for i in range(9) for m in (10**i, 3 * 10**i) if m < steps)
    return sorted({0, *between, steps})


def value_and_gradient(
    energy: Energy, x: Tensor, differentiable: bool = False
) -> tuple[Tensor, Tensor]:
    """E(x) [B] and grad E(x) [B, *], from one forward and one backward pass; the gradient with a
    graph of its own, to the parameters of E, if `differentiable`. An energy that knows a shorter
    way where no graph is asked for has a method of this name (`Recorded`)."""
    own = getattr(energy, "value_and_gradient", None)
    if own and not differentiable:
        return own(x)
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        value = energy(x)
        (gradient,) = torch.autograd.grad(value.sum(), x, create_graph=differentiable)
    return value.detach(), gradient


@dataclass(frozen=True)
class InSlices:
    """An `energy`, of whose points [B, *] no more than `rows` are differentiated at once."""

    energy: Energy
    rows: int

    def __call__(self, x: Tensor) -> Tensor:
        return self.energy(x)

    def value_and_gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """As the function of this name does it."""
        found = [value_and_gradient(self.energy, part) for part in x.split(self.rows)]
        values, gradients = zip(*found, strict=True)
        return torch.cat(values), torch.cat(gradients)


def by_row(values: Tensor, like: Tensor) -> Tensor:
    """`values` [B] as [B, 1, ...], to go with `like` [B, *]."""
    return values.view(-1, *[1] * (like.dim() - 1))


def squared_norm(x: Tensor) -> Tensor:
    """|x|^2 over all axes but the first: shape [B]."""
    return x.square().flatten(1).sum(1)


def probability(log_accept: Tensor) -> Tensor:
    """min(1, exp(log_accept)) of each chain; of one whose ratio is no number any more, as that of
    two states that cannot be, 0."""
    return log_accept.clamp(max=0).exp().nan_to_num(0)


def metropolise(state: State, proposal: State, log_accept: Tensor) -> State:
    """Each chain moves to `proposal` with the `probability` of log_accept [B], or stays."""
    acceptance = probability(log_accept)
    accept = torch.rand_like(acceptance) < acceptance
    return choose(accept, proposal, state)._replace(acceptance=acceptance)


def choose(accept: Tensor, new: State, old: State) -> State:
    """Chain by chain `new` where `accept` [B] is true, else `old`; `acceptance` is left as it was,
    and `steps` are those of `new`."""

    def chosen(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(by_row(accept, a), a, b)

    def known(a: Tensor | None, b: Tensor | None) -> Tensor | None:
        return None if a is None or b is None else chosen(a, b)

    return State(
        chosen(new.x, old.x),
        known(new.energy, old.energy),
        known(new.gradient, old.gradient),
        old.acceptance,
        new.steps,
    )
