"""Processes that train together take the steps of one: every variant, every draw, every chain."""

import functools
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from small_models import MODELS, Killed, killed_at, same, weights

from ebm import EBMError, parallel, variants
from ebm.checkpoint import Checkpoints
from ebm.seeds import seed
from ebm.train import Watch, fit
from ebm.variants.base import EBM, descend
from pipelines import processes

VECTORS, IMAGES = (4,), (8, 8)
CONVOLUTIONS = {"network": "conv", "generator": [4, 2], "energy": [2, 4]}
CASES = {
    **{name: (name, VECTORS, {}, None) for name in MODELS if name not in ("fce", "igebm", "nce")},
    # a share of 4 draws that is a whole number, as it is of 8
    "fce": ("fce", VECTORS, {"defence": 0.25}, None),
    "nce": ("nce", VECTORS, {"defence": 0.25}, None),
    "nce, tilted": ("nce", VECTORS, {"defence": 0.0, "tilted": True}, None),
    "fce, semi-supervised": (
        "fce",
        VECTORS,
        {"defence": 0.0, "classes": 2, "labelled": 8, "supervision": 1.0, "smoothness": 0.1},
        None,
    ),
    "igebm": ("igebm", VECTORS, {}, None),
    "igebm, conditional": ("igebm", VECTORS, {"classes": 2, "spectral_norm": True}, None),
    "meg, convolutions": ("meg", IMAGES, CONVOLUTIONS | {"statistics": [2, 4]}, None),
    "wgan_gp, convolutions": ("wgan_gp", IMAGES, CONVOLUTIONS, None),
    "meg, an ensemble": (
        "meg",
        VECTORS,
        {},
        {"members": 2, "snapshots": 1, "every": 4, "without": []},
    ),
    "rbm, drawn anew": ("rbm", VECTORS, {}, None),
    "rbm, an ensemble": (
        "rbm",
        VECTORS,
        {},
        {"members": 2, "snapshots": 1, "every": 4, "without": []},
    ),
}
JUMPS = {"igebm, jumps": ("igebm", VECTORS, {"noise": "coupled", "jumps": 2}, None)}
OPTIONS = {"batch_size": 8, "seed": 3, "log_every": 4, "checkpoint_every": 8, "cooldown": 0.5}
STEPS = 20  # the first 12 warm the flows up
CLOSE = {"rtol": 1e-7, "atol": 1e-9}  # Adam makes much of the rounding of a small gradient
ROUGH = {"rtol": 1e-2, "atol": 3e-4}
ROUNDED = {"fce, semi-supervised": ROUGH}  # its roughness is a difference over a tiny distance


def train(case, folder, steps=STEPS, batch_size=8, kill_at=None):
    """The model of a case after so many steps, and their history."""
    variant, shape, changes, ensemble = (CASES | JUMPS)[case]
    seed("model", 0)
    model = variants.build(variant, shape, MODELS[variant] | changes, ensemble)
    killed_at(model, kill_at)
    generator = torch.Generator().manual_seed(0)
    greys = torch.rand(50, *shape, generator=generator)
    data = (greys < 0.5).double()
    labels = torch.arange(50) % 2 if model.needs_labels else None
    options = OPTIONS | {"batch_size": batch_size}
    checkpoints = Checkpoints(folder)
    progress = fit(
        model,
        data,
        labels,
        greys if case.endswith("drawn anew") else None,
        steps=steps,
        watch=Watch({}, 3),
        checkpoints=checkpoints,
        **options,
    )
    return model, progress.history


def together(folder, body, processes=2):
    """Run `body` in processes that train together, each with this module as `t`."""
    script = f"""
        import os, sys; sys.path[:0] = {sys.path!r}
        import pathlib, torch, torch.distributed as dist, test_parallel as t
        from ebm import EBMError, parallel
        torch.set_num_threads(1)
        torch.set_default_dtype(torch.double)
        rank, folder = int(sys.argv[1]), pathlib.Path({str(folder)!r})
        dist.init_process_group(
            "gloo", f"file://{{folder}}/store", rank=rank, world_size={processes}
        )
    """
    command = [sys.executable, "-c", textwrap.dedent(script) + textwrap.dedent(body)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen([*command, str(rank)], env=environment, stderr=subprocess.PIPE, text=True)
        for rank in range(processes)
    ]
    errors = [process.communicate(timeout=300)[1] for process in started]
    assert [process.returncode for process in started] == [0] * processes, errors


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """What two processes came to: for each case the whole state and the history."""
    folder = tmp_path_factory.mktemp("shared")
    together(
        folder,
        """
        for case in t.CASES:
            model, history = t.train(case, folder / case)
            if rank == 0:
                torch.save([t.weights(model), history], folder / f"{case}.pt")
        try:
            t.train("igebm", folder / "half", kill_at=12)
        except t.Killed:
            pass
        torch.save(t.quadratic(), folder / f"gradient {rank}.pt")
        for count, case in [(9, "rbm"), (10, "rbm, an ensemble")]:
            try:
                t.train(case, folder / "refused", batch_size=count)
            except EBMError as error:
                (folder / f"{count}.txt").write_text(str(error))
        """,
    )
    return folder


@pytest.fixture
def stratified(monkeypatch):
    """Let one process choose the rows of a buffer as two do: equally many of each one's."""
    permutation = torch.randperm

    def chosen(n, **kwargs):
        order = permutation(n, **kwargs)
        if "generator" in kwargs or n != MODELS["igebm"]["buffer"]:
            return order
        return torch.stack([order[order % 2 == rank] for rank in (0, 1)], 1).flatten()

    monkeypatch.setattr(torch, "randperm", chosen)


def assert_close(state, expected, within=CLOSE):
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        told = functools.partial("{}: {}".format, name)
        torch.testing.assert_close(state[name], tensor, **within, msg=told)


@pytest.mark.parametrize("case", CASES)
def test_two_processes_end_with_the_weights_of_one(double, stratified, shared, tmp_path, case):
    state, history = torch.load(shared / f"{case}.pt")
    model, expected = train(case, tmp_path)
    assert_close(state, weights(model), ROUNDED.get(case, CLOSE))
    assert [row["step"] for row in history] == [row["step"] for row in expected]
    for row, other in zip(history, expected, strict=True):
        close = pytest.approx(other["energy_gap"], rel=1e-2 if case in ROUNDED else 1e-6, abs=1e-9)
        assert row["energy_gap"] == close


@pytest.mark.parametrize("case", sorted(CASES.keys() - MODELS.keys() | JUMPS.keys()))
@pytest.mark.parametrize("at", [9, 14])
def test_a_killed_run_ends_with_the_same_bits(double, tmp_path, case, at):
    """As `test_train` has it of the plain variants."""
    whole, history = train(case, tmp_path / "whole")
    with pytest.raises(Killed):
        train(case, tmp_path / "killed", kill_at=at + 1)
    torch.rand(17)  # whatever else draws meanwhile
    resumed, again = train(case, tmp_path / "killed")
    assert same(weights(whole), weights(resumed))
    assert again == history


def test_every_variant_is_among_the_cases():
    assert {variant for variant, *_ in CASES.values()} == variants.VARIANTS.keys()


def test_one_process_goes_on_where_two_were_stopped(double, stratified, shared, tmp_path):
    for path in (shared / "half").glob("*.ckpt"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    assert Checkpoints(tmp_path).newest()["progress"]["step"] == 8
    model, _ = train("igebm", tmp_path)
    assert_close(weights(model), torch.load(shared / "igebm.pt")[0])


def test_what_cannot_be_shared_equally_is_refused_in_one_line(shared):
    told = "train.batch_size = 9 cannot be shared equally by 2 processes"
    assert (shared / "9.txt").read_text() == told


class Quadratic(EBM):
    """Its gradient is that of a mean over the batch, of whose rows each has a weight."""

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.ones(3))

    def configure_optimizers(self):
        return {"w": torch.optim.SGD([self.w], lr=0.0)}

    def training_step(self, x, y=None):
        loss = ((x - self.w) ** 2 * torch.rand(len(x), 1)).sum(1).mean()
        norm = descend(self.optimizers["w"], loss)
        return {"gradient_norm": norm}


def quadratic():
    """The gradient after a step on this process' rows."""
    model = Quadratic()
    seed("step", 0)
    with parallel.same_draws():
        model.training_step(parallel.mine(torch.arange(36.0).view(12, 3)))
    return model.w.grad


@pytest.fixture(params=[2, pytest.param(3, marks=pytest.mark.slow)])
def gradients(request, shared, tmp_path):
    if request.param == 2:
        folder = shared
    else:
        folder = tmp_path
        together(folder, "torch.save(t.quadratic(), folder / f'gradient {rank}.pt')", 3)
    return [torch.load(folder / f"gradient {rank}.pt") for rank in range(request.param)]


def test_the_gradient_is_that_of_the_whole_batch(double, gradients):
    assert all(torch.equal(gradients[0], other) for other in gradients[1:])
    torch.testing.assert_close(gradients[0], quadratic(), **CLOSE)


DRAWN = {
    "rand": lambda n: torch.rand(n),
    "rand of a size": lambda n: torch.rand(size=(n, 3)),
    "randn": lambda n: torch.randn(n, 3),
    "randn of a tuple": lambda n: torch.randn((n, 3), dtype=torch.float),
    "randint": lambda n: torch.randint(9, (n, 2)),
    "randint between": lambda n: torch.randint(3, 9, size=(n,)),
    "rand_like of one row": lambda n: torch.rand_like(torch.zeros(1, 5).expand(n, 5)),
    "randn_like, channels last": lambda n: torch.randn_like(
        torch.zeros(n, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    ),
    "uniform_": lambda n: torch.empty(n, 2).uniform_(-1, 2),
    "dropout": lambda n: torch.nn.functional.dropout(torch.full((n, 30), 3.0), 0.3),
    "a distribution": lambda n: torch.distributions.Normal(torch.zeros(3), 1.0).rsample((n,)),
}


@pytest.fixture
def as_rank(monkeypatch):
    """Calls a function with the draws that one process of several makes in a step."""

    def call(rank, world, function):
        with monkeypatch.context() as patch:
            patch.setattr(parallel, "rank", lambda: rank)
            patch.setattr(parallel, "world", lambda: world)
            torch.manual_seed(0)
            with parallel.same_draws():
                return function()

    return call


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("name", DRAWN)
def test_several_processes_draw_the_rows_that_one_draws(name, world, as_rank):
    """And what comes next as well: a number alike in all of them, rows of their own."""

    def draws(n):
        return DRAWN[name](n), torch.rand(()), torch.rand(n)

    torch.manual_seed(0)
    first, number, last = draws(4 * world)
    for rank in range(world):
        ours = as_rank(rank, world, lambda: draws(4))
        assert torch.equal(ours[0], first[rank::world])
        assert torch.equal(ours[1], number)
        assert torch.equal(ours[2], last[rank::world])


def test_a_process_permutes_its_own_rows_as_the_permutation_of_all_does(as_rank):
    torch.manual_seed(0)
    order = torch.randperm(12)
    for rank in range(3):
        found = as_rank(rank, 3, lambda: torch.randperm(4))
        assert found.tolist() == [row // 3 for row in order.tolist() if row % 3 == rank]


def test_what_would_be_drawn_alike_by_all_is_refused(as_rank):
    with pytest.raises(NotImplementedError, match="bernoulli"):
        as_rank(0, 2, lambda: torch.bernoulli(torch.ones(3)))


@pytest.mark.parametrize(
    ("asked", "started", "wanted"),
    [(None, False, 1), ("", False, 1), ("2", False, 2), ("2", True, 1)],
)
def test_as_many_processes_start_as_are_asked_for_and_none_of_them_starts_more(
    monkeypatch, asked, started, wanted
):
    for name, value in {"EBM_PROCESSES": asked, "LOCAL_RANK": "0" if started else None}.items():
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    assert processes.wanted() == wanted


@pytest.mark.parametrize("asked", ["0", "-1", "two", "1.5"])
def test_what_is_no_number_of_processes_is_one_line(monkeypatch, asked):
    monkeypatch.setenv("EBM_PROCESSES", asked)
    with pytest.raises(EBMError, match=rf"^EBM_PROCESSES = {asked}: expected how many"):
        processes.wanted()


@pytest.mark.parametrize(("world", "threads"), [("1", 5), ("2", 2), ("8", 1)])
def test_processes_on_a_machine_share_its_threads_and_each_has_one(monkeypatch, world, threads):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", world)
    assert processes.share(5) == threads


def test_one_process_is_left_alone():
    x = torch.arange(6.0)
    assert (parallel.world(), parallel.rank()) == (1, 0)
    assert parallel.mine(x) is not None
    assert torch.equal(parallel.mine(x), x)
    assert parallel.averaged(x) is x
    assert parallel.gathered(x) is x
    torch.manual_seed(0)
    shuffled = parallel.shuffled(x)
    torch.manual_seed(0)
    assert torch.equal(shuffled, x[torch.randperm(6)])
    with pytest.raises(EBMError, match="no"):
        parallel.from_first(lambda: raised(EBMError("no")))


def raised(error):
    raise error
