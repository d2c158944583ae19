"""Variants small enough to be trained in a moment, and what tests do with them."""

import itertools

import torch

from ebm import variants
from ebm.checkpoint import Checkpoints
from ebm.seeds import seed
from ebm.train import Watch, fit

CONTRASTED = {
    "defence": 0.1,
    "tilted": False,
    "levels": 0,
    "margin": 0.0,
    "warmup": 12,
    "warmup_learning_rate": 1e-3,
    "learning_rate": 1e-3,
    "constant_learning_rate": 1e-2,
    "betas": (0.9, 0.999),
    "weight_decay": 0.01,
    "clip": 1.0,
    "compile": False,
}

MODELS = {
    "fce": {
        "network": {"kind": "fourier", "width": 8, "depth": 1, "frequencies": 3, "bandwidth": 1.0},
        "flow": {"kind": "coupling", "transforms": 1, "width": 8},
        "threshold": 0.55,
        "flow_learning_rate": 1e-3,
        "saturating": True,
        "classes": 0,
        "labelled": 0,
        "supervision": 0.0,
        "smoothness": 0.0,
        "radius": 0.1,
        **CONTRASTED,
    },
    "flow": {
        "flow": {"kind": "spline", "transforms": 1, "bins": 3, "width": 8},
        "levels": 0,
        "margin": 0.0,
        "learning_rate": 1e-3,
        "betas": (0.9, 0.999),
        "weight_decay": 0.0,
        "clip": 1.0,
        "compile": False,
    },
    "igebm": {
        "network": {"kind": "mlp", "width": 8, "depth": 1},
        "input_scale": 1.0,
        "classes": 0,
        "spectral_norm": False,
        "langevin_steps": 3,
        "jumps": 0,
        "step_size": 0.1,
        "noise": 0.01,
        "gradient_clip": 1.0,
        "bounds": (0.0, 1.0),
        "buffer": 60,
        "fresh": 0.05,
        "augment": 0.0,
        "data_noise": 0.01,
        "energy_penalty": 0.1,
        "kl": 0.1,
        "entropy": 0.1,
        "learning_rate": 1e-3,
        "betas": (0.0, 0.999),
        "clip": 1.0,
        "ema": 0.9,
        "precision": "float32",
        "compile": False,
    },
    "rbm": {
        "hidden": 5,
        "k": 1,
        "chains": 8,
        "learning_rate": 0.1,
        "momentum": 0.5,
        "weight_decay": 0.001,
    },
    "meg": {
        "network": "mlp",
        "energy": [8],
        "generator": [8],
        "statistics": [8],
        "latent": 2,
        "energy_steps": 2,
        "score_penalty": 0.1,
        "entropy": 1.0,
        "energy_learning_rate": 1e-3,
        "generator_learning_rate": 1e-3,
        "betas": (0.5, 0.9),
        "ema": 0.9,
        "energy_ema": 0.9,
        "precision": "float32",
        "compile": False,
    },
    "bigan": {
        "network": "mlp",
        "encoder": [8],
        "generator": [8],
        "discriminator": [8],
        "latent": 2,
        "mix": 0.1,
        "generator_learning_rate": 1e-3,
        "discriminator_learning_rate": 1e-3,
        "betas": (0.5, 0.999),
        "ema": 0.9,
    },
    "dagmm": {
        "encoder": [3],
        "decoder": [3],
        "latent": 1,
        "components": 2,
        "estimation": [4],
        "dropout": 0.5,
        "energy_weight": 0.1,
        "diagonal_penalty": 0.005,
        "regularisation": 1e-3,
        "ema": 0.9,
        "standardise": True,
        "learning_rate": 1e-3,
        "betas": (0.9, 0.999),
    },
    "dsebm": {
        "widths": [8],
        "noise": 0.5,
        "standardise": True,
        "learning_rate": 1e-3,
        "betas": (0.9, 0.999),
    },
    "kernel_pca": {"points": 20, "components": 3, "gamma": "scale", "standardise": True},
    "nce": {
        "network": {"kind": "mlp", "width": 8, "depth": 1},
        "noise": {"kind": "coupling", "transforms": 1, "width": 8},
        "ratio": 2.0,
        **CONTRASTED,
    },
    "one_class_svm": {"points": 20, "nu": 0.5, "gamma": "scale", "standardise": True},
    "vae": {
        "network": "mlp",
        "encoder": [8],
        "decoder": [8],
        "latent": 2,
        "learning_rate": 1e-3,
        "betas": (0.9, 0.999),
    },
    "wgan_gp": {
        "network": "mlp",
        "energy": [8],
        "generator": [8],
        "latent": 2,
        "energy_steps": 2,
        "gradient_penalty": 10.0,
        "energy_learning_rate": 1e-3,
        "generator_learning_rate": 1e-3,
        "betas": (0.5, 0.9),
        "ema": 0.9,
        "precision": "float32",
        "compile": False,
    },
}

WATCH = Watch({}, 3)

OPTIONS = {"batch_size": 8, "seed": 3, "log_every": 5, "checkpoint_every": 10, "cooldown": 0.5}


def build(name):
    seed("model", 0)
    return variants.build(name, (4,), MODELS[name])


def data():
    generator = torch.Generator().manual_seed(0)
    return (torch.rand(50, 4, generator=generator) < 0.5).float()


def train(model, folder, steps=40, watch=WATCH, **changes):
    return fit(
        model,
        data(),
        steps=steps,
        watch=watch,
        checkpoints=Checkpoints(folder),
        **OPTIONS | changes,
    )


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Killed(Exception):
    pass


def killed_at(model, number):
    """The model, killed when its step `number` begins; the first is 1."""
    step, numbers = model.training_step, itertools.count(1)

    def steps(*batch):
        if next(numbers) == number:
            raise Killed
        return step(*batch)

    model.training_step = steps
    return model


def dies(*_, **__):
    raise Killed
