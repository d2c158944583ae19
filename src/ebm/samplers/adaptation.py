"""Finding a step size before sampling: dual averaging (Hoffman & Gelman 2014, algorithm 5).

paper          | here
---------------|-------------------------------------------------------------------------
delta          | target, the acceptance asked for
alpha          | acceptance, averaged over the chains
H-bar          | error, the weighted mean of delta - alpha
mu             | log(10 step_size): a bold first guess is cheap
gamma, t0, kappa | GAMMA, T0, KAPPA, the paper's values
"""

import math
from collections.abc import Callable
from typing import TypeVar

from torch import Tensor

from ebm.samplers.kernel import Kernel, State

GAMMA, T0, KAPPA = 0.05, 10, 0.75

K = TypeVar("K", bound=Kernel[State])


def adapt(
    kernel_with: Callable[[float], K], x: Tensor, steps: int, target: float, step_size: float = 0.1
) -> tuple[K, State]:
    """A kernel whose step size makes it accept `target` of its proposals, frozen, and where the
    chains stand after the `steps` transitions of warm-up from `x` [B, *] that found it.

    `kernel_with(step_size)` is any kernel that reports its acceptance: `RandomWalk` (0.234),
    `MALA` (0.574: Roberts & Rosenthal 1998), `HMC` (0.8). While a kernel is adapted its chains are
    not exact: draws count from the returned state on, with the returned kernel.
    """
    log_step, mu = math.log(step_size), math.log(10 * step_size)
    error, average = 0.0, log_step  # the first step replaces the average
    state = kernel_with(step_size).init(x)
    for m in range(1, steps + 1):
        state = kernel_with(math.exp(log_step)).step(state)
        assert state.acceptance is not None
        error += (target - state.acceptance.mean().item() - error) / (m + T0)
        log_step = mu - math.sqrt(m) / GAMMA * error
        average += m**-KAPPA * (log_step - average)
    return kernel_with(math.exp(average)), state
