"""Recorded energies: the same bits as the eager ones, whatever changes in place."""

import os
import subprocess
import sys
from copy import deepcopy
from functools import partial
from pathlib import Path

import pytest
import torch
from small_models import MODELS
from torch import nn

from ebm import EBMError, recorded, variants
from ebm.densities import DENSITIES
from ebm.networks import normalise_spectrally, scalar
from ebm.recorded import CompiledGradient, graph_of
from ebm.samplers import HMC, MALA, Langevin, Recorded, run, value_and_gradient

ROOT = Path(__file__).resolve().parents[1]


def mixture():
    return DENSITIES["8gaussians"]().energy, (2,)


def mlp():
    return scalar("mlp", (2,), 0, width=32, depth=3), (2,)


def labelled():
    network, y = scalar("conv", (8, 8), 10, width=8, depth=2), torch.arange(6) % 10
    return lambda x: network(x[:, None], y[: len(x)]), (8, 8)


def resnet():
    network = normalise_spectrally(scalar("resnet", (1, 8, 8), 0, width=8, depth=2)).eval()
    return lambda x: network(x.contiguous(memory_format=torch.channels_last)), (1, 8, 8)


def assigning():
    def energy(x):
        y = 2 * x
        y[:, 0] = x[:, 1] * x[:, 0]
        return y.square().sum(1) + torch.ones(2).expand(len(x), 2).mul(x).sum(1)

    return energy, (2,)


ENERGIES = [mixture, mlp, labelled, resnet, assigning]


def same(a, b):
    return all(torch.equal(s, t) for s, t in zip(a, b, strict=True))


@pytest.fixture(params=[torch.float32, torch.float64], ids=str)
def dtype(request):
    torch.manual_seed(0)
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("make", ENERGIES)
def test_a_replay_has_the_bits_of_autograd(make, dtype):
    energy, shape = make()
    recorded = Recorded(energy, torch.randn(6, *shape))
    for _ in range(3):
        x = torch.randn(6, *shape)
        assert same(recorded.value_and_gradient(x), value_and_gradient(energy, x))
        assert torch.equal(recorded(x), energy(x))


@pytest.mark.parametrize("make", ENERGIES)
def test_a_new_shape_is_recorded_anew(make, dtype):
    energy, shape = make()
    recorded = Recorded(energy, torch.randn(6, *shape))
    for x in (torch.randn(3, *shape), torch.randn(*shape, 4).movedim(-1, 0)):
        assert same(recorded.value_and_gradient(x), value_and_gradient(energy, x))


@pytest.mark.parametrize("make", [mixture, mlp, labelled])
@pytest.mark.parametrize(
    "kernel_of",
    [lambda e: Langevin(e, 1e-5), lambda e: MALA(e, 1e-5), lambda e: HMC(e, 1e-3, 5)],
    ids=["Langevin", "MALA", "HMC"],
)
def test_chains_have_the_same_bits(make, kernel_of, dtype):
    energy, shape = make()
    x, ends = torch.randn(6, *shape), []
    for e in (energy, Recorded(energy, x)):
        torch.manual_seed(1)
        ends.append(run(kernel_of(e), x, 20))
    assert ends[0].x.isfinite().all()
    assert torch.equal(ends[0].x, ends[1].x)
    assert torch.equal(ends[0].gradient, ends[1].gradient)


def test_steps_of_an_optimiser_and_new_labels_are_seen(dtype):
    network, y, x = (
        scalar("conv", (8, 8), 10, width=8, depth=2),
        torch.arange(6),
        torch.randn(6, 8, 8),
    )

    def energy(x):
        return network(x[:, None], y)

    recorded, optimizer = Recorded(energy, x), torch.optim.Adam(network.parameters(), 0.1)
    before = recorded.value_and_gradient(x)
    energy(x).sum().backward()
    optimizer.step()
    after = recorded.value_and_gradient(x)
    assert same(after, value_and_gradient(energy, x))
    assert not same(after, before)
    y.copy_(y.flip(0))
    assert same(recorded.value_and_gradient(x), value_and_gradient(energy, x))
    assert not same(recorded.value_and_gradient(x), after)


def test_an_energy_of_a_class_is_recorded_once_for_all_labels(dtype):
    network, x = scalar("conv", (8, 8), 10, width=8, depth=2), torch.randn(6, 8, 8)
    recorded = Recorded(network.of_points, x, torch.zeros(6, dtype=torch.long))
    for y in (torch.arange(6), torch.arange(6).flip(0)):
        energy, expected = recorded.given(y), partial(network.of_points, y=y)
        assert same(energy.value_and_gradient(x), value_and_gradient(expected, x))
        assert torch.equal(energy(x), expected(x))
    assert len(recorded._replays) == 1
    recorded.given(torch.arange(3)).value_and_gradient(x[:3])
    assert len(recorded._replays) == 2


def test_a_gradient_that_needs_a_graph_is_left_to_autograd():
    network, x = scalar("mlp", (2,), 0, width=8, depth=1), torch.randn(4, 2)
    _, gradient = value_and_gradient(Recorded(network, x), x, differentiable=True)
    (slope,) = torch.autograd.grad(gradient.square().sum(), [next(network.parameters())])
    assert slope.abs().sum() > 0


def test_a_replay_leaves_points_and_parameters_alone():
    network, x = scalar("mlp", (2,), 0, width=8, depth=1), torch.randn(4, 2)
    recorded, before = Recorded(network, x), x.clone()
    value, gradient = recorded.value_and_gradient(x)
    assert torch.equal(x, before)
    assert not value.requires_grad
    assert not gradient.requires_grad
    assert all(p.requires_grad and p.grad is None for p in network.parameters())


def test_nothing_but_arithmetic_is_left_in_the_graph():
    module, constants = graph_of(scalar("mlp", (2,), 0, width=8, depth=1), torch.randn(4, 2))
    names = {str(node.target) for node in module.graph.nodes if node.op == "call_function"}
    assert not names & {"aten.detach.default", "aten.alias.default", "aten.t.default"}
    assert not any(node.op == "get_attr" for node in module.graph.nodes)
    assert len(constants) == sum(node.op == "placeholder" for node in module.graph.nodes) - 1


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: nn.Sequential(nn.Linear(2, 1), nn.Dropout(), nn.Flatten(0)), "random"),
        (
            lambda: normalise_spectrally(scalar("mlp", (2,), 0, width=8, depth=1)),
            "is changed",
        ),
        (lambda: nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 1), nn.Flatten(0)), "is changed"),
    ],
)
def test_an_energy_with_side_effects_is_refused(make, reason):
    with pytest.raises(EBMError, match=reason):
        Recorded(make(), torch.randn(4, 2))
    Recorded(make().eval(), torch.randn(4, 2))


IMAGES = (3, 8, 8)
CONVOLUTIONS = {"network": "conv", "energy": [4, 8], "generator": [8, 4]}
SEMI = {"classes": 2, "labelled": 3, "supervision": 1.0, "smoothness": 0.5}
GLOW = {"kind": "glow", "levels": 1, "depth": 1, "width": 4}
TILTED = {
    "tilted": True,
    "network": {"kind": "conv", "width": 2, "depth": 1},
    "defence": 0.0,
    "levels": 5,
    "margin": 0.01,
    "warmup": 4,
    "threshold": 0.4,
}
COMPILED = {
    "flow": ("flow", (4,), {}),
    "glow": ("flow", (4, 4), {"flow": GLOW, "levels": 5, "margin": 0.01}),
    "nce": ("nce", (4,), {"clip": None}),
    "fce": ("fce", (4,), {}),
    "fce-semi": ("fce", (4,), SEMI | {"flow": MODELS["flow"]["flow"]}),
    "fce-images": ("fce", (4, 4), TILTED | {"flow": GLOW}),
    "igebm": ("igebm", (4,), {}),
    "meg": ("meg", (4,), {}),
    "meg-images": ("meg", IMAGES, CONVOLUTIONS | {"statistics": [4, 8]}),
    "wgan-gp": ("wgan_gp", (4,), {}),
    "wgan-gp-images": ("wgan_gp", IMAGES, CONVOLUTIONS),
}


def trained(case, compile, steps=30, sizes=3):
    """The state of a model after some steps, those of its optimisers, and its last logs."""
    variant, shape, changes = COMPILED[case]
    torch.manual_seed(0)
    model = variants.build(variant, shape, MODELS[variant] | changes | {"compile": True})
    assert model.optimizers  # those of a model that is compiled, in any case
    model.compiled = compile
    x = (4 * torch.rand(64, *shape)).round() / 4
    y = torch.arange(64) % 2
    model.initialise(x, y if model.needs_labels else None)
    for step in range(steps):
        torch.manual_seed(step)
        logs = model.training_step(x[(step % 2) * 32 :][: 24 + 8 * (step % sizes)])
    moments = [
        value
        for optimizer in model.optimizers.values()
        for state in optimizer.state_dict()["state"].values()
        for value in state.values()
    ]
    return [*model.state_dict().values(), *moments, *logs.values()]


@pytest.mark.parametrize("case", COMPILED)
def test_what_is_compiled_is_the_training_step_itself(case, monkeypatch):
    """Replayed instead of compiled, it has the same bits: all networks, buffers and optimisers,
    over batches of three sizes, in both of a game's turns."""
    monkeypatch.setattr(recorded, "_compiled", lambda module: module.forward)
    assert same(trained(case, compile=True), trained(case, compile=False))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch._prims_common.check")
@pytest.mark.parametrize("case", COMPILED)
def test_a_compiled_training_step_agrees_up_to_rounding(case):
    torch.set_default_dtype(torch.float64)
    try:
        compiled, plain = (trained(case, compile, 6, sizes=1) for compile in (True, False))
        for found, expected in zip(compiled, plain, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("change", [deepcopy, lambda model: model.double().float()])
def test_a_model_that_is_copied_or_moved_is_recorded_anew(change, monkeypatch):
    """A record holds the tensors that the model had."""
    monkeypatch.setattr(recorded, "_compiled", lambda module: module.forward)
    torch.manual_seed(0)
    model = variants.build("flow", (4,), MODELS["flow"] | {"compile": True})
    x = torch.randn(16, 4)
    model.initialise(x)
    model.training_step(x)
    model = change(model)
    for _ in range(3):
        logs = model.training_step(x)
    expected = -model.log_likelihood(x).mean()
    model.optimizers["flow"].param_groups[0]["lr"] = 0.0
    torch.testing.assert_close(model.training_step(x)["energy_gap"], expected.detach())
    assert logs["energy_gap"] > expected


def test_two_inputs_that_were_once_the_same_are_two():
    a, b = torch.randn(3), torch.randn(3)
    assert recorded.kind(a, a) != recorded.kind(a, b)
    assert recorded.kind(a, b) == recorded.kind(b, a)
    assert recorded.record(lambda x, y: (x * y).sum(), a, b)(b, b) == (b * b).sum()


def test_members_that_leave_a_class_out_are_not_compiled():
    ensemble = {"members": 2, "snapshots": 0, "every": 1, "without": [0, 1]}
    with pytest.raises(EBMError, match=r"model\.compile: .* set it to false"):
        variants.build("meg", (4,), MODELS["meg"] | {"compile": True}, ensemble)


def test_without_a_compiler_it_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", (None, str(tmp_path / "none")))
    with pytest.raises(EBMError, match=r"No working C\+\+ compiler.*set compile to false"):
        Recorded(lambda x: x.sin().sum(1), torch.randn(4, 2), compile=True)


def test_an_objective_that_draws_is_refused(monkeypatch):
    monkeypatch.setattr(recorded, "_compiled", lambda module: module.forward)
    w = torch.ones(2, requires_grad=True)
    gradient = CompiledGradient(lambda x: ((w * torch.randn_like(x)).sum(), {}), [w], [])
    with pytest.raises(EBMError, match="draws random numbers"):
        gradient(torch.ones(2))


@pytest.mark.slow
def test_a_compiled_replay_agrees_up_to_rounding(tmp_path):
    """In a process of its own: the compiler's imports warn, and it forks."""
    code = """
import torch
from ebm.densities import DENSITIES
from ebm.samplers import Recorded, value_and_gradient
energy = DENSITIES["25gaussians"]().energy
x = torch.randn(6, 2, dtype=torch.float64)
recorded = Recorded(energy, x, compile=True)
for points in (x, x[:3].clone(), x + 1):
    for a, b in zip(recorded.value_and_gradient(points), value_and_gradient(energy, points)):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)
"""
    environment = os.environ | {
        "PYTHONPATH": str(ROOT / "src"),
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path),
    }
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_the_benchmark_runs(capsys):
    pytest.importorskip("torchebm")
    from benchmarks import samplers

    threads = str(torch.get_num_threads())
    samplers.main(["--threads", threads, "--rounds", "1", "--seconds", "0", "--small"])
    lines = capsys.readouterr().out
    assert "torchebm" in lines
    assert "published loop" in lines


def test_an_energy_that_is_given_something_else_leaves_the_first_as_it_was():
    x, y, other = torch.randn(6, 2), torch.arange(6.0), torch.ones(6)
    first = Recorded(lambda x, y: y * x.square().sum(1), x, y)
    second = first.given(other)
    for energy, of in ((first, y), (second, other)):
        value, gradient = energy.value_and_gradient(x)
        torch.testing.assert_close(value, of * x.square().sum(1))
        torch.testing.assert_close(gradient, 2 * of[:, None] * x)
