"""The loop: a function of (seed, step), whole or absent files, divergence noticed and mended."""

import math
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from functools import cache
from pathlib import Path

import pytest
import torch
from small_models import (
    MODELS,
    OPTIONS,
    WATCH,
    Killed,
    build,
    data,
    dies,
    killed_at,
    same,
    train,
    weights,
)
from toy_house import wait_for

from ebm import EBMError, variants
from ebm.checkpoint import Checkpoints
from ebm.data import unit
from ebm.ensemble import histories
from ebm.seeds import mix, seed
from ebm.train import Batches, DivergenceError, Watch, fit
from ebm.variants.base import BATCHES, EBM, average_of, descend, update_average


@cache
def uninterrupted(name):
    """The weights and the history that a run has which nobody kills."""
    model = build(name)
    with tempfile.TemporaryDirectory() as folder:
        progress = train(model, Path(folder))
    return weights(model), progress.history


@pytest.mark.parametrize("name", sorted(variants.VARIANTS))
@pytest.mark.parametrize("at", [1, 9, 10, 11, 25, 39])
def test_a_killed_run_ends_with_the_same_bits(tmp_path, name, at):
    expected, history = uninterrupted(name)
    with pytest.raises(Killed):
        train(killed_at(build(name), at), tmp_path / "killed")
    torch.rand(17)  # whatever else draws meanwhile
    resumed = build(name)
    progress = train(resumed, tmp_path / "killed")
    assert same(expected, weights(resumed))
    assert progress.history == history


@pytest.mark.parametrize("name", sorted(MODELS))
def test_a_training_that_has_ended_is_at_its_end_at_once(tmp_path, name, monkeypatch):
    first = build(name)
    progress = train(first, tmp_path)
    again = build(name)
    monkeypatch.setattr(type(again), "training_step", None)
    assert train(again, tmp_path).history == progress.history
    assert same(weights(first), weights(again))


def test_bits_are_drawn_anew_at_every_update_and_after_a_kill_the_same(tmp_path):
    """Of one half grey no two updates see the same."""

    def train_on_greys(model, folder):
        return train(model, folder, greys=torch.full_like(data(), 0.5))

    batches = []
    whole = build("rbm")
    step = whole.training_step
    whole.training_step = lambda x, y: batches.append(x) or step(x, y)
    train_on_greys(whole, tmp_path / "whole")
    steps = torch.stack(batches)
    assert steps.unique().tolist() == [0, 1]
    assert len(steps.flatten(1).unique(dim=0)) == len(steps)
    with pytest.raises(Killed):
        train_on_greys(killed_at(build("rbm"), 25), tmp_path / "killed")
    resumed = build("rbm")
    train_on_greys(resumed, tmp_path / "killed")
    assert same(weights(whole), weights(resumed))


def test_without_steps_a_model_is_what_it_was_initialised_to(tmp_path, monkeypatch):
    model, fitted = build("one_class_svm"), build("one_class_svm")
    progress = train(model, tmp_path, steps=0, batch_size=10**6)  # which is never drawn
    assert (progress.step, progress.history) == (0, [])
    assert progress.seconds > 0  # the fit counts as training
    seed("model", 0)
    fitted.initialise(data())
    assert same(weights(model), weights(fitted))
    monkeypatch.setattr(fitted, "initialise", None)  # it is not fitted again
    again = train(fitted, tmp_path, steps=0)
    assert same(weights(model), weights(fitted))
    assert again.seconds == progress.seconds


def test_another_seed_gives_other_weights(tmp_path):
    a, b = build("meg"), build("meg")
    train(a, tmp_path / "a")
    train(b, tmp_path / "b", seed=4)
    assert not same(weights(a), weights(b))


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty"])
def test_a_damaged_checkpoint_is_named_and_passed_over(tmp_path, damage, caplog):
    again = build("meg")
    with pytest.raises(Killed):
        train(killed_at(build("meg"), 31), tmp_path)
    newest = Checkpoints(tmp_path).paths()[-1]
    raw = bytearray(newest.read_bytes())
    if damage == "flip":
        raw[len(raw) // 2] ^= 1
    newest.write_bytes({"truncate": raw[: len(raw) // 2], "flip": raw, "empty": b""}[damage])
    train(again, tmp_path)
    assert newest.name in caplog.text
    assert "damaged" in caplog.text
    assert same(uninterrupted("meg")[0], weights(again))


def test_a_checkpoint_that_cannot_be_written_is_one_line_and_loses_nothing(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(10, {"step": 10})
    (blocked := tmp_path / "step-0000000020.ckpt").mkdir()
    with pytest.raises(EBMError, match="cannot be written"):
        checkpoints.save(20, {"step": 20})
    blocked.rmdir()
    assert [path.name for path in tmp_path.iterdir()] == ["step-0000000010.ckpt"]
    assert checkpoints.newest() == {"step": 10}


def test_what_a_kill_left_half_written_is_gone_when_training_goes_on(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(10, {"step": 10})
    (tmp_path / ".step-0000000020.ckpt.123").write_bytes(b"half")
    with checkpoints.locked():
        assert {path.name for path in tmp_path.iterdir()} == {"lock", "step-0000000010.ckpt"}
    assert checkpoints.newest() == {"step": 10}


def test_two_trainings_never_share_a_folder(tmp_path):
    second = Checkpoints(tmp_path).locked()
    with Checkpoints(tmp_path).locked(), pytest.raises(EBMError, match="another process"):
        second.__enter__()


class Exploding(EBM):
    """Its loss turns non-finite, or its gap grows, at one step of the first attempts."""

    def __init__(self, value, attempts):
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(()))
        self.value, self.attempts, self.seen = value, attempts, 0

    def configure_optimizers(self):
        return {"w": torch.optim.SGD([self.w], lr=0.1)}

    def training_step(self, x, y=None):
        descend(self.optimizers["w"], (self.w - torch.randn(())).square())
        gap = self.w.detach() * 0
        if self.optimizers["w"].param_groups[0]["lr"] < 0.06 and self.seen < self.attempts:
            self.seen += 1
            gap = gap + self.value
        return {"energy_gap": gap}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e6])
def test_divergence_goes_back_and_on(tmp_path, value, caplog):
    model = Exploding(value, attempts=2)
    progress = train(model, tmp_path, watch=Watch({"energy_gap": 100.0}, 3))
    assert progress.restarts == 2
    assert "diverged at step" in caplog.text
    assert [row["step"] for row in progress.history] == list(range(5, 45, 5))
    assert all(abs(row["energy_gap"]) < 100 for row in progress.history)


def test_a_model_without_noise_goes_another_way_after_divergence():
    """By rows in another order; those of the first attempt are what they were without any."""
    batches = Batches(50, 8, 0, torch.device("cpu"))
    first, again = batches(3, 0), batches(3, 1)
    assert torch.equal(first, Batches(50, 8, 0, torch.device("cpu"))(3))
    assert not torch.equal(first, again)
    assert torch.equal(batches(3, 0), first)
    assert torch.equal(batches(3, 1), again)


def test_divergence_that_stays_is_an_error_that_names_the_scalar(tmp_path):
    with pytest.raises(DivergenceError, match="energy_gap"):
        train(Exploding(float("nan"), 99), tmp_path, watch=Watch({}, 2))


def test_a_limit_of_what_is_not_logged_is_named(tmp_path):
    with pytest.raises(EBMError, match=r"train\.watch\.limits: unknown scalar 'energy_gapp'"):
        train(Exploding(1.0, 0), tmp_path, watch=Watch({"energy_gapp": 1.0}, 3))


@pytest.mark.parametrize("failure", [OSError(5, "Input/output error"), RuntimeError("no memory")])
def test_a_checkpoint_that_cannot_be_read_now_is_not_lost(tmp_path, monkeypatch, failure):
    def fails(*args, **kwargs):
        raise failure

    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(10, {"step": 10})
    with monkeypatch.context() as ill:
        what = (Path, "read_bytes") if isinstance(failure, OSError) else (torch, "load")
        ill.setattr(*what, fails)
        for read in (checkpoints.newest, checkpoints.oldest):
            with pytest.raises(EBMError, match=r"step-0000000010\.ckpt: "):
                read()
    assert checkpoints.newest() == {"step": 10}


def test_divergence_goes_back_past_a_damaged_checkpoint(tmp_path, caplog):
    checkpoints = Checkpoints(tmp_path)
    for step in (10, 20):
        checkpoints.save(step, {"step": step})
    path = checkpoints.paths()[0]
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert checkpoints.oldest() == {"step": 20}
    assert "damaged" in caplog.text
    assert [path.name for path in checkpoints.paths()] == ["step-0000000020.ckpt"]
    path = checkpoints.paths()[0]
    path.write_bytes(b"")
    with pytest.raises(EBMError, match="no checkpoint is whole"):
        checkpoints.oldest()


def test_divergence_goes_back_as_far_whether_or_not_a_kill_left_an_older_checkpoint(
    tmp_path, monkeypatch
):
    checkpoints = Checkpoints(tmp_path)
    for step in (10, 20):
        checkpoints.save(step, {"step": step})
    with monkeypatch.context() as killed:
        killed.setattr(Path, "unlink", dies)
        with pytest.raises(Killed):
            checkpoints.save(30, {"step": 30})
    assert len(checkpoints.paths()) == 3
    assert checkpoints.oldest() == {"step": 20}
    assert len(checkpoints.paths()) == 1


def test_an_epoch_is_a_permutation_and_the_next_another():
    batches = Batches(50, 8, 0, torch.device("cpu"))
    first = torch.cat([batches(i) for i in range(6)])
    second = torch.cat([batches(i) for i in range(6, 12)])
    assert len(set(first.tolist())) == 48
    assert not torch.equal(first, second)
    assert torch.equal(batches(3), Batches(50, 8, 0, torch.device("cpu"))(3))


@pytest.mark.parametrize("variant", sorted(MODELS))
def test_all_data_are_made_floats_at_once_only_for_a_model_that_looks_at_them(
    tmp_path, monkeypatch, variant
):
    """A large data set is bytes, and so many floats are four times as much."""
    seen = []
    monkeypatch.setattr("ebm.train.unit", lambda x: seen.append(len(x)) or unit(x))
    model = build(variant)
    train(model, tmp_path, steps=1)
    assert (len(data()) in seen) == (type(model).initialise is not EBM.initialise)


def test_a_batch_larger_than_the_data_is_refused(tmp_path):
    with pytest.raises(EBMError, match="batch_size = 51 is more than the 50 training rows"):
        train(build("rbm"), tmp_path, batch_size=51)


def test_seeds_are_all_different():
    assert len({mix("step", a, b) for a in range(50) for b in range(50)}) == 2500


def test_descend_touches_no_other_parameter_and_clips():
    mine, other = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    norm = descend(torch.optim.SGD([mine], lr=1.0), (mine * other * 2).sum(), clip=1.0)
    assert norm.item() == pytest.approx(12**0.5)
    assert (torch.ones(3) - mine).norm().item() == pytest.approx(1, rel=1e-4)
    assert other.grad is None


def test_weights_come_back_from_their_files_and_bad_files_are_named(tmp_path):
    import json

    from safetensors.torch import save_file

    model = build("meg")
    config, file = tmp_path / "config.json", tmp_path / "weights.safetensors"
    config.write_text(json.dumps({"variant": "meg", "shape": [4], "model": MODELS["meg"]}))
    save_file(weights(model), file)
    loaded = variants.load(file, config)
    assert torch.equal(loaded.energy(data()), model.energy(data()))
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(EBMError, match=r"weights\.safetensors"):
        variants.load(file, config)
    config.write_text("{}")
    with pytest.raises(EBMError, match=r"config\.json"):
        variants.load(file, config)


@pytest.mark.parametrize(
    "ensemble", [None, {"members": 2, "snapshots": 1, "every": 1, "without": []}]
)
def test_a_model_comes_back_at_rest(tmp_path, ensemble):
    """In training mode the points of a generator that normalises would depend on each other."""
    import json

    from safetensors.torch import save_file

    widths = {"energy": [2, 4], "generator": [4, 2], "statistics": [2, 4]}
    settings = MODELS["meg"] | widths | {"network": "conv"}
    model = variants.build("meg", (8, 8), settings, ensemble)
    model.training_step(torch.rand(16, 8, 8))
    config, file = tmp_path / "config.json", tmp_path / "weights.safetensors"
    content = {"variant": "meg", "shape": [8, 8], "model": settings, "ensemble": ensemble}
    config.write_text(json.dumps(content))
    save_file(weights(model), file)
    loaded = variants.load(file, config)
    assert not any(module.training for module in loaded.modules())
    z = torch.randn(6, settings["latent"])
    for of in histories(loaded):
        torch.testing.assert_close(of[0].generate(z)[:2], of[0].generate(z[:2]))


def test_sigkill_at_random_moments_leaves_the_bits_of_a_run_that_nobody_kills(tmp_path):
    """A real process, killed while it writes checkpoints as fast as it can. It is forked from one
    that has imported what takes seconds (with one thread: a fork loses the others), for each line
    of input, and its end is told."""
    script = textwrap.dedent(f"""
        import os, pathlib, sys; sys.path[:0] = {sys.path!r}
        import small_models as t
        for line in sys.stdin:
            if not (victim := os.fork()):
                t.train(t.build("meg"), pathlib.Path("run"), steps=10**6, checkpoint_every=5)
            print(victim, flush=True)
            print(os.waitstatus_to_exitcode(os.waitpid(victim, 0)[1]), flush=True)
    """)

    def checkpoints():
        return [path.name for path in Checkpoints(tmp_path / "run").paths()]

    with subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as template:
        for delay in (0.0, 0.05, 0.13):
            before = checkpoints()
            print(file=template.stdin, flush=True)
            victim = int(template.stdout.readline())
            wait_for(lambda before=before: checkpoints() > before, 60)
            time.sleep(delay)
            os.kill(victim, signal.SIGKILL)
            assert int(template.stdout.readline()) == -signal.SIGKILL
            left = Checkpoints(tmp_path / "run").newest()
            assert left is not None
    whole = Checkpoints(tmp_path / "whole")
    last = left["progress"]["step"]
    with pytest.raises(Killed):
        train(killed_at(build("meg"), last + 1), whole.folder, steps=10**6, checkpoint_every=last)
    assert same(left["model"], whole.newest()["model"])


class Watched(EBM):
    """Logs how often it was called; keeps what it drew and the learning rate of every step."""

    def __init__(self, diverges_at=None, value=math.inf):
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(()))
        self.register_buffer("calls", torch.tensor(0.0))
        self.diverges_at, self.value = diverges_at, value
        self.drawn, self.rates = [], []

    def configure_optimizers(self):
        return {"w": torch.optim.SGD([self.w], lr=0.1)}

    def training_step(self, x, y=None):
        self.calls += 1
        self.drawn.append((int(self.calls), torch.randn(()).item()))
        self.rates.append(self.optimizers["w"].param_groups[0]["lr"])
        value = self.calls.clone()
        if self.diverges_at == len(self.drawn):
            value = value + self.value
        return {"energy_gap": value}


def test_the_learning_rate_falls_linearly_over_the_last_share_of_the_steps(tmp_path):
    model = Watched()
    train(model, tmp_path, cooldown=0.25)
    expected = [0.1] * 30 + [0.1 * left / 10 for left in range(10, 0, -1)]
    assert model.rates == pytest.approx(expected)


def test_the_history_is_of_means_over_the_steps_since_the_last_row(tmp_path):
    rows = train(Watched(), tmp_path, steps=13).history
    assert [(row["step"], row["energy_gap"]) for row in rows] == [(5, 3), (10, 8), (13, 12)]


@pytest.mark.parametrize("at", [38, 50])
def test_a_restart_outlives_a_kill(tmp_path, at):
    """Step 33 diverges, so steps 21 to 40 come again with other noise; one that is killed among
    them, before or after a checkpoint, goes on with that noise."""
    watch = Watch({"energy_gap": 100.0}, 1)
    whole, resumed = Watched(33), Watched()
    train(whole, tmp_path / "whole", watch=watch)
    with pytest.raises(Killed):
        train(killed_at(Watched(33), at + 1), tmp_path / "killed", watch=watch)
    progress = train(resumed, tmp_path / "killed", watch=watch)
    again = dict(whole.drawn[35:])
    assert progress.restarts == 1
    assert resumed.drawn
    assert all(again[number] == noise for number, noise in resumed.drawn)


def test_the_seconds_of_a_training_go_on_where_a_kill_found_them(tmp_path):
    train(build("rbm"), tmp_path, steps=20)
    content = Checkpoints(tmp_path).newest()
    content["progress"]["seconds"] = 1000.0
    Checkpoints(tmp_path).save(content["progress"]["step"], content)
    assert 1000 < train(build("rbm"), tmp_path).seconds < 1100


@pytest.mark.parametrize("value", [math.inf, -math.inf, 1e6, -1e6])
def test_divergence_goes_back_to_the_older_checkpoint_and_on_with_other_noise(tmp_path, value):
    """At step 33, with checkpoints of the steps 20 and 30."""
    model = Watched(33, value)
    progress = train(model, tmp_path, watch=Watch({"energy_gap": 100.0}, 3))
    assert progress.restarts == 1
    assert len(model.drawn) == 35 + 20
    first, again = dict(model.drawn[:35]), dict(model.drawn[35:])
    assert sorted(again) == list(range(21, 41))
    assert all(first[step] != again[step] for step in range(21, 36))


def test_a_moving_average_forgets_what_it_began_with_and_follows_buffers_at_once():
    current = torch.nn.BatchNorm1d(3)
    average = average_of(current, 0.9)
    for weight in (3.0, 5.0, 2.0):
        torch.nn.init.constant_(current.weight, weight)
        current(2 + torch.randn(50, 3))
        update_average(average, current, 0.9)
    expected = (0.81 * 3 + 0.9 * 5 + 2) / (0.81 + 0.9 + 1)
    assert average.weight.tolist() == pytest.approx([expected] * 3)
    assert torch.equal(average.running_mean, current.running_mean)
    assert torch.equal(average.running_var, current.running_var)
    assert average.num_batches_tracked == 3
    assert average.updates == 3
    assert average_of(current, 0.0) is None


@pytest.mark.parametrize("variant", ["meg", "wgan_gp", "bigan"])
@pytest.mark.parametrize("snapshots", [None, 2])
def test_training_ends_with_statistics_of_every_averaged_generator(variant, snapshots, tmp_path):
    widths = {
        "meg": {"energy": [4, 4], "generator": [4, 4], "statistics": [4, 4]},
        "wgan_gp": {"energy": [4, 4], "generator": [4, 4]},
        "bigan": {"encoder": [4, 4], "generator": [4, 4], "discriminator": [4, 4]},
    }
    settings = MODELS[variant] | {"network": "conv", "ema": 0.9} | widths[variant]
    ensemble = snapshots and {"members": 2, "snapshots": snapshots, "every": 2, "without": []}
    model = variants.build(variant, (8, 8), settings, ensemble)
    images = torch.rand(40, 8, 8)
    options = OPTIONS | {"steps": 4, "watch": WATCH, "checkpoints": Checkpoints(tmp_path)}
    fit(model, images, **options)
    seen = [
        int(module.num_batches_tracked)
        for history in histories(model)
        for one in history
        for module in one.averaged_generator().modules()
        if isinstance(module, torch.nn.BatchNorm2d)
    ]
    assert len(seen) >= (4 if snapshots else 1)
    assert set(seen) == {BATCHES}


def test_the_first_update_of_a_moving_average_is_the_network():
    current = torch.nn.Linear(3, 3)
    average = average_of(torch.nn.Linear(3, 3), 0.999)
    update_average(average, current, 0.999)
    assert torch.equal(average.weight, current.weight)


class Looker(EBM):
    """Keeps what it is given, in which mode."""

    classes = 3

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(()))
        self.seen, self.begun = [], None

    def configure_optimizers(self):
        return {"w": torch.optim.SGD([self.w], lr=0.1)}

    def initialise(self, x, y=None):
        self.begun = x, y

    def training_step(self, x, y=None):
        assert self.training
        self.seen.append((x, y))
        return {"energy_gap": self.w.detach()}


def looked(model, folder, *data):
    """The rows of the batch of each of 20 steps, and what the model was given there."""
    checkpoints, watch = Checkpoints(folder), Watch({}, 0)
    fit(model, *data, steps=20, watch=watch, checkpoints=checkpoints, **OPTIONS)
    order = Batches(60, 8, 3, torch.device("cpu"))
    return [(order(step), given) for step, given in enumerate(model.seen)]


def test_a_step_sees_the_rows_of_its_batch_with_their_classes_as_points_in_training_mode(tmp_path):
    rows = torch.arange(60, dtype=torch.uint8)[:, None]
    labels = torch.arange(60) % 3
    model = Looker().eval()
    for expected, (x, y) in looked(model, tmp_path, rows, labels):
        torch.testing.assert_close(x[:, 0], expected / 255)
        assert torch.equal(y, labels[expected])
    x, y = model.begun
    torch.testing.assert_close(x, rows / 255)
    assert torch.equal(y, labels)


def test_bits_are_drawn_of_the_greys_of_the_same_rows(tmp_path):
    """Greys of 0 and 1 leave nothing to chance; the data say otherwise."""
    greys = (torch.arange(60)[:, None] >> torch.arange(6) & 1).to(torch.uint8) * 255
    model = Looker()
    for expected, (x, _) in looked(model, tmp_path, 255 - greys, torch.arange(60) % 3, greys):
        assert torch.equal(x, greys[expected] / 255)
    assert torch.equal(model.begun[0], 1 - greys / 255)
