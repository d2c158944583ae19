"""Laws of every variant: its contract, at rest, in a step, out of its files."""

import json
import os
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from safetensors.torch import save_file
from small_models import MODELS, build, data

from ebm import variants
from ebm.seeds import seed
from ebm.variants import base
from ebm.variants.base import EBM


@pytest.mark.parametrize("name", sorted(variants.VARIANTS))
def test_every_variant_keeps_its_contract(name):
    model = build(name)
    assert isinstance(model, EBM)
    model.initialise(data())
    assert model.energy(data()).shape == (50,)
    logs = model.training_step(data())
    assert all(value.shape == () and not value.requires_grad for value in logs.values())
    assert {"energy_gap", "gradient_norm"} <= logs.keys()
    drawn = model.sample(6)
    assert drawn["samples"].shape in {(6, 4), (0, 4)}  # not every model can draw
    assert not any(tensor.requires_grad for tensor in drawn.values())
    assert bool(model.optimizers) == bool(list(model.parameters()))
    documented = sys.modules[type(model).__module__].__doc__
    assert all(f"`{key}`" in documented for key in logs)


@pytest.mark.parametrize("name", sorted(variants.VARIANTS))
def test_an_energy_at_rest_draws_nothing(name):
    """So requests that are served side by side do not disturb each other."""
    model = build(name)
    model.initialise(data())
    model.eval()
    before = torch.get_rng_state()
    first = model.energy(data())
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(model.energy(data()), first)


@pytest.mark.parametrize("name", ["bigan", "meg", "vae", "wgan_gp"])
def test_draws_are_the_same_however_many_are_made_at_once(name, monkeypatch):
    """Those that are measured can be more than fit into the memory of a card."""
    model = build(name).eval()
    torch.manual_seed(1)
    whole = model.sample(11)["samples"]
    rows = []
    network = model.decoder if name == "vae" else model.averaged_generator()
    network.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    monkeypatch.setattr(base, "SLICE", 4)
    torch.manual_seed(1)
    torch.testing.assert_close(model.sample(11)["samples"], whole)
    assert rows == [4, 4, 3]


AT_REST = """
import sys
from small_models import build, data, variants

for name in variants.VARIANTS:
    model = build(name)
    model.initialise(data())
    model.energy(data())
    model.sample(6)
    assert "torch._dynamo" not in sys.modules, name
"""


def test_only_training_imports_what_only_training_needs():
    """It takes seconds, which those who sample and score would wait for."""
    path = os.pathsep.join(sys.path)
    subprocess.run(
        [sys.executable, "-c", AT_REST], check=True, env=os.environ | {"PYTHONPATH": path}
    )


WAITING = {
    "fce": "whose turn it is depends on the accuracy of the step before",
    "nce": "the end of the warm-up, of which both count the steps",
}


@pytest.mark.parametrize(
    "name", [v for v in sorted(variants.VARIANTS.keys() - WAITING) if [*build(v).parameters()]]
)
def test_no_training_step_waits_for_a_number(name, monkeypatch):
    """A tensor without content has none to wait for; autocast knows of no such device."""
    model = build(name)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    model.initialise(data())
    assert model.optimizers  # made here: there are none for tensors without content
    model.to("meta").training_step(data().to("meta"))


RATES = {
    "meg": {"energy": ("energy_learning_rate",), "generator": ("generator_learning_rate",)},
    "wgan_gp": {"energy": ("energy_learning_rate",), "generator": ("generator_learning_rate",)},
    "bigan": {
        "discriminator": ("discriminator_learning_rate",),
        "generator": ("generator_learning_rate",),
    },
    "nce": {
        "energy": ("learning_rate", "constant_learning_rate"),
        "warmup": ("warmup_learning_rate",),
    },
    "fce": {
        "energy": ("learning_rate", "constant_learning_rate"),
        "warmup": ("warmup_learning_rate",),
        "flow": ("flow_learning_rate",),
        "twin": ("learning_rate",),
    },
}


@pytest.mark.parametrize("name", sorted(RATES))
def test_every_learning_rate_is_that_of_its_own_optimiser(name):
    keys = sorted({key for of in RATES[name].values() for key in of})
    given = {key: 1e-3 * (1 + k) for k, key in enumerate(keys)}
    semi = {"classes": 2, "labelled": 1} if name == "fce" else {}
    model = variants.build(name, (4,), MODELS[name] | given | semi)
    found = {n: [g["lr"] for g in o.param_groups] for n, o in model.optimizers.items()}
    assert found == {n: [given[key] for key in of] for n, of in RATES[name].items()}


CASES = {
    **{name: (name, (4,), {}, None) for name in MODELS},
    "igebm, conditional": ("igebm", (4,), {"classes": 3}, None),
    "igebm, conditional, images": (
        "igebm",
        (8, 8),
        {"classes": 3, "spectral_norm": True, "network": {"kind": "conv", "width": 2, "depth": 1}},
        None,
    ),
    "flow, glow": (
        "flow",
        (4, 4),
        {
            "flow": {"kind": "glow", "levels": 1, "depth": 2, "width": 4},
            "levels": 2,
            "margin": 0.05,
        },
        None,
    ),
    "fce, tilted": ("fce", (4,), {"tilted": True, "defence": 0.0, "warmup": 2}, None),
    "fce, semi-supervised": (
        "fce",
        (4,),
        {"classes": 3, "labelled": 2, "supervision": 1.0, "smoothness": 0.1},
        None,
    ),
    "igebm, ensemble": (
        "igebm",
        (4,),
        {"classes": 3},
        {"members": 2, "snapshots": 2, "every": 2, "without": []},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_state_of_a_model_is_all_there_is_to_it(tmp_path, case):
    """Loaded into a model that began otherwise: the same energies, classes, draws, training."""
    name, shape, changes, ensemble = CASES[case]
    settings = MODELS[name] | changes
    seed("model", 0)
    model = variants.build(name, shape, settings, ensemble)
    generator = torch.Generator().manual_seed(0)
    x = (torch.rand(48, *shape, generator=generator) < 0.5).float()
    y = torch.tensor([0, 0, 1, 2]).repeat(12)
    labels = y if model.needs_labels else None
    model.initialise(x, labels)
    for _ in range(5):
        if model.optimizers:
            model.training_step(x[:16], None if labels is None else labels[:16])
    config, file = tmp_path / "config.json", tmp_path / "weights.safetensors"
    config.write_text(
        json.dumps({"variant": name, "shape": shape, "model": settings, "ensemble": ensemble})
    )
    save_file({k: v.contiguous().clone() for k, v in model.state_dict().items()}, file)
    torch.manual_seed(12345)
    again = variants.load(file, config)
    found = []
    for one in (model.eval(), again):
        torch.manual_seed(7)
        drawn = one.sample(6)
        classes = one.classify(x)
        found.append({"energy": one.energy(x).detach(), **drawn, **classes})
        if one.optimizers:
            one.train()
            for _ in range(2):
                one.training_step(x[:16], None if labels is None else labels[:16])
        found[-1] |= (
            {f"state {k}": v.clone() for k, v in one.state_dict().items()}
            if not one.optimizers
            else {}
        )
    assert found[0].keys() == found[1].keys()
    for key, value in found[0].items():
        torch.testing.assert_close(found[1][key], value, msg=lambda m, key=key: f"{key}: {m}")
