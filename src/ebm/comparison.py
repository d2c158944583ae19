"""Every sampler on every oracle, at an equal number of evaluations: how far off, and would one
know?

An evaluation is a call of the energy, or of the conditionals of a block of spins, for all chains
at once, with or without its gradient; parallel tempering pays for all rungs, whose energies are
multiples of one another: what a swap has to know costs at most two evaluations. Step sizes are
adapted beforehand, which is not counted (that of unadjusted Langevin is a share of MALA's); all
chains then begin where the oracle has them begin, and pay for their way from there.

Columns of the table, one row for each oracle and kernel:

    step_size             as adapted; parallel tempering: that of the target
    cost                  evaluations per transition
    acceptance            mean acceptance probability; none: the kernel refuses nothing
    swaps, round_trips    smallest mean swap acceptance of a pair of rungs; mean trips of a ladder
    error                 root mean square over chains and known expectations of (mean of a chain -
                          expectation) / standard deviation, at the end
    ess                   bulk effective sample size per 1000 evaluations of a chain, of the worst
                          known expectation; independent exact draws would have 1000
    r_hat                 of the worst known expectation; trust begins below 1.01
    tau                   autocorrelation time of the energy, in evaluations
    diverged              share of the chains that ended at something not finite

Beside the kernels, for continuous oracles, stands self-normalised importance sampling from a broad
Gaussian: its draws are no chain, its effective sample size is Kish's.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor

from ebm import EBMError, figures, metrics
from ebm.diagnostics import autocorrelation_time, diagnose, swap_rates
from ebm.estimators import kish
from ebm.oracles import ORACLES, Expectation, Ising, Oracle, Planar
from ebm.samplers import (
    HMC,
    MALA,
    Langevin,
    PowerTempering,
    RandomWalk,
    SpinFlip,
    SpinGibbs,
    State,
    Tempered,
    adapt,
    run,
)
from ebm.schema import ORACLE_TITLES
from ebm.seeds import seed

MARKS = 80  # points of an error curve
SHOWN = 1000  # evaluations of the one chain that is drawn
CELLS = 150  # of a picture's side
FEWEST = 4  # transitions of which diagnostics can be had
TARGETS = {"random walk": 0.234, "MALA": 0.574, "HMC": 0.95}
"""Acceptances to adapt to: the optima in many dimensions, and for HMC what its users take where a
density bends: steps for 0.8 are too long for the narrow parts of banana and funnel."""
UNADJUSTED = 0.25
"""Langevin's step as a share of MALA's: nothing refuses where a longer one leads."""


@dataclass
class Comparison:
    """Numbers by name, the table's rows and titled pictures, in display order."""

    metrics: dict[str, float] = field(default_factory=dict)
    table: list[dict[str, Any]] = field(default_factory=list)
    figures: list[tuple[str, str, str, Figure]] = field(default_factory=list)


class Meter:
    """Counts the calls of the functions that it was asked to watch."""

    def __init__(self) -> None:
        self.calls = 0

    def watch(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def watched(*arguments: Any) -> Tensor:
            self.calls += 1
            return function(*arguments)

        return watched


class Contender(NamedTuple):
    """A kernel, ready to sample, and where its chains begin."""

    name: str
    kernel: Any
    x: Tensor
    step_size: float | None = None


@dataclass(frozen=True)
class Chains:
    """What came of a contender: points [B, T, *], T transitions at `cost` evaluations each; for
    importance sampling `log_weight` [B, T]."""

    contender: Contender
    x: Tensor
    cost: float
    acceptance: float | None = None
    swaps: float | None = None
    round_trips: float | None = None
    log_weight: Tensor | None = None

    @property
    def evaluations(self) -> Tensor:
        """After how many evaluations each point was reached [T]."""
        return self.cost * torch.arange(1, self.x.shape[1] + 1)

    def values(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        """function(x) of all points [B, T]."""
        return metrics.in_batches(function, self.x.flatten(0, 1)).view(self.x.shape[:2])


def compare(settings: dict[str, Any]) -> Comparison:
    """All oracles of `settings["ladders"]`, with the settings of `ebm.schema.Samplers`."""
    result, curves = Comparison(), {}
    for name, ladder in settings["ladders"].items():
        seed("samplers", name, settings["seed"])
        oracle, found = ORACLES[name](), list[Chains]()
        meter = Meter()
        for contender in contenders(oracle, meter, tuple(ladder), settings):
            found.append(sample(contender, meter, settings["evaluations"]))
        if not isinstance(oracle, Ising):
            found.append(weighted(oracle, settings["chains"], settings["evaluations"]))
        result.table += [{"oracle": name, **row(oracle, chains)} for chains in found]
        curves[ORACLE_TITLES[name]] = {
            c.contender.name: _curve(c, oracle.expectations) for c in found
        }
        result.figures.append(_picture(name, oracle, found))
    caption = (
        f"Of the known expectations, over {settings['chains']} chains, by the evaluations that "
        "each chain has paid for. A curve that falls as the dashed line does has found the "
        "target; one that lies flat has not. Lines that lie on one another differ in their marks."
    )
    picture = figures.error_curves(curves)
    result.figures.insert(0, ("error", "Error against evaluations", caption, picture))
    result.metrics = {
        f"{line['oracle']}_{line['kernel'].replace(' ', '_')}_{column}": value
        for line in result.table
        for column, value in line.items()
        if column not in ("oracle", "kernel") and value is not None
    }
    return result


def contenders(
    oracle: Oracle, meter: Meter, betas: tuple[float, ...], settings: dict[str, Any]
) -> Iterator[Contender]:
    """The kernels that suit the oracle, adapted one after another."""
    x = oracle.start(settings["chains"])
    if isinstance(oracle, Ising):
        yield from _of_spins(oracle, meter, betas, x)
    else:
        yield from _continuous(meter.watch(oracle.energy), betas, x, settings)


def _of_spins(
    ising: Ising, meter: Meter, betas: tuple[float, ...], x: Tensor
) -> Iterator[Contender]:
    energy, p_up = meter.watch(ising.energy), meter.watch(ising.p_up)

    def gibbs_at(beta: float) -> SpinGibbs:
        return SpinGibbs(lambda x: p_up(x, beta), ising.blocks)

    yield Contender("spin flip", SpinFlip(energy), x)
    yield Contender("Gibbs", gibbs_at(1.0), x)
    tempered = PowerTempering(lambda beta, x: beta * energy(x), gibbs_at, betas)
    yield Contender("tempered Gibbs", tempered, x)


def _continuous(
    energy: Callable[[Tensor], Tensor],
    betas: tuple[float, ...],
    x: Tensor,
    settings: dict[str, Any],
) -> Iterator[Contender]:
    warmup = settings["warmup"]
    walk, _ = adapt(partial(RandomWalk, energy), x, warmup, TARGETS["random walk"])
    yield Contender("random walk", walk, x, walk.step_size)
    mala, _ = adapt(partial(MALA, energy), x, warmup, TARGETS["MALA"])
    short = UNADJUSTED * mala.step_size
    yield Contender("Langevin", Langevin(energy, short), x, short)
    yield Contender("MALA", mala, x, mala.step_size)
    hmc_with = partial(HMC, energy, leapfrogs=settings["leapfrogs"])
    hmc, _ = adapt(hmc_with, x, warmup, TARGETS["HMC"])
    yield Contender("HMC", hmc, x, hmc.step_size)

    def mala_at(beta: float) -> MALA:
        return adapt(partial(MALA, lambda x: beta * energy(x)), x, warmup, TARGETS["MALA"])[0]

    rungs = {beta: mala_at(beta) for beta in betas}
    tempered = PowerTempering(lambda beta, x: beta * energy(x), rungs.__getitem__, betas)
    yield Contender("tempered MALA", tempered, x, rungs[betas[-1]].step_size)


def sample(contender: Contender, meter: Meter, evaluations: int) -> Chains:
    """The chains of a contender, as many transitions as `evaluations` a chain will pay for."""
    kernel, x = contender.kernel, contender.x
    state, begun = kernel.init(x), meter.calls
    kernel.step(kernel.step(state))
    cost = (meter.calls - begun) / 2
    points, accepted, swaps = list[Tensor](), list[Tensor](), list[Tensor]()

    def observe(step: int, state: State | Tempered) -> None:
        if step:
            points.append(state.x)
            accepted.extend([state.acceptance.mean()] if state.acceptance is not None else [])
            swaps.extend([state.swap_acceptance] if isinstance(state, Tempered) else [])

    if (transitions := int(evaluations / cost)) < FEWEST:
        raise EBMError(
            f"samplers.evaluations = {evaluations}: {FEWEST} transitions of {contender.name} "
            f"take {FEWEST * cost:g}"
        )
    last = run(kernel, x, transitions, observe)
    return Chains(
        contender,
        torch.stack(points, 1),
        cost,
        torch.stack(accepted).mean().item() if accepted else None,
        swap_rates(torch.stack(swaps)).min().item() if swaps else None,
        last.round_trips.double().mean().item() if swaps else None,
    )


def weighted(oracle: Oracle, chains: int, evaluations: int) -> Chains:
    """Importance sampling by as many draws from N(0, s^2 I), s twice the largest known standard
    deviation of a coordinate."""
    s = 2 * max(e.deviation for e in oracle.expectations if e.coordinate)
    noise = torch.randn(chains, evaluations, *oracle.start(1).shape[1:], dtype=torch.float64)
    drawn = Chains(Contender("importance", None, noise[:, 0]), s * noise, 1.0)
    log_weight = noise.square().sum(2) / 2 - drawn.values(oracle.energy)
    return replace(drawn, log_weight=log_weight)


def error(chains: Chains, expectations: Sequence[Expectation]) -> Tensor:
    """[T]: root mean square over chains and expectations of the error of a chain's mean so far, in
    standard deviations. That of independent exact draws is 1 / sqrt(t)."""
    off = [
        (_means_so_far(chains.values(e.function), chains.log_weight) - e.mean) / e.deviation
        for e in expectations
    ]
    return torch.stack(off).square().mean((0, 1)).sqrt()


def _means_so_far(values: Tensor, log_weight: Tensor | None) -> Tensor:
    """Of values [B, T], at each t the mean of those up to there, each with its weight [B, T]. The
    first weights can be nothing beside those that come later, so all sums are of logs."""
    if log_weight is None:
        return values.cumsum(1) / torch.arange(1, values.shape[1] + 1)
    total = log_weight.logcumsumexp(1)
    positive, negative = (
        ((log_weight + side.relu().log()).logcumsumexp(1) - total).exp()
        for side in (values, -values)
    )
    return positive - negative


def row(oracle: Oracle, chains: Chains) -> dict[str, Any]:
    """The table's row, as explained above."""
    spent = chains.x.shape[0] * chains.evaluations[-1].item()
    ended = chains.x[:, -1].flatten(1).isfinite().all(1)
    return {
        "kernel": chains.contender.name,
        "step_size": chains.contender.step_size,
        "cost": chains.cost,
        "acceptance": chains.acceptance,
        "swaps": chains.swaps,
        "round_trips": chains.round_trips,
        "error": error(chains, oracle.expectations)[-1].item(),
        "diverged": 1 - ended.double().mean().item(),
        **_trust(oracle, chains, spent),
    }


def _trust(oracle: Oracle, chains: Chains, spent: float) -> dict[str, float | None]:
    if chains.log_weight is not None:
        ess = kish(chains.log_weight.flatten()).item()
        return {"ess": 1000 * ess / spent, "r_hat": None, "tau": None}
    found = [diagnose(chains.values(e.function)) for e in oracle.expectations]
    ess, r_hat = torch.tensor([(d.ess_bulk, d.r_hat) for d in found], dtype=torch.float64).T
    return {
        "ess": 1000 * ess.min().item() / spent,
        "r_hat": r_hat.max().item(),
        "tau": chains.cost * autocorrelation_time(chains.values(oracle.energy)),
    }


def _curve(chains: Chains, expectations: Sequence[Expectation]) -> tuple[Any, Any]:
    """Evaluations and error at points that are even on a logarithmic axis."""
    at = torch.logspace(0, math.log10(chains.x.shape[1]), MARKS).round().long().unique() - 1
    return chains.evaluations[at].numpy(), error(chains, expectations)[at].numpy()


def _picture(
    name: str, oracle: Planar | Ising, found: Sequence[Chains]
) -> tuple[str, str, str, Figure]:
    title = f"Chains: {ORACLE_TITLES[name]}"
    if isinstance(oracle, Ising):
        lines = {}
        for chains in found:
            shown = chains.evaluations <= SHOWN
            values = chains.values(oracle.expectations[0].function)[0, shown]
            lines[chains.contender.name] = chains.evaluations[shown].numpy(), values.numpy()
        caption = f"Mean spin of one chain of each sampler, over {SHOWN} evaluations."
        return name, title, caption, figures.traces(lines, "mean spin")
    paths = {
        chains.contender.name: _path(chains).numpy()
        for chains in found
        if chains.log_weight is None
    }
    caption = (
        f"One chain each, for {SHOWN} evaluations, from the cross on; blue: the density of the "
        "two coordinates."
    )
    picture = figures.chain_paths(_density(oracle), oracle.extent, paths, oracle.axes)
    return name, title, caption, picture


def _path(chains: Chains) -> Tensor:
    """The first two coordinates [T, 2] of the first chain, from where it begins."""
    shown = chains.x[0, chains.evaluations <= SHOWN]
    return torch.cat([chains.contender.x[:1], shown])[:, :2]


def _density(oracle: Planar) -> Any:
    """log p of the first two coordinates [CELLS, CELLS] over the oracle's extent."""
    x_low, x_high, y_low, y_high = oracle.extent
    unit = metrics.cell_centres(0, 1, CELLS)
    grid = torch.tensor([x_low, y_low]) + unit * torch.tensor([x_high - x_low, y_high - y_low])
    return metrics.in_batches(oracle.marginal, grid).view(CELLS, CELLS).numpy()
