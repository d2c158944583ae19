"""Data parallelism: several processes share every batch, and nothing changes but rounding (but
for IGEBM's chains, which are as good and others: each process has a part of the buffer).

A training is a function of (seed, step), by however many processes. Of W processes with the same
weights, the one of rank r has the rows r, r + W, r + 2 W ... of the batch, of every draw, and of
the chains that live on; gradients are averaged (`ebm.variants.base.follow`), and with them all
processes take the same step. What is no mean over the batch has to be told so: `averaged`,
`gathered` and `shuffled` are the identity, or what one process would do, where there is only one.

`torch.distributed` brings the processes together, `torchrun` starts them.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import groupby
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ebm import EBMError

T = TypeVar("T")


def world() -> int:
    """How many processes share a training."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this one is; the first, 0, writes what is to be kept."""
    return dist.get_rank() if world() > 1 else 0


def mine(rows: T) -> T:
    """This process' part of `rows`, a tensor or a sequence."""
    return rows[rank() :: world()]  # type: ignore[index]


def share(count: int, what: str) -> int:
    """This process' part of a number; EBMError if `what` cannot be shared equally."""
    if count % world():
        raise EBMError(f"{what} = {count} cannot be shared equally by {world()} processes")
    return count // world()


def parts(rows: Tensor, count: int) -> tuple[Tensor, ...]:
    """`rows` [n, *] in `count` parts, in fewer where there are fewer rows. EBMError where several
    processes would have other rows in them than one."""
    if world() > 1 and len(rows) % count:
        raise EBMError(f"train.batch_size: {len(rows)} rows for each process are no {count} parts")
    return rows.tensor_split(min(count, len(rows)))


@torch.no_grad()
def average(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by its mean over all processes; those of one kind in one message."""
    if world() == 1:
        return
    kinds = groupby(sorted(tensors, key=_kind), key=_kind)
    for alike in [list(group) for _, group in kinds]:
        message = torch.cat([tensor.reshape(-1) for tensor in alike])
        dist.all_reduce(message)
        message /= world()
        parts = message.split([tensor.numel() for tensor in alike])
        for tensor, part in zip(alike, parts, strict=True):
            tensor.copy_(part.view(tensor.shape))


def _kind(tensor: Tensor) -> str:
    return f"{tensor.dtype} {tensor.device}"


class _Averaged(torch.autograd.Function):
    """The mean over processes. Each of them has a loss in which it stands, and the loss of all is
    the mean of theirs, so the gradient is the mean of their gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        result = x.detach().clone()
        average([result])
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (gradient,) = gradients
        return _Averaged.forward(ctx, gradient)


def averaged(x: Tensor) -> Tensor:
    """The mean of `x` over all processes, with its gradient: of a mean over a process' rows, that
    over the whole batch."""
    return _Averaged.apply(x) if world() > 1 else x


@torch.no_grad()
def gathered(x: Tensor) -> Tensor:
    """The whole of which every process has its rows `x` [n, *], without a gradient."""
    if world() == 1:
        return x
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(world())]
    dist.all_gather(parts, x.contiguous())
    return torch.stack(parts, 1).flatten(0, 1)


def shuffled(x: Tensor) -> Tensor:
    """The rows of `x` [n, *] in random order, with those of the other processes among them; a
    gradient does not pass from one process to another."""
    order = permutation(world() * len(x), x.device)
    return gathered(x)[mine(order)]


def permutation(n: int, device: torch.device) -> Tensor:
    """0 to n - 1 in random order, the same one in all processes: [n]."""
    with torch._C.DisableTorchFunction():
        return torch.randperm(n, device=device)


def from_first(ask: Callable[[], T]) -> T:
    """What `ask` returns in the first process, which alone is asked; EBMError if it raises that
    there."""
    if world() == 1:
        return ask()
    answer: list[Any] = [None]
    if rank() == 0:
        try:
            answer = [ask()]
        except EBMError as error:
            answer = [error]
    dist.broadcast_object_list(answer)
    if isinstance(answer[0], EBMError):
        raise answer[0]
    return answer[0]


def _sharded(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """The buffers of which each process holds its rows only: those that a module names."""
    for module in model.modules():
        for name in getattr(module, "sharded", ()):
            yield module, name


@contextmanager
def shards(model: nn.Module) -> Iterator[None]:
    """Within this context, a process holds only its rows of the chains that live on."""
    _split(model)
    yield
    _join(model)


@contextmanager
def whole(model: nn.Module) -> Iterator[None]:
    """Within this context, which stands in that of `shards`, every process holds all of them."""
    _join(model)
    yield
    _split(model)


def _split(model: nn.Module) -> None:
    for module, name in _sharded(model):
        buffer = module.get_buffer(name)
        share(len(buffer), f"model.{name}")
        setattr(module, name, mine(buffer).clone())


def _join(model: nn.Module) -> None:
    for module, name in _sharded(model):
        setattr(module, name, gathered(module.get_buffer(name)))


def same_draws() -> AbstractContextManager[Any]:
    """Within this context, the draws of all processes together are those of one."""
    return SameDraws() if world() > 1 else nullcontext()


def draws_are_shared() -> bool:
    """Whether the draws of this process are its part of those of all."""
    return SameDraws.entered > 0


class SameDraws(TorchFunctionMode):
    """Draws as one process would, for all rows, and keeps this process' rows.

    The generators of all processes are in the same state, and stay so: the first axis of what is
    drawn is that of the batch, of which every process has equally many rows. A permutation of n
    rows is one of this process' rows among all. Batch normalisation takes the statistics of all.
    """

    entered = 0

    def __enter__(self) -> "SameDraws":
        SameDraws.entered += 1
        return super().__enter__()

    def __exit__(self, *problem: Any) -> None:
        SameDraws.entered -= 1
        super().__exit__(*problem)

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        drawn = DRAWS.get(function)
        return (drawn or _as_it_is)(function, *args, **(kwargs or {}))


def _as_it_is(function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    return function(*args, **kwargs)


def _of_size(
    function: Callable[..., Tensor], *args: Any, size: Any = None, **kwargs: Any
) -> Tensor:
    """torch.rand, torch.randn."""
    size = size or (args[0] if args and isinstance(args[0], Sequence) else args)
    return _rows(lambda whole: function(whole, **kwargs), size, kwargs)


def _integers(
    function: Callable[..., Tensor], *bounds: Any, size: Any = None, **kwargs: Any
) -> Tensor:
    """torch.randint."""
    *limits, size = bounds if size is None else (*bounds, size)
    return _rows(lambda whole: function(*limits, whole, **kwargs), size, kwargs)


def _rows(
    draw: Callable[[tuple[int, ...]], Tensor], size: Sequence[int], kwargs: dict[str, Any]
) -> Tensor:
    """This process' rows of what is drawn; a number, and what has a generator of its own, is
    alike in all."""
    if "generator" in kwargs or not size:
        return draw(tuple(size))
    return mine(draw((world() * size[0], *size[1:]))).contiguous()


def _like(function: Callable[..., Tensor], x: Tensor, **kwargs: Any) -> Tensor:
    """torch.rand_like, torch.randn_like; the layout in memory decides the order of the draws."""
    return mine(function(_repeated(x), **kwargs))


def _in_place(function: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Tensor.normal_ and its like."""
    return x.copy_(mine(function(_repeated(x), *args, **kwargs)))


def _repeated(x: Tensor) -> Tensor:
    return torch.cat([x.detach()] * world())


def _refuse(function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """What is not known here would draw the same in every process."""
    raise NotImplementedError(f"{function.__name__}: not drawn by several processes yet")


def _permutation(function: Callable[..., Tensor], n: int, **kwargs: Any) -> Tensor:
    """torch.randperm."""
    if "generator" in kwargs:
        return function(n, **kwargs)
    order = function(world() * n, **kwargs)
    return order[order % world() == rank()] // world()


def _dropout(
    function: Callable[..., Tensor],
    x: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
) -> Tensor:
    """F.dropout."""
    return x * mine(function(torch.ones_like(_repeated(x)), p, training)) if training else x


def _batch_norm(
    function: Callable[..., Tensor],
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """F.batch_norm."""
    if not training:
        return function(x, running_mean, running_var, weight, bias, False, momentum, eps)
    axes = [0, *range(2, x.dim())]
    h = x if x.dtype == torch.double else x.float()
    mean = averaged(h.mean(axes, keepdim=True))
    variance = averaged((h - mean).square().mean(axes, keepdim=True))
    if running_mean is not None and running_var is not None:
        count = world() * x.numel() // x.shape[1]
        unbiased = variance.detach() * count / (count - 1)
        running_mean.lerp_(mean.detach().flatten().to(running_mean), momentum)
        running_var.lerp_(unbiased.flatten().to(running_var), momentum)
    h = (h - mean) * (variance + eps).rsqrt()
    channels = (1, -1, *[1] * (x.dim() - 2))
    if weight is not None and bias is not None:
        h = h * weight.view(channels) + bias.view(channels)
    return h.to(x.dtype)


DRAWS: dict[Any, Callable[..., Tensor]] = {
    torch.rand: _of_size,
    torch.randn: _of_size,
    torch.randint: _integers,
    torch.rand_like: _like,
    torch.randn_like: _like,
    torch.randperm: _permutation,
    torch.Tensor.normal_: _in_place,
    torch.Tensor.uniform_: _in_place,
    F.dropout: _dropout,
    F.batch_norm: _batch_norm,
    **dict.fromkeys(
        [
            *(torch.bernoulli, torch.multinomial, torch.normal, torch.poisson, torch.binomial),
            *(torch.randint_like, torch.Tensor.random_, torch.Tensor.bernoulli_),
            *(torch.Tensor.bernoulli, torch.Tensor.multinomial, torch.Tensor.exponential_),
            *(torch.Tensor.cauchy_, torch.Tensor.geometric_, torch.Tensor.log_normal_),
            *(torch.dropout, torch.dropout_, F.alpha_dropout, F.feature_alpha_dropout),
            *(F.dropout1d, F.dropout2d, F.dropout3d, F.rrelu, F.gumbel_softmax),
        ],
        _refuse,
    ),
}
"""What `SameDraws` does in the place of a function, to which the function itself is given."""
