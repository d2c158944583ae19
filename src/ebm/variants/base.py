"""The contract of a variant, and the one place where a gradient becomes a step."""

import logging
import math
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager
from copy import deepcopy
from functools import cache, cached_property
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import update_bn

from ebm import parallel
from ebm.recorded import CompiledGradient, Objective

log = logging.getLogger(__name__)

N = TypeVar("N", bound=nn.Module)

WAYS = ("chain", "chain_steps")
"""What samples have beside points that were drawn: some chains on their way, and its steps."""

SLICE = 4096
"""Points that a generator makes at once."""

BATCHES, BATCH = 32, 512
"""Latents whose activations say how an averaged generator normalises."""


class EBM(nn.Module):
    """An energy-based model p(x) = exp(-E(x)) / Z together with the way it is trained.

    Parameters, persistent chains and counters are module state. With that of the optimisers, it is
    all that a checkpoint holds.
    """

    classes = 0
    """How many classes the model is conditional on; 0: it knows none and is given no labels."""

    normalised = False
    """Whether `energy` is -log p(x) by the model's own account, with log Z in it."""

    support: tuple[float, float] | None = None
    """The bounds of every axis beyond which the density is 0 by definition, if there are any."""

    compiled = False
    """Whether what `minimise` is given is compiled."""

    @property
    def fused(self) -> bool | None:
        """What optimisers take as `fused`: True where training is compiled, else None, PyTorch's
        choice. Those of flows and contrastive models always are."""
        return self.compiled or None

    sharded: tuple[str, ...] = ()
    """The buffers whose rows are chains of their own: processes that train together share them."""

    @property
    def needs_labels(self) -> bool:
        """Whether `training_step` is to be given classes."""
        return self.classes > 0

    def energy(self, x: Tensor) -> Tensor:
        """E(x) for x of shape [B, *]: shape [B], in nats, lower = more likely."""
        raise NotImplementedError

    def training_step(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        """The algorithm box of the paper on one batch [B, *], with its classes [B] where the model
        is conditional; detached scalars to log."""
        raise NotImplementedError

    def sample(self, n: int, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """`samples` [n, *], which may be none, and what else is worth keeping, under names that
        evaluation knows, or others:

            generator            [n, *], where the chains began whose ends the samples are
            acceptance           of each step, or of each chain's last
            labels               [n], the classes that were asked for
            probability          [n, *], of pixels of which the samples are draws
            chain, chain_steps   [m, T, *], the way of some chains, and after which T steps
        """
        raise NotImplementedError

    def initialise(self, data: Tensor, labels: Tensor | None = None) -> None:
        """Set what depends on the training data [N, *], and on their classes [N] where the model
        needs them, once, before the first step."""

    @property
    def initialises(self) -> bool:
        """Whether there is anything to set: all data at once as floats can be more than fits."""
        return type(self).initialise is not EBM.initialise

    def finish(self) -> None:
        """What is to be done once after the last training step."""

    def portraits(self) -> dict[str, Tensor]:
        """Parameters worth looking at, by name: images [n, height, width]."""
        return {}

    def log_partition(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor] | None:
        """log Z from below and from above; None where the variant has no estimator of its own."""
        return None

    def log_likelihood(self, x: Tensor) -> Tensor | None:
        """log p(x) [B] of data [B, *], of grey images of their levels, in nats; None where log Z
        is not known."""
        return -self.energy(x) if self.normalised else None

    def classify(self, x: Tensor) -> dict[str, Tensor]:
        """Classes [B] of data [B, *] by name: `accuracy`, the model's own; nothing of a model
        that knows none."""
        return {}

    def configure_optimizers(self) -> dict[str, Optimizer]:
        """What trains the parameters, by name; none where `initialise` does it all."""
        return {}

    @cached_property
    def optimizers(self) -> dict[str, Optimizer]:
        """`configure_optimizers`, once, when training first asks for them: a model that only
        samples or scores does not wait for the second or two that PyTorch takes to import them."""
        return self.configure_optimizers()

    def minimise(
        self,
        name: str,
        objective: Objective,
        *inputs: Any,
        clip: float = math.inf,
        norm: str = "gradient_norm",
    ) -> dict[str, Tensor]:
        """One step of the optimiser `name` down the gradient of objective(*inputs), which gives
        the loss, a scalar, and what is to be logged with it, by name; returns that and, as `norm`,
        the norm of the gradient before it is cut to `clip`.

        `inputs` are tensors, tuples of them, and what else can be hashed. If the model is to be
        `compiled`, so is the objective, which then may draw nothing and look at nothing else that
        changes but tensors of the model.
        """
        optimizer = self.optimizers[name]
        if not self.compiled:
            loss, logs = objective(*inputs)
            logs = {k: v.detach() for k, v in logs.items()}
            return logs | {norm: descend(optimizer, loss, clip)}
        if (known := (name, objective, self.training)) not in self.records:
            self.records[known] = CompiledGradient(
                objective, moved_by(optimizer), list(self.buffers())
            )
        gradient: CompiledGradient = self.records[known]
        logs = gradient(*inputs)
        return logs | {norm: follow(optimizer, gradient.parameters, clip)}

    @cached_property
    def records(self) -> dict[Hashable, Any]:
        """What was recorded of this model, whose tensors it holds: a copy begins without, and so
        does a model that is moved to another device or type."""
        return {}

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "records"}

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        vars(self).pop("records", None)
        return super()._apply(*args, **kwargs)


class Generative(EBM):
    """One that draws as a network G does of z ~ N(0, I)."""

    generator: nn.Module
    latent: int

    def finish(self) -> None:
        """Give the averaged generator statistics of its own, where it normalises batches: those
        that it follows belong to other weights."""
        average = self.averaged_generator()
        if average is not None:
            with torch.no_grad():
                update_bn((self._prior(BATCH) for _ in range(BATCHES)), average)

    def averaged_generator(self) -> nn.Module | None:
        """The moving average of the generator, if there is one."""
        return None

    def generate(self, z: Tensor) -> Tensor:
        """G(z), by the moving average where there is one: [B, latent] -> [B, *]."""
        return (self.averaged_generator() or self.generator)(z)

    def generated(self, z: Tensor) -> Tensor:
        """As `generate`, of any number of latents, without their graph."""
        return in_slices(self.generate, z)

    def _prior(self, n: int) -> Tensor:
        """n latents z [n, latent]."""
        return standard_normal(self.generator, n, self.latent)


@torch.no_grad()
def in_slices(network: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """The points [B, *] that a generating network makes of latents [B, latent], so many at once
    that memory is bounded; no graph."""
    return torch.cat([network(part) for part in z.split(SLICE)])


def joined(drawn: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """What was drawn in several parts as `sample` gives it: one after the other, the way of some
    chains that of the first part's."""
    first = drawn[0]
    return {k: v if k in WAYS else torch.cat([d[k] for d in drawn]) for k, v in first.items()}


def descend(optimizer: Optimizer, loss: Tensor, clip: float = math.inf) -> Tensor:
    """One step of `optimizer` down the gradient of `loss`, averaged over all processes and cut to
    the norm `clip`; returns the norm before the cut. No other parameter gets a gradient."""
    parameters = moved_by(optimizer)
    optimizer.zero_grad()
    loss.backward(inputs=parameters)
    return follow(optimizer, parameters, clip)


def follow(optimizer: Optimizer, parameters: Sequence[Tensor], clip: float) -> Tensor:
    """The step, once the parameters that the optimiser moves have their gradients."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    parallel.average(gradients)
    norm = nn.utils.get_total_norm(gradients)
    if clip < math.inf:
        nn.utils.clip_grads_with_norm_(parameters, clip, norm)
    optimizer.step()
    return norm


def moved_by(optimizer: Optimizer) -> list[Tensor]:
    """The parameters of an optimiser."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def parameters_of(*modules: nn.Module) -> list[nn.Parameter]:
    """The parameters of several networks that one optimiser moves together."""
    return [p for module in modules for p in module.parameters()]


def standard_normal(network: nn.Module, *size: int) -> Tensor:
    """N(0, I) of a size, where the parameters of `network` are and of their type."""
    like = next(network.parameters())
    return torch.randn(size, device=like.device, dtype=like.dtype)


def autocast(precision: torch.dtype, like: Tensor) -> AbstractContextManager[None]:
    """Within this context layers on the device of `like` compute in `precision`, if the device
    does so by itself, else in float32; energies, losses and weights stay as they are."""
    reduced = precision != torch.float32 and multiplies_bfloat16(like.device.type)
    return torch.autocast(like.device.type, precision, enabled=reduced)


@cache
def multiplies_bfloat16(device: str) -> bool:
    """Whether this kind of device has arithmetic for bfloat16. On one that has not, which is said
    once, layers in bfloat16 would take ten times as long as in float32."""
    if device == "cuda":
        able = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device == "cpu":
        known = torch.backends.mkldnn.is_available()
        able = known and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    else:
        able = True
    if not able:
        log.warning("this %s has no arithmetic for bfloat16: layers compute in float32", device)
    return able


def average_of(network: N, decay: float) -> N | None:
    """Where a moving average of `network` begins: a copy that needs no gradient and counts its
    `updates`; None where the `decay` is 0 and there is to be none."""
    if not decay:
        return None
    average = deepcopy(network).requires_grad_(False)
    average.register_buffer("updates", torch.tensor(0))
    return average


@torch.no_grad()
def update_average(average: nn.Module | None, current: nn.Module, decay: float) -> None:
    """Exponential moving average, if there is one, of the t networks since the first update: that
    of t - 1 ago has decay^(t - 1) times the weight of the last one, and what the average began
    with has none (the correction of Kingma & Ba 2015, section 3). Buffers are copied, but for
    those of parametrizations, which belong to the weights they were made of."""
    if average is None:
        return
    kept: list[Tensor] = list(average.parameters())
    followed: list[Tensor] = list(current.parameters())
    updates = average.get_buffer("updates").add_(1)
    weight = ((1 - decay) / (1 - decay ** updates.double())).to(kept[0])
    torch._foreach_lerp_(kept, followed, [weight] * len(kept))
    buffers = dict(current.named_buffers())
    for name, buffer in average.named_buffers():
        if name != "updates" and ".parametrizations." not in name:
            buffer.copy_(buffers[name])
