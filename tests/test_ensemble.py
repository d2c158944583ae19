"""Members are trained apart from each other, see what they may see, and leave snapshots."""

import pytest
import torch
from small_models import MODELS, OPTIONS, Killed, killed_at, same, weights
from small_models import data as bits
from torch import Tensor

from ebm import EBMError, variants
from ebm.checkpoint import Checkpoints
from ebm.ensemble import Ensemble, histories
from ebm.seeds import seed
from ebm.train import Watch, fit
from ebm.variants.base import EBM, descend

NO_SNAPSHOTS = {"snapshots": 0, "every": 1, "without": []}


class Mean(EBM):
    """E(x) = |x - m|^2 / 2, whose m a step moves to the mean of its batch, and keeps the batch."""

    def __init__(self):
        super().__init__()
        self.m = torch.nn.Parameter(torch.randn(1))
        self.seen: list[Tensor] = []

    def configure_optimizers(self):
        return {"m": torch.optim.SGD([self.m], lr=1.0)}

    def energy(self, x):
        return (x - self.m).square().sum(1) / 2

    def training_step(self, x, y=None):
        self.seen.append(x)
        norm = descend(self.optimizers["m"], self.energy(x).mean())
        return {"energy_gap": self.m.detach().squeeze(), "gradient_norm": norm}

    def sample(self, n):
        return {"samples": self.m.detach().expand(n, 1)}


def ensemble(members=3, snapshots=0, every=1, without=()):
    torch.manual_seed(0)
    return Ensemble(Mean, members, snapshots, every, without)


def test_every_row_of_a_batch_goes_to_one_member():
    model = ensemble()
    batch = torch.arange(9.0).view(9, 1)
    model.training_step(batch)
    assert torch.equal(torch.cat([member.seen[0] for member in model.members]), batch)
    assert [member.m.item() for member in model.members] == pytest.approx([1, 4, 7])


def test_its_energy_and_logs_are_means_over_members():
    model, x = ensemble(), torch.randn(5, 1)
    expected = sum(member.energy(x) for member in model.members) / 3
    torch.testing.assert_close(model.energy(x), expected)
    logs = model.training_step(torch.arange(9.0).view(9, 1))
    assert logs["energy_gap"].item() == pytest.approx(4)


def test_a_member_never_sees_the_class_that_it_is_without():
    model = ensemble(members=4, without=[0, 1])
    assert model.needs_labels
    labels = torch.arange(40) % 3
    model.training_step(labels.float().view(-1, 1), labels)
    for number, member in enumerate(model.members):
        seen = set(member.seen[0].flatten().tolist())
        assert seen == {0.0, 1.0, 2.0} - {number % 2}


def test_snapshots_are_the_last_states_one_of_each_period():
    model = ensemble(members=1, snapshots=3, every=2)
    for value in range(1, 11):
        model.training_step(torch.full((2, 1), float(value)))
    assert sorted(snapshot.m.item() for snapshot in model.histories()[0]) == [6, 8, 10]


def test_without_snapshots_the_history_of_a_member_is_itself():
    model = ensemble()
    assert [of[0] for of in model.histories()] == list(model.members)
    single = Mean()
    assert histories(single) == [[single]]


def test_samples_come_from_the_members_in_turn():
    model = ensemble()
    model.training_step(torch.arange(9.0).view(9, 1))
    assert model.sample(5)["samples"].flatten().tolist() == [1, 4, 7, 1, 4]
    assert model.sample(1)["samples"].flatten().tolist() == [1]
    assert len(model.sample(0)["samples"]) == 0


def test_a_killed_training_goes_on_with_its_members_and_snapshots(tmp_path):
    options = {"batch_size": 10, "seed": 0, "log_every": 2, "checkpoint_every": 4, "cooldown": 0.5}
    settings = {
        "network": "mlp",
        "encoder": [4],
        "decoder": [4],
        "latent": 2,
        "learning_rate": 1e-3,
        "betas": (0.9, 0.999),
    }
    chosen = {"members": 2, "snapshots": 2, "every": 3, "without": [1]}
    data, labels = torch.rand(50, 4), torch.arange(50) % 3

    def train(folder, steps_killed=None):
        torch.manual_seed(1)
        model = variants.build("vae", (4,), settings, chosen)

        def listener(step, restarts, scalars):
            if step == steps_killed:
                raise KeyboardInterrupt

        watch, checkpoints = Watch({}, 0), Checkpoints(tmp_path / folder)
        fit(
            model,
            data,
            labels,
            steps=20,
            watch=watch,
            checkpoints=checkpoints,
            listener=listener,
            **options,
        )
        return model.state_dict()

    whole = train("whole")
    with pytest.raises(KeyboardInterrupt):
        train("killed", steps_killed=14)
    resumed = train("killed")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_members_are_given_the_classes_of_their_rows():
    """A conditional model beside others is trained as it is alone."""
    settings = MODELS["igebm"] | {"classes": 2}
    x, y = torch.rand(8, 4), torch.randint(2, (8,))
    seed("model", 0)
    together = variants.build("igebm", (4,), settings, {"members": 2, **NO_SNAPSHOTS})
    assert (together.classes, together.needs_labels) == (2, True)
    seed("model", 0)
    alone = [variants.build("igebm", (4,), settings) for _ in range(2)]
    for models in ([together], alone):
        torch.manual_seed(1)
        for model in models:
            model.initialise(x)
        for model, part in zip(models, torch.arange(8).tensor_split(len(models)), strict=True):
            model.training_step(x[part], y[part])
    for member, model in zip(together.members, alone, strict=True):
        for a, b in zip(member.parameters(), model.parameters(), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["kernel_pca", "dagmm", "nce", "fce"])
def test_a_member_begins_with_what_it_may_see(name):
    """Axes, moments and scales too are those of a model that was given no other rows."""
    torch.manual_seed(0)
    x, y = torch.rand(60, 4), torch.arange(60) % 3
    x[y == 1] += 5
    options = {"members": 2, **NO_SNAPSHOTS, "without": [1, 0]}
    seed("model", 0)
    together = variants.build(name, (4,), MODELS[name], options)
    seed("model", 0)
    alone = [variants.build(name, (4,), MODELS[name]) for _ in range(2)]
    torch.manual_seed(1)
    together.initialise(x, y)
    torch.manual_seed(1)
    for model, hidden in zip(alone, (1, 0), strict=True):
        model.initialise(x[y != hidden])
    for member, model in zip(together.members, alone, strict=True):
        expected = model.state_dict()
        assert all(torch.equal(v, expected[k]) for k, v in member.state_dict().items())


def test_a_class_to_be_left_out_has_to_be_there_beside_others():
    x, y = torch.rand(6, 1), torch.zeros(6)
    with pytest.raises(EBMError, match=r"ensemble\.without: no training row is of class 7"):
        ensemble(without=[7]).initialise(x, y)
    with pytest.raises(EBMError, match=r"ensemble\.without: every training row is of class 0"):
        ensemble(without=[0]).initialise(x, y)


def test_a_member_whose_own_rows_are_all_of_its_class_learns_from_those_of_others():
    """Else a training could end at a batch that chance has drawn."""
    model = ensemble(members=2, without=[1, 0])
    x, y = torch.arange(6.0).view(6, 1), torch.tensor([1, 1, 1, 1, 0, 0])
    model.training_step(x, y)
    first, second = (member.seen[0].flatten().tolist() for member in model.members)
    assert (first, second) == ([4, 5], [3])


def test_a_member_that_is_left_without_rows_says_so():
    with pytest.raises(EBMError, match=r"train\.batch_size: too small for ensemble\.without"):
        ensemble(without=[1]).training_step(torch.zeros(6, 1), torch.ones(6))


def test_chains_are_those_of_the_first_member():
    seed("model", 0)
    model = variants.build("igebm", (4,), MODELS["igebm"], {"members": 3, **NO_SNAPSHOTS})
    model.initialise(torch.rand(5, 4))
    drawn = model.sample(9, steps=4)
    assert len(drawn["samples"]) == 9
    assert len(drawn["chain_steps"]) == drawn["chain"].shape[1]
    assert torch.equal(drawn["chain"][:, -1], drawn["samples"][::3])


@pytest.mark.parametrize("at", [5, 9, 17])
def test_a_killed_conditional_ensemble_ends_with_the_same_bits(tmp_path, at):
    """Classes, levels, and snapshots at a time that no checkpoint falls upon."""
    chosen = {"members": 2, "snapshots": 2, "every": 3, "without": []}
    settings = MODELS["igebm"] | {"classes": 3}
    labels = torch.tensor([0, 0, 1, 2, 2])[torch.arange(50) % 5]
    options = OPTIONS | {"log_every": 2, "checkpoint_every": 4, "batch_size": 16}

    def trained(folder, kill_at=None):
        seed("model", 0)
        model = variants.build("igebm", (4,), settings, chosen)
        fit(
            killed_at(model, kill_at),
            bits(),
            labels,
            steps=20,
            watch=Watch({}, 0),
            checkpoints=Checkpoints(folder),
            **options,
        )
        return model

    whole = trained(tmp_path / "whole")
    with pytest.raises(Killed):
        trained(tmp_path / "killed", at)
    resumed = trained(tmp_path / "killed")
    assert same(weights(whole), weights(resumed))
    for a, b in zip(whole.eval().histories(), resumed.eval().histories(), strict=True):
        for one, other in zip(a, b, strict=True):
            assert torch.equal(one.energy(bits()), other.energy(bits()))
