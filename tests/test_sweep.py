"""A sweep ends with exactly the trials that were asked for, whatever is killed, and its patch
changes the best parameters and nothing else."""

import csv
import errno
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import sweep_house
from toy_house import CHECKOUT, alive, wait_for
from tracking_store import MLFLOW_WARNS, Lookup

from ebm import EBMError, params
from pipelines import dag, gpu, patch, run, space, study, sweep, trial
from pipelines.spool import Spool
from pipelines.supervise import Cancelled

slow = pytest.mark.slow
PARAMS = (CHECKOUT / "params.yaml").read_text(encoding="utf-8")
RATE = space.Range("model.learning_rate", 1e-4, 1e-1, log=True)
HIDDEN = space.Range("model.hidden", 50, 400, log=False)
SPACE = (RATE, HIDDEN, space.Choice("model.k", ("1", "5", "10")))


def parse(*arguments):
    return space.parse(arguments, PARAMS, "rbm-digits")


def test_the_grammar_has_ranges_of_the_type_in_params_and_choices():
    given = "model.learning_rate=1e-4..1e-1:log", "model.hidden=50..400", "model.k=1,5,10"
    assert parse(*given) == SPACE
    assert parse("train.cooldown=0..1") == (space.Range("train.cooldown", 0.0, 1.0, log=False),)
    (watch,) = parse("train.watch={limits: {}, restarts: 0}, {limits: {a: 1.0}, restarts: 1}")
    assert watch.options == ("{limits: {}, restarts: 0}", "{limits: {a: 1.0}, restarts: 1}")


@pytest.mark.parametrize(
    ("argument", "complaint"),
    [
        ("model.hiden=1..2", "model.hiden: no such key; did you mean 'hidden'?"),
        ("model.hidden", "expected KEY=LOW..HIGH, KEY=LOW..HIGH:log or KEY=A,B,C"),
        ("model.hidden=9..1", "9 is not below 1"),
        ("model.hidden=9..9", "9 is not below 9"),
        ("model.hidden=1..x", "'x' is not a number"),
        ("model.hidden=1..9:lin", "after the colon only 'log' may stand"),
        ("model.momentum=0..1:log", "a logarithm needs a lower end above 0"),
        ("model.k=1,1", "a value is given twice"),
        ("model.k=[1", "not values of YAML"),
        ("model=1", "a block of several lines; name a key in it"),
        ("dataset=digits-grey", "another dataset is another experiment"),
        ("model.hidden=0..9", "params.yaml: experiments.rbm-digits.model.hidden = 0: should be"),
        ("model.hidden=0.5..9", "should be a valid integer"),
        ("model.k=1,five", "model.k = 'five': should be a valid integer"),
    ],
)
def test_a_search_that_cannot_be_is_one_line(argument, complaint):
    with pytest.raises(EBMError) as error:
        parse(argument)
    assert complaint in str(error.value)
    assert "\n" not in str(error.value)


def test_a_key_is_searched_once():
    with pytest.raises(EBMError, match=r"model.k: given twice"):
        parse("model.k=1,2", "model.k=3,4")
    with pytest.raises(EBMError, match=r"--search .*cannot be changed each by itself"):
        parse("train.watch={limits: {}, restarts: 0}", "train.watch.restarts=1,2")


@pytest.mark.parametrize("number", [1e-05, 1.5e-07, 0.1, 1e22, 12, -3.0])
def test_a_number_is_one_for_every_reader_of_yaml(number):
    text = patch.scalar(number)
    assert patch.value(text) == number
    assert "e" not in text or "." in text  # YAML 1.1 takes 1e-05 for a text


def test_a_number_of_a_range_is_short_and_within_it():
    narrow = space.Range("x", 0.12346, 0.123478, log=False)
    assert narrow.text(0.12347) == "0.123478"  # 0.1235 is beyond
    assert RATE.text(0.001234567) == "0.001235"
    assert HIDDEN.text(123) == "123"


def test_what_is_replaced_is_all_that_changes():
    texts = {"model.learning_rate": "0.01", "model.k": "5", "sample.steps": "7"}
    new = space.patched(PARAMS, "rbm-digits", texts)
    old_lines, new_lines = PARAMS.splitlines(), new.splitlines()
    changed = [(a, b) for a, b in zip(old_lines, new_lines, strict=True) if a != b]
    assert changed == [
        ("      k: 1", "      k: 5"),
        ("      learning_rate: 0.1", "      learning_rate: 0.01"),
        ("    sample: {count: 512, steps: 3000}", "    sample: {count: 512, steps: 7}"),
    ]
    assert patch.value(new)["experiments"]["rbm-digits-cd1"]["model"]["k"] == 1


def test_a_value_that_is_merged_from_elsewhere_is_not_replaced():
    merged = "a: &one {x: 1}\nb:\n  <<: *one\n  y: 2\n"
    assert patch.replaced(merged, {"b.y": "3"}) == merged.replace("y: 2", "y: 3")
    with pytest.raises(EBMError, match=r"^b\.x: comes from elsewhere \(<<\); write it out"):
        patch.replaced(merged, {"b.x": "3"})


def test_a_value_that_an_anchor_shares_is_not_replaced():
    shared = "a: {x: &one 1}\nb: {y: *one}\n"
    with pytest.raises(EBMError, match="cannot be changed each by itself"):
        patch.replaced(shared, {"a.x": "2"})
    with pytest.raises(EBMError, match="cannot be changed each by itself"):
        patch.replaced("a:\n  x:\n", {"a.x": "2"})  # an empty value has no place


def test_the_patch_is_one_for_git(tmp_path):
    for text in (PARAMS, PARAMS.rstrip("\n")):
        (tmp_path / "params.yaml").write_text(text)
        new = space.patched(text, "fce-digits", {"evaluate.grid": "3", "model.radius": "0.5"})
        difference = patch.diff(text, new, "params.yaml")
        command = ["git", "apply", "--unsafe-paths", f"--directory={tmp_path}"]
        subprocess.run(command, input=difference, text=True, check=True, cwd=tmp_path)
        assert (tmp_path / "params.yaml").read_text() == new
        params.load(tmp_path / "params.yaml")


def test_an_experiment_of_paper_is_told_how_it_can_be_varied(tmp_path):
    for folder in (tmp_path, tmp_path / "paper"):
        folder.mkdir(exist_ok=True)
        source = CHECKOUT / folder.relative_to(tmp_path) / "params.yaml"
        (folder / "params.yaml").write_text(source.read_text(encoding="utf-8"))
    told = "igebm-mnist: stands in paper/params.yaml, and sweeps search params.yaml; copy it"
    with pytest.raises(EBMError, match=f"^{told}"):
        sweep.plan("igebm-mnist", "modes", ["model.step_size=1,2"], root=tmp_path)
    with pytest.raises(EBMError, match=r"^params\.yaml: experiments: unknown name 'igebm-x'"):
        sweep.plan("igebm-x", "modes", ["model.step_size=1,2"], root=tmp_path)


def test_the_time_of_training_is_no_metric_of_a_trial(tmp_path):
    """Though the report has it beside the metrics."""
    (tmp_path / "params.yaml").write_text(PARAMS)
    (tmp_path / "metrics").mkdir()
    (tmp_path / "metrics" / "rbm-digits.json").write_text('{"log_likelihood": 1, "seconds": 2}')
    with pytest.raises(EBMError, match="no metric seconds; there are: log_likelihood"):
        sweep.plan("rbm-digits", "seconds", ["model.hidden=50,100"], root=tmp_path)
    evaluation = tmp_path / "models" / "rbm-digits" / "evaluation"
    evaluation.mkdir(parents=True)
    (evaluation / "metrics.json").write_text('{"log_partition": NaN}')  # which is not reported
    with pytest.raises(EBMError, match=r"there are: log_likelihood, log_partition$"):
        sweep.plan("rbm-digits", "seconds", ["model.hidden=50,100"], root=tmp_path)


@pytest.mark.parametrize("module", ["pipelines.sweep", "pipelines.sweep_flow"])
def test_help_is_that_of_the_module(module):
    text = sweep.parser(module).format_help()
    assert text.startswith(f"usage: python -m {module} ")
    assert set(re.findall(r"python -m (\S+)", text)) == {module}


def stage(name, *upstream, params=()):
    return dag.Stage(name, "true", upstream, False, params=tuple(params))


def test_a_trial_is_what_depends_on_the_searched():
    chain = [
        stage("prepare", params=["datasets.d"]),
        stage("train", "prepare", params=["experiments.e.model"]),
        stage("sample", "train", params=["experiments.e.sample"]),
        stage("evaluate", "sample", "prepare", params=["experiments.e.evaluate"]),
    ]

    def names(*keys):
        return [one.name for one in sweep.dependent(chain, keys)]

    assert names("experiments.e.model.hidden") == ["train", "sample", "evaluate"]
    assert names("experiments.e.sample") == ["sample", "evaluate"]
    assert names("experiments.e.sample.steps", "experiments.e.evaluate.grid") == names(
        "experiments.e.sample.steps"
    )
    assert names("experiments.e.modelling") == []


@pytest.mark.parametrize(
    ("cards", "uses", "trials"), [(0, True, 8), (2, True, 2), (2, False, 8), (9, True, 8)]
)
def test_no_more_trials_than_cards_run_where_a_stage_uses_one(monkeypatch, cards, uses, trials):
    monkeypatch.setattr(gpu, "count", lambda: cards)
    stages = [stage("train"), replace(stage("sample"), gpu=uses)]
    assert sweep.at_once(stages, 8) == trials


def opened(folder, spanned=SPACE, **changes):
    options = {"settings": {"metric": "m"}, "better": 1, "steps": 100, "seed": 0, **changes}
    return study.opened(folder / "s", space=spanned, **options)


def outcome_of(tried):
    """A trial without processes: every seventh fails, every fifth is pruned."""
    rate = float(tried.texts["model.learning_rate"])
    if tried.number % 7 == 6:
        return trial.Outcome(tried, "failed", 0.0, reason="diverged")
    if tried.number % 5 == 4:
        return trial.Outcome(tried, "pruned", 0.0, reason="hopeless")
    return trial.Outcome(tried, "done", 0.0, -rate)


def conduct(opened_study, work, wanted, jobs=1):
    with ThreadPoolExecutor(jobs) as pool:
        return list(sweep.schedule(opened_study, work, pool, jobs, wanted))


class KilledError(BaseException):
    pass


def test_as_many_trials_end_as_were_asked_for_and_more_can_be_added(tmp_path):
    with opened(tmp_path) as begun:
        assert len(conduct(begun, outcome_of, 8, jobs=3)) == 8
        assert conduct(begun, outcome_of, 8, jobs=3) == []
        assert len(conduct(begun, outcome_of, 11, jobs=3)) == 3
        assert begun.finished() == len(begun.records()) == 11


def test_trials_that_were_killed_go_on_and_no_trial_comes_out_different(tmp_path):
    with opened(tmp_path / "whole") as begun:
        conduct(begun, outcome_of, 12)
        expected = begun.records()
    chance, deaths = random.Random(0), 0

    def work(tried):
        if chance.random() < 0.4:
            raise KilledError
        return outcome_of(tried)

    while True:
        with opened(tmp_path / "killed") as begun:
            try:
                conduct(begun, work, 12)
                break
            except KilledError:
                deaths += 1
    with opened(tmp_path / "killed") as begun:
        assert begun.records() == expected
    assert deaths > 2
    assert {record.state for record in expected} == {"done", "pruned", "failed"}


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_kill_at_any_change_of_the_journal_leaves_the_number_exact(tmp_path, monkeypatch, share):
    """Every process dies soon, at a change of which a part has come to the disk."""
    append = study.JournalFileBackend.append_logs

    def append_or_die(backend, logs):
        if next(changes) == 2 + deaths % 3:
            line = "".join(f"{json.dumps(log)}\n" for log in logs)
            with open(backend._file_path, "a") as file:
                file.write(line[: round(share * len(line))])
            raise KilledError
        append(backend, logs)

    monkeypatch.setattr(study.JournalFileBackend, "append_logs", append_or_die)
    for deaths in itertools.count():  # noqa: B007 (a function above reads it)
        changes = itertools.count()
        with suppress(KilledError), opened(tmp_path) as begun:
            conduct(begun, outcome_of, 6)
            break
    assert deaths > 10
    assert [record.trial.number for record in begun.records()] == list(range(6))
    assert begun.finished() == 6


def test_a_full_disk_leaves_no_half_line_in_the_journal(tmp_path, monkeypatch):
    """What was cut off would be glued to what comes when there is room again."""
    append, full = study.JournalFileBackend.append_logs, [True]

    def append_in_part(backend, logs):
        if full.pop() if full else False:
            with open(backend._file_path, "a") as file:
                file.write(json.dumps(logs[0])[:20])
            raise OSError(errno.ENOSPC, "No space left on device")
        append(backend, logs)

    with opened(tmp_path) as begun:
        tried = begun.next(3)
        monkeypatch.setattr(study.JournalFileBackend, "append_logs", append_in_part)
        with pytest.raises(OSError, match="No space"):
            begun.report(tried.number, 1, 0.5)
        begun.report(tried.number, 2, 0.5)
        begun.finish(tried.number, "done", 0.5, "")
    with opened(tmp_path) as again:
        assert [record.state for record in again.records()] == ["done"]


def test_a_damaged_line_of_the_journal_is_named(tmp_path):
    with opened(tmp_path) as begun:
        conduct(begun, outcome_of, 2)
    journal = tmp_path / "s/journal.log"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join([lines[0], lines[1][:9] + lines[2], *lines[3:]]))
    with pytest.raises(EBMError, match=r"journal\.log: a line is damaged"), opened(tmp_path):
        pass


def test_what_was_left_is_not_taken_up_if_no_more_is_asked_for(tmp_path):
    def work(tried):
        if tried.number == 2:
            raise KilledError
        return outcome_of(tried)

    with opened(tmp_path) as begun, pytest.raises(KilledError):
        conduct(begun, work, 5)
    with opened(tmp_path) as begun:
        assert conduct(begun, outcome_of, 2) == []
        (outcome,) = conduct(begun, outcome_of, 3)
    assert outcome.trial.number == 2


def test_a_study_belongs_to_one_process(tmp_path):
    with (
        opened(tmp_path),
        pytest.raises(EBMError, match="another sweep is at work"),
        opened(tmp_path),
    ):
        pass


def test_a_study_goes_on_only_with_what_it_began_with(tmp_path):
    with opened(tmp_path, settings={"metric": "m", "search": {"a": "1"}}):
        pass
    with (
        pytest.raises(EBMError, match="began with another search; --study NAME"),
        opened(tmp_path, settings={"metric": "m", "search": {"a": "2"}}),
    ):
        pass


@pytest.mark.parametrize(("better", "number"), [(1, 0), (-1, 3)])
def test_the_best_is_the_first_of_equals_among_those_done(tmp_path, better, number):
    values = [3.0, 3.0, None, 1.0, 1.0]

    def work(tried):
        value = values[tried.number]
        return trial.Outcome(tried, "done" if value else "pruned", 0.0, value)

    with opened(tmp_path, better=better) as begun:
        conduct(begun, work, 5)
        assert begun.best().trial.number == number


def test_a_trial_worse_than_the_median_is_pruned_after_the_warm_up(tmp_path):
    """Of 100 steps the first quarter is warm-up, and the first five trials are spared."""
    asked = {}

    def work(tried):
        good = 0.0 if tried.number == 6 else 1.0
        steps = range(10, 101, 10)
        asked[tried.number] = [begun.report(tried.number, step, good) for step in steps]
        return outcome_of(tried)

    with opened(tmp_path) as begun:
        conduct(begun, work, 7)
    assert not any(any(asked[number]) for number in range(6))
    assert asked[6] == [False, False] + [True] * 8


@pytest.mark.parametrize(
    ("searched", "steps"),
    [("train.steps=200,20000,3000", 20000), ("train.steps=50..400", 400), ("model.k=1,5", 3)],
)
def test_the_warm_up_is_that_of_the_longest_training(searched, steps):
    content = {"train": {"steps": 3}}
    assert sweep._most_steps(parse(searched), content) == steps


def test_a_trial_that_was_once_as_good_as_the_median_is_spared(tmp_path):
    with opened(tmp_path) as begun:
        for _ in range(study.STARTUP):
            number = begun.next(9).number
            begun.report(number, 50, 1.0)
            begun.finish(number, "done", 1.0, "")
        number = begun.next(9).number
        assert not begun.report(number, 10, 1.0)
        assert not begun.report(number, 50, 0.0)


def test_steps_that_were_reported_are_remembered(tmp_path):
    def work(tried):
        begun.report(tried.number, 10, 0.5)
        begun.report(tried.number, 20, 0.5)
        raise KilledError

    with opened(tmp_path) as begun, pytest.raises(KilledError):
        conduct(begun, work, 1)
    with opened(tmp_path) as begun:
        assert begun.reported(begun.next(1).number) == 20


@pytest.fixture(scope="module")
def shells(tmp_path_factory):
    """What starts the stages of trials."""
    with run.start_launcher(tmp_path_factory.mktemp("shells"), trial.SHELL) as launcher:
        yield launcher


EXPERIMENT = "rbm-digits"
MEASURE = 'mkdir -p models/{0}/evaluation; echo "{{{1}}}" > models/{0}/evaluation/metrics.json'


def measure(metrics):
    """The command of a stage that finds `metrics`, a text of JSON without its braces."""
    return MEASURE.format(EXPERIMENT, metrics.replace('"', '\\"'))


def trials(begun, launcher, prune_by=None, **commands):
    """What runs trials of stages by their commands; the root holds `data`."""
    root = Path(os.environ["DVC_ROOT"])
    (root / "data").mkdir(exist_ok=True)
    stages = [dag.Stage(f"{name}@{EXPERIMENT}", cmd, (), True) for name, cmd in commands.items()]
    recipe = trial.Recipe(
        root, root / ".sweeps/s", PARAMS, EXPERIMENT, "m", prune_by, stages, ["data"]
    )
    return trial.Trials(recipe, begun, launcher)


def test_a_trial_runs_its_stages_in_a_folder_that_looks_like_the_root(
    fresh_root, no_courier, shells
):
    told = []
    with opened(fresh_root) as begun:
        tried = begun.next(1)
        outcome = trials(
            begun,
            shells,
            train='test -L data; echo "$DVC_STAGE $EBM_RUN $EBM_SCRATCH $DVC_ROOT"',
            evaluate=measure('"m": 0.5'),
        ).run(tried, told.append)
    folder = fresh_root / ".sweeps/s/trial-0"
    assert (outcome.state, outcome.value, outcome.lines) == ("done", 0.5, ())
    assert told == [f"train@{EXPERIMENT} {begun.key}-0 {folder} {fresh_root}"]
    assert (folder / "log.txt").read_text().splitlines() == told
    written = patch.value((folder / "params.yaml").read_text())["experiments"][EXPERIMENT]
    for key, text in tried.texts.items():
        assert patch.at(written, key) == patch.value(text)


def test_a_trial_goes_on_after_the_last_stage_that_was_done(fresh_root, no_courier, shells):
    with opened(fresh_root) as begun:
        tried, told = begun.next(1), []
        commands = {"train": "echo trained", "sample": "echo sampled"}
        broken = trials(begun, shells, **commands, evaluate="exit 3").run(tried, told.append)
        whole = trials(begun, shells, **commands, evaluate=measure('"m": 1'))
        assert whole.run(tried, told.append).value == 1.0
    assert (broken.state, broken.reason) == ("failed", f"evaluate@{EXPERIMENT}: exit code 3")
    assert broken.lines == ("trained", "sampled")
    assert told == ["trained", "sampled"]


def test_a_trial_that_a_moved_checkout_left_reads_what_lies_here_now(
    fresh_root, no_courier, shells
):
    with opened(fresh_root) as begun:
        tried = begun.next(1)
        folder = fresh_root / ".sweeps/s/trial-0"
        folder.mkdir(parents=True)
        (folder / "data").symlink_to("/where/it/was/data")
        work = trials(begun, shells, train="test -d data", evaluate=measure('"m": 1'))
        assert work.run(tried, print).value == 1.0
    assert (folder / "data").readlink() == fresh_root / "data"


@pytest.mark.parametrize(("code", "kept"), [(0, True), (3, False)])
def test_of_a_trial_that_failed_no_checkpoint_is_kept(fresh_root, no_courier, shells, code, kept):
    """Nothing can go on from it."""
    with opened(fresh_root) as begun:
        train = f"mkdir -p .checkpoints/e/1; exit {code}"
        work = trials(begun, shells, train=train, evaluate=measure('"m": 1'))
        work.run(begun.next(1), print)
    assert (fresh_root / ".sweeps/s/trial-0/.checkpoints").exists() == kept


@pytest.mark.parametrize("value", ["NaN", "Infinity"])
def test_a_metric_that_is_no_number_fails_its_trial(fresh_root, no_courier, shells, value):
    with opened(fresh_root) as begun:
        work = trials(begun, shells, evaluate=measure(f'"m": {value}'))
        outcome = work.run(begun.next(1), print)
    assert (outcome.state, outcome.value) == ("failed", None)
    assert outcome.reason == f"m is {float(value)}"


def test_a_metric_that_nobody_measures_ends_the_sweep(fresh_root, no_courier, shells):
    with opened(fresh_root) as begun:
        work = trials(begun, shells, evaluate=measure('"modes": 1'))
        with pytest.raises(EBMError, match=r"^there is no metric m; there are: modes$"):
            work.run(begun.next(1), print)


def test_parameters_that_are_wrong_together_fail_their_trial_before_it_runs(
    fresh_root, no_courier, shells
):
    spanned, told = (space.Choice("train.steps", ("no number",)),), []
    with opened(fresh_root, spanned) as begun:
        outcome = trials(begun, shells, train="echo ran").run(begun.next(1), told.append)
    assert (outcome.state, told) == ("failed", [])
    assert "train.steps" in outcome.reason


def test_a_trial_that_is_ended_from_outside_has_not_failed(fresh_root, no_courier, shells):
    with opened(fresh_root) as begun:
        work = trials(begun, shells, train="kill -TERM $EBM_SUPERVISOR; sleep 9")
        with pytest.raises(Cancelled):
            work.run(begun.next(1), print)
        assert begun.finished() == 0


ROW = '{{"op": "row", "step": {0}, "restarts": 0, "values": {{"loss": {1}}}}}'


def logging_loss(step, loss, then):
    """What a training does that logs a loss at a step."""
    row = ROW.format(step, loss)
    return f"echo '{row}' >> $DVC_ROOT/.tracking/$EBM_RUN/events.jsonl; {then}"


def test_a_training_whose_scalar_is_bad_is_ended_and_its_trial_pruned(
    fresh_root, no_courier, shells, monkeypatch
):
    monkeypatch.setattr(trial, "LOOK_EVERY", 0.02)
    scalar = trial.Scalar("loss", -1)
    with opened(fresh_root) as begun:
        for _ in range(study.STARTUP):
            number = begun.next(9).number
            begun.report(number, 50, -1.0)
            begun.finish(number, "done", 0.0, "")
        tried = begun.next(9)
        command = logging_loss(10, 1.5, "sleep 0.3; ") + logging_loss(50, 2.5, "sleep 9")
        outcome = trials(begun, shells, scalar, train=command).run(tried, print)
        assert (outcome.state, outcome.value) == ("pruned", None)
        assert outcome.reason == "loss = 2.5 at step 50"
        assert begun.reported(tried.number) == 50


SMALL = """\
datasets:
  digits: {kind: digits}
experiments:
  rbm-digits:
    dataset: digits
    model: {learning_rate: 0.1, hidden: 60, k: 1}
    sample: {steps: 3}
    train: {steps: 100}
"""


def planned(root, params=SMALL, trials=5, **changes):
    """A sweep over SPACE, whose root has prepared its data."""
    recipe = trial.Recipe(root, root / ".sweeps/s", params, EXPERIMENT, "m", None, (), ())
    needed = (dag.Stage("prepare@digits", "true", (), False),)
    return replace(sweep.Sweep(recipe, SPACE, needed, 1, trials, 0, {}), **changes)


def prepared(root, md5):
    """The root, in which data of that checksum were prepared."""
    entry = {"cmd": "true", "outs": [{"path": "data/digits", "md5": md5}]}
    (root / "dvc.lock").write_text(
        json.dumps({"schema": "2.0", "stages": {"prepare@digits": entry}})
    )
    return root


@pytest.mark.parametrize(
    ("changed", "md5", "better", "refused"),
    [
        ({"model.hidden": "60"}, "a", 1, None),
        ({"sample.steps": "7"}, "a", 1, "value of what is not searched"),
        ({}, "b", 1, "content of what its trials read"),
        ({}, "a", -1, "metric"),
    ],
)
def test_trials_that_cannot_be_compared_are_no_study(tmp_path, changed, md5, better, refused):
    with sweep.begun(planned(prepared(tmp_path, "a"))):
        pass
    params = space.patched(SMALL, EXPERIMENT, changed)
    other = planned(prepared(tmp_path, md5), params, better=better)
    if refused is None:
        with sweep.begun(other):
            pass
        other = replace(other, sources={"src/ebm/variants/rbm.py": "mended"})
        refused = "code of its trials"
    with pytest.raises(EBMError, match=f"began with another {refused};"), sweep.begun(other):
        pass


def test_what_is_in_params_of_a_searched_key_is_no_part_of_what_is_compared(tmp_path):
    searched = (space.Choice("sample", ("{steps: 3}", "{steps: 9}")),)
    for steps in ("3", "7"):
        params = space.patched(SMALL, EXPERIMENT, {"sample.steps": steps})
        with sweep.begun(planned(prepared(tmp_path, "a"), params, space=searched)):
            pass


def test_the_best_parameters_are_a_patch_or_with_apply_those_of_the_file(tmp_path, capsys):
    path, one = tmp_path / "params.yaml", planned(prepared(tmp_path, "a"))
    path.write_text(SMALL)
    with sweep.begun(one) as begun:
        assert not sweep.conclude(one, begun, apply=True)
        conduct(begun, outcome_of, 4)
        new = space.patched(SMALL, EXPERIMENT, begun.best().trial.texts)
        assert sweep.conclude(one, begun, apply=False)
        assert path.read_text() == SMALL
        assert one.file.read_text() == patch.diff(SMALL, new, "params.yaml")
        assert "git apply .sweeps/s/best.patch" in capsys.readouterr().out
        assert sweep.conclude(one, begun, apply=True)
        assert path.read_text() == new
        assert sweep.conclude(one, begun, apply=False)
        assert capsys.readouterr().out.endswith("params.yaml has these parameters already\n")


def test_a_sweep_tells_as_its_trials_end_and_leaves_a_table(fresh_root, no_courier, capsys):
    @contextmanager
    def worker(trials, launcher):
        yield outcome_of

    one = planned(prepared(fresh_root, "a"), trials=8)
    with sweep.begun(one) as begun:
        sweep.conduct(one, begun, 1, worker)
        (one.recipe.folder / "trials.csv").unlink()
        sweep.conduct(one, begun, 1, pytest.fail)  # nothing is left to do but the table
        values = [record.value for record in begun.records()]
        events = [event for event, _ in Spool(begun.key).read()]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "study s: 0 of 8 trials have ended"
    assert lines[1].startswith("[1/8] done trial 0 after ")
    assert lines[-2].startswith("6 done, 1 pruned, 1 failed in ")
    assert lines[-1] == "study s: 8 of 8 trials have ended"
    best = [max(v for v in values[:ended] if v is not None) for ended in range(1, 9)]
    told = [(e["step"], e["values"]) for e in events if e["op"] == "row"]
    assert told == [(ended, {"best": value}) for ended, value in enumerate(best, start=1)]
    with open(one.recipe.folder / "trials.csv") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["value"]) if row["value"] else None for row in rows] == values
    assert (rows[4]["state"], rows[4]["reason"]) == ("pruned", "hopeless")


def test_the_scalar_to_prune_by_is_turned_the_way_of_the_metric():
    own = [stage("train@e")]
    signs = {(way, better): sweep._scalar(f"loss:{way}", better, own).sign
             for way in ("higher", "lower") for better in (1, -1)}  # fmt: skip
    assert signs == {("higher", 1): 1, ("higher", -1): -1, ("lower", 1): -1, ("lower", -1): 1}
    with pytest.raises(EBMError, match=r"--prune-by loss: expected loss:higher or loss:lower"):
        sweep._scalar("loss", 1, own)
    with pytest.raises(EBMError, match="nothing is searched on which the training depends"):
        sweep._scalar("loss:lower", 1, [stage("evaluate@e")])


@pytest.fixture
def house(tmp_path, monkeypatch):
    for name in ("EBM_TRACKING", "MLFLOW_TRACKING_URI", "DVC_ROOT"):
        monkeypatch.delenv(name, raising=False)
    return sweep_house.build(tmp_path / "house")


OPTIONS = (
    *("rbm-digits", "--metric", "log_likelihood", "-j2"),
    *("--search", "model.hidden=50..100", "--search", "model.learning_rate=0.1,1.0"),
)


def swept(house, *options, **environment):
    return house.run(*OPTIONS, *options, module="sweep", **environment)


def table(house, name="rbm-digits"):
    with open(house.root / ".sweeps" / name / "trials.csv") as file:
        return list(csv.DictReader(file))


@slow
def test_a_sweep_ends_with_the_best_parameters_in_params(house):
    house.write("told", json.dumps({"diverges": list(range(85, 101))}))
    code, output = swept(house, "--trials", "8", EBM_TRACKING="0")
    assert code == 0, output
    rows = table(house)
    assert len(rows) == 8
    failed = [row for row in rows if row["state"] == "failed"]
    assert all("exit code 1" in row["reason"] for row in failed)
    assert "    error: diverged" in output.splitlines() or not failed
    best = max((row for row in rows if row["value"]), key=lambda row: float(row["value"]))
    before = (house.root / "params.yaml").read_text()
    subprocess.run(["git", "apply", ".sweeps/rbm-digits/best.patch"], cwd=house.root, check=True)
    after = (house.root / "params.yaml").read_text()
    texts = {key: best[key] for key in ("model.hidden", "model.learning_rate")}
    assert after == space.patched(before, "rbm-digits", texts)
    params.load(house.root / "params.yaml")
    code, output = swept(house, "--trials", "8", "--apply", EBM_TRACKING="0")
    assert "params.yaml has these parameters already" in output, output


@slow
def test_trials_on_other_data_are_not_mixed_into_a_study(house):
    assert swept(house, "--trials", "1", EBM_TRACKING="0")[0] == 0
    house.write("source", "other points")
    code, output = swept(house, "--trials", "2", EBM_TRACKING="0")
    assert code == 1
    assert "began with another content of what its trials read" in output
    assert swept(house, "--trials", "1", "--study", "new", EBM_TRACKING="0")[0] == 0


@slow
def test_a_sweep_killed_half_way_leaves_no_process_and_ends_exactly(house):
    house.write("told", json.dumps({"seconds": 1.0}))
    with house.start(*OPTIONS, "--trials", "6", module="sweep", EBM_TRACKING="0") as process:
        wait_for(lambda: len(house.events("end")) >= 5, 120)  # prepare, and two trials
        house.write("told", json.dumps({"seconds": 60.0, "child": True}))
        wait_for(lambda: len(house.events("child")) >= 2, 60)
        below = [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
        process.kill()
        process.communicate(timeout=30)
    running = [pid for _, _, _, pid in house.events("start", "child")]
    wait_for(lambda: not any(map(alive, below + running)), 30)
    begun = {name for kind, name, *_ in house.events("start")}
    house.write("told", "{}")
    code, output = swept(house, "--trials", "6", EBM_TRACKING="0")
    assert code == 0, output
    assert [(row["trial"], row["state"]) for row in table(house)] == [
        (str(number), "done") for number in range(6)
    ]
    ends = [name for _, name, *_ in house.events("end") if name.startswith("evaluate")]
    assert sorted(ends) == [f"evaluate trial-{number}" for number in range(6)]
    assert len(begun) > 2


@slow
@pytest.mark.parametrize(("ends", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_sweep_says_so_and_fails_no_trial(house, ends, code):
    house.write("told", json.dumps({"seconds": 60.0}))
    with house.start(*OPTIONS, "--trials", "2", module="sweep", EBM_TRACKING="0") as process:
        wait_for(lambda: len(house.events("start")) >= 3, 120)  # prepare, and two trials
        process.send_signal(ends)
        process.communicate(timeout=30)
    assert process.returncode == code
    house.write("told", "{}")
    code, output = swept(house, "--trials", "2", EBM_TRACKING="0")
    assert code == 0, output
    assert [row["state"] for row in table(house)] == ["done", "done"]


@slow
def test_what_is_not_searched_is_not_trained_again(house):
    search = ("--search", "evaluate.burn_in=10..20", "--metric", "burn_in", "--higher")
    code, output = house.run("rbm-digits", *search, "--trials", "3", module="sweep")
    assert code == 0, output
    trained = [name for _, name, *_ in house.events("end") if name.startswith("train")]
    assert trained == ["train house"]


@slow
@MLFLOW_WARNS
def test_a_study_is_the_parent_of_its_trials_in_mlflow_and_the_bad_are_pruned(house):
    house.write("told", json.dumps({"seconds": 4.0}))
    pruned = ("--prune-by", "loss:lower", "--trials", "9", "--seed", "1")
    code, output = swept(house, *pruned)
    assert code == 0, output
    states = [row["state"] for row in table(house)]
    assert "pruned" in states
    delivered = house.run(module="tracking")
    assert delivered[0] == 0, delivered
    store = Lookup(f"sqlite:///{house.root}/mlflow.db")
    runs = store.runs()
    (parent,) = [run for run in runs if run.info.run_name == "rbm-digits"]
    children = {run.data.tags["sweep.trial"]: run for run in runs if run is not parent}
    assert sorted(children) == [str(number) for number in range(9)]
    assert {run.data.tags["mlflow.parentRunId"] for run in children.values()} == {
        parent.info.run_id
    }
    assert [children[str(n)].data.tags["sweep.state"] for n in range(9)] == states
    for row in table(house):
        child = children[row["trial"]]
        assert child.data.params["model.hidden"] == row["model.hidden"]
        assert child.info.status == trial.CLOSED[row["state"]]
    assert parent.data.metrics["trials_done"] == states.count("done")
    assert parent.data.params["search.model.hidden"] == "50..100"
    best = max(float(row["value"]) for row in table(house) if row["value"])
    assert parent.data.metrics["best"] == best
    assert parent.info.status == "FINISHED"


@slow
@MLFLOW_WARNS
def test_a_child_that_arrives_before_its_parent_is_shown_under_it(fresh_root, empty_database):
    from pipelines.mlflow_store import Store

    shutil.copy(empty_database, fresh_root / "mlflow.db")
    uri = f"sqlite:///{fresh_root}/mlflow.db"
    event = {"time": 1, "params": {}, "tags": {}, "stage": "later", "dataset": None}
    store = Store(uri)
    child = store.begin("k-0", {**event, "experiment": "e-trial-0", "parent": "k"})
    parent = store.begin("k", {**event, "experiment": "study", "tags": {"sweep.study": "study"}})
    found = {run.info.run_id: run for run in Lookup(uri).runs()}
    assert found.keys() == {child, parent}
    assert found[child].data.tags["mlflow.parentRunId"] == parent
    assert found[parent].info.run_name == "study"
    assert found[parent].data.tags["sweep.study"] == "study"
