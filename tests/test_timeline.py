"""The timeline shows what ran when and where, as it was, and a broken disk breaks no rebuild."""

import json
import os
import random
import re
import time

import pytest
from toy_house import built

from pipelines import dag, run, timeline
from pipelines.dag import Plan, Stage
from pipelines.timeline import Rebuild, Result

# DVC's dependency pygtrie warns DVC.
pytestmark = pytest.mark.filterwarnings("ignore:_NoneStep.value:DeprecationWarning")

ALL = ["prepare", "train@a", "train@b", "evaluate@a", "evaluate@b", "report"]


@pytest.fixture
def house(tmp_path, tmp_path_factory):
    """A house in which every stage has run."""
    return built(tmp_path_factory.getbasetemp())[0].copy(tmp_path / "house")


def kept(house):
    """(stage, what became of it) of the last rebuild, and the page."""
    folder = house.root / "reports"
    last = json.loads((folder / "timeline.json").read_text())
    entries = [Result(**entry) for entry in last["entries"]]
    return [(entry.stage, entry.kind) for entry in entries], (folder / "timeline.html").read_text()


def plan(*names):
    return Plan(tuple(Stage(name, "true", (), stale=True) for name in names))


def busy(stage, started, seconds, worker="here", **fields):
    return Result(stage, "done", started, seconds, worker, **fields)


def last(*entries, seconds=100.0):
    return Rebuild("a test", (), 1_000_000_000.0, seconds, entries)


@pytest.mark.parametrize("seed", range(20))
def test_no_two_bars_of_a_worker_overlap_and_no_more_rows_are_used_than_have_to_be(seed):
    rng = random.Random(seed)
    begin = 1_000_000_000.0
    entries = sorted(
        (
            busy(f"s{k}", begin + rng.uniform(0, 90), rng.expovariate(0.2), rng.choice("ab"))
            for k in range(40)
        ),
        key=lambda entry: entry.started,
    )
    shown = dict(timeline.bars(last(*entries)))
    assert sorted(bar.entry.stage for bars in shown.values() for bar in bars) == sorted(
        entry.stage for entry in entries
    )
    for worker, bars in shown.items():
        assert {bar.entry.worker for bar in bars} == {worker}
        for bar in bars:
            scale = timeline.WIDTH / 100
            assert bar.x == pytest.approx(scale * (bar.entry.started - begin))
            assert bar.width == pytest.approx(scale * bar.entry.seconds)
        ends = [(b.row, b.entry.started, b.entry.started + b.entry.seconds) for b in bars]
        assert not any(
            row == other and start < end and begun < stop
            for k, (row, start, stop) in enumerate(ends)
            for other, begun, end in ends[:k]
        )
        at_once = max(sum(s <= moment < e for _, s, e in ends) for _, moment, _ in ends)
        assert len({row for row, *_ in ends}) == at_once


@pytest.mark.parametrize("seconds", [0.4, 5, 59, 61, 600, 7000, 90_000, 1_000_000])
def test_ticks_are_few_and_within_the_picture(seconds):
    places = [place for place, _ in timeline.ticks(seconds)]
    assert 1 <= len(places) <= 8
    assert places == sorted(places)
    assert places[0] == 0
    assert places[-1] <= timeline.WIDTH


def test_a_name_stands_in_its_bar_only_if_it_fits():
    bars = dict(timeline.bars(last(busy("train@long", 1e9, 50), busy("train@short", 1e9 + 50, 2))))
    assert [bar.text for bar in bars["here"]] == ["train@long", ""]


def test_the_entries_are_what_became_of_the_stages_of_the_plan():
    results = [
        Result("b", "done", 20.0, 1.0, "x"),
        Result("a", "done", 10.0, 2.0, "y", restored=True),
        Result("c", "failed", 30.0, 1.0, "x", reason="exit code 1"),
        Result("d", "skipped", reason="c failed"),
    ]
    made = timeline.rebuild("a test", [], plan(*"abcde"), results, time.time())
    assert [(entry.stage, entry.kind) for entry in made.entries] == [
        ("a", "restored"),
        ("b", "done"),
        ("c", "failed"),
        ("d", "skipped"),
        ("e", "up to date"),
    ]
    assert [entry.started for entry in made.entries if entry.ran] == [10.0, 20.0, 30.0]


def test_the_page_loads_nothing_and_escapes_what_it_is_told():
    entry = Result("c", "failed", 1e9, 1.0, "<b>host", reason="<script>alert()</script>")
    html = timeline.render(last(entry, Result("paper/dvc.yaml:train@d", timeline.UP_TO_DATE)))
    assert "<script" not in html
    assert "<b>host" not in html
    addresses = re.findall(r'(?:href|src)="([^"]*)"', html)
    local = [address for address in addresses if not address.startswith("data:")]
    assert local == ["index.html", "../paper/reports/index.html"]


def test_a_rebuild_of_which_nothing_ran_is_one_too(house):
    for module in ("run", "flows"):
        house.write("reports/timeline.json", "")
        assert house.run(module=module) == (0, f"{run.NOTHING_TO_DO}\n")
        entries, html = kept(house)
        assert entries == [(name, "up to date") for name in ALL]
        assert f"python -m pipelines.{module}" in html
        assert "Of 6 stages 6 up to date." in " ".join(re.sub("<[^>]*>", "", html).split())


def test_the_runner_keeps_what_ran_what_was_restored_and_what_failed(house):
    began = time.time()
    house.edit("params.yaml", "b:\n    train: {steps: 1}", "b:\n    train: {steps: 2}")
    (house.root / "out" / "evaluate@a").unlink()
    house.tell("train@b", failures=1)
    assert not run.run(root=house.root)
    entries, html = kept(house)
    assert dict(entries) == {
        "prepare": "up to date",
        "train@a": "up to date",
        "train@b": "failed",
        "evaluate@a": "restored",
        "evaluate@b": "skipped",
        "report": "skipped",
    }
    assert {name for name, _ in entries[:2]} == {"train@b", "evaluate@a"}
    assert "exit code 1" in html
    made = json.loads((house.root / "reports/timeline.json").read_text())
    for entry in made["entries"][:2]:
        assert began <= entry["started"] <= entry["started"] + entry["seconds"] <= time.time()


def test_a_runner_that_is_killed_leaves_the_page_of_the_last_rebuild_whole(house):
    before = kept(house)
    house.edit("params.yaml", "seed: 0", "seed: 1")
    house.tell("prepare", seconds=600)
    with house.start() as runner:
        assert "stages to run" in runner.stdout.readline()
        runner.kill()
        runner.communicate(timeout=15)
    assert kept(house) == before


def test_a_full_disk_breaks_neither_the_old_page_nor_the_rebuild(house, monkeypatch, capsys):
    before, planned = kept(house), dag.plan(root=house.root)

    def half(descriptor):
        os.truncate(descriptor, os.fstat(descriptor).st_size // 2)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", half)
    assert run.nothing_to_do(run.BY, [], planned, time.time(), house.root)
    monkeypatch.undo()
    assert capsys.readouterr().out.startswith("no timeline: [Errno 28]")
    assert kept(house) == before
