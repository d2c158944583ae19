"""The report says what the results say, or names the file that it cannot use; a browser agrees."""

import csv
import itertools
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import numpy as np
import pytest
from ruamel.yaml import YAML

from ebm import EBMError, data, figures, params, schema
from pipelines import page, patch, report
from pipelines.results import Record, Reference, Result

ROOT = Path(__file__).parents[1]
RBM, MEG, SAMPLERS = "rbm-digits", "meg-8gaussians", "samplers"
STEPS = 1234
METRICS = {
    RBM: {
        "log_likelihood": -22.571477203,
        "log_likelihood_lower": -22.5721,
        "log_likelihood_upper": -22.5709,
        "frechet_distance": 0.00001234567891,
        "auroc_uniform": 0.99,
    },
    MEG: {
        "modes": 8,
        "modes_total": 8,
        "modes_generator": 7,
        "high_quality_share": 0.91234567,
        "high_quality_share_generator": 0.85,
        "mode_kl": math.nan,
        "grid_kl": 0.25,
    },
}
REFERENCES = {
    RBM: {"log_likelihood": [{"value": -27.0004, "kind": "baseline", "source": "one & <two>"}]},
    MEG: {
        "modes": [
            {"value": 8, "kind": "ceiling", "source": "exact draws"},
            {"value": 7.5, "kind": "published", "source": "A paper, table 1"},
        ],
        "grid_kl": [{"value": 0.0, "kind": "exact", "source": "the same density"}],
    },
}


def all_params():
    """params.yaml as it is, with two of its experiments."""
    raw = YAML(typ="safe").load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    raw["experiments"] = {name: raw["experiments"][name] for name in (RBM, MEG)}
    return raw


def pictures(name):
    r = np.random.default_rng(0)
    if name == MEG:
        field, points = -r.uniform(0, 20, (40, 40)), r.uniform(-2, 2, (500, 2))
        panels = figures.density_panels(
            field, field, {"Before": points, "After": points}, (-2, 2, -2, 2)
        )
        return {"density": panels}
    return {
        "samples": figures.image_grid(r.uniform(size=(32, 8, 8)), 16),
        "chain": figures.chain_strip(r.uniform(size=(9, 4, 8, 8)), range(9)),
        "filters": figures.filters(r.normal(size=(32, 8, 8)), 8),
    }


def record(name):
    experiment = all_params()["experiments"][name]
    return {
        "experiment": name,
        **{key: experiment[key] for key in ("variant", "dataset", "seed", "threads")},
        "device": "cpu",
        "git_commit": "0123456789abcdef0123456789abcdef01234567",
        "git_dirty": name == MEG,
        "params_sha256": "a" * 64,
        "data_sha256": "b" * 64,
        "started": "2026-11-24T01:02:03+00:00",
        "seconds": 93.123456789,
        "restarts": int(name == MEG),
        "python": "3.12.1",
        "torch": "2.11.0",
        "tracking_key": "c" * 32,
        "mlflow_run_id": "d" * 32 if name == MEG else None,
    }


def make(root, name):
    """What training, sampling and evaluation leave behind."""
    folder = root / "models" / name
    (folder / "evaluation" / "figures").mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(record(name)))
    with (folder / "history.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", "energy_gap", "flat"])
        for k in range(STEPS):
            writer.writerow([10 * k, "" if k < 300 else 1 / 3 + k, 0.5])
    listing = []
    for stem, figure in pictures(name).items():
        file = f"figures/{stem}.png"
        (folder / "evaluation" / file).write_bytes(figures.png(figure))
        listing.append({"file": file, "title": stem.title(), "caption": 'Said "so" & <so>.'})
    contents = {"metrics": METRICS[name], "references": REFERENCES[name], "figures": listing}
    for stem, content in contents.items():
        (folder / "evaluation" / f"{stem}.json").write_text(json.dumps(content))


LINES = [
    {"oracle": "banana", "kernel": "MALA", "step_size": 0.43, "acceptance": 0.5741, "ess": 2.125},
    {"oracle": "banana", "kernel": "Langevin", "error": math.nan, "diverged": 0.25},
    {"oracle": "ising", "kernel": "tempered <Gibbs>", "swaps": 0.25, "round_trips": 44.5},
]


def make_comparison(root):
    """What the comparison of samplers leaves behind."""
    folder = root / "models" / SAMPLERS
    (folder / "figures").mkdir(parents=True)
    numbers = dict.fromkeys(("cost", "error", "ess", "r_hat", "tau"), 1.5) | {"diverged": 0.0}
    absent = dict.fromkeys(("step_size", "acceptance", "swaps", "round_trips"))
    t = np.arange(1.0, 50.0)
    (folder / "figures" / "error.png").write_bytes(
        figures.png(figures.error_curves({"banana": {"MALA": (t, t**-0.3)}}))
    )
    contents = {
        "run": record(MEG),
        "metrics": {"banana_MALA_error": 0.123456789},
        "table": [absent | numbers | line for line in LINES],
        "figures": [{"file": "figures/error.png", "title": "Error", "caption": "It <falls>."}],
    }
    for stem, content in contents.items():
        (folder / f"{stem}.json").write_text(json.dumps(content))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A project with two evaluated experiments, compared samplers and its report."""
    root = tmp_path_factory.mktemp("project")
    for name in (RBM, MEG):
        make(root, name)
    make_comparison(root)
    report.write(root, all_params())
    return root


@pytest.fixture
def project(made, tmp_path):
    """The same, to be spoilt."""
    return shutil.copytree(made, tmp_path / "project")


@pytest.fixture(scope="module")
def html(made):
    return (made / "reports" / "index.html").read_text(encoding="utf-8")


def snapshot(root):
    """Every file that the stage has written."""
    files = [*(root / "metrics").rglob("*"), *(root / "reports").rglob("*")]
    return {path.relative_to(root): path.read_bytes() for path in files if path.is_file()}


def test_metrics_are_flat_sorted_and_rounded_to_six_digits(made):
    text = (made / "metrics" / f"{RBM}.json").read_text()
    metrics = json.loads(text)
    assert list(metrics) == sorted(metrics)
    assert metrics["log_likelihood"] == -22.5715
    assert metrics["frechet_distance"] == 1.23457e-05
    assert metrics["seconds"] == 93.1235
    assert metrics.keys() == {*METRICS[RBM], "seconds"}


def test_what_is_not_finite_is_left_out_of_the_metrics_and_undefined_on_the_page(made, html):
    metrics = json.loads((made / "metrics" / f"{MEG}.json").read_text())
    assert "mode_kl" not in metrics
    assert metrics["modes"] == 8
    row = html.split(f'id="{MEG}_mode_kl"')[1].split("</tr>")[0]
    assert "undefined" in row


def test_curves_are_thinned_evenly_and_keep_both_ends(made):
    with (made / "reports" / "curves" / f"{RBM}.csv").open() as file:
        rows = list(csv.DictReader(file))
    steps = [int(row["step"]) for row in rows]
    gaps = np.diff(steps)
    assert len(rows) == 200
    assert (steps[0], steps[-1]) == (0, 10 * (STEPS - 1))
    assert gaps.max() - gaps.min() <= 10
    assert rows[0]["energy_gap"] == ""
    assert rows[-1]["energy_gap"] == "1233.33"


def test_beside_the_metrics_stands_where_they_come_from(made):
    for name in (RBM, MEG):
        kept = json.loads((made / "reports" / "runs" / f"{name}.json").read_text())
        assert kept == {key: record(name)[key] for key in kept}
        assert {"git_commit", "params_sha256", "data_sha256", "seed", "mlflow_run_id"} <= {*kept}
    assert (made / "reports" / "runs" / f"{SAMPLERS}.json").exists()


def test_a_short_history_is_kept_whole():
    history = {"step": [1.0, 2.0], "loss": [3.0, 4.0]}
    assert report.thin(history) == history


def test_writing_twice_changes_nothing(project):
    before = snapshot(project)
    report.write(project, all_params())
    assert snapshot(project) == before


def test_the_page_links_to_the_timeline_of_the_checkout_and_names_commands_for_its_folder(
    project, monkeypatch
):
    """Also where nobody but a reader asks for it, by the command that paper/README.md names."""
    with (project / "params.yaml").open("w") as file:
        YAML(typ="safe").dump(all_params(), file)
    monkeypatch.setenv("DVC_ROOT", str(project.parent))  # which calls, as for queued experiments
    monkeypatch.chdir(project)
    (project / ".dvc").mkdir()
    report.main()
    html = (project / "reports/index.html").read_text()
    assert 'href="timeline.html"' in html
    assert "<code>make repro\ndvc status</code>" in html
    assert f"<code>dvc exp run -S experiments.{MEG}.seed=1</code>" in html
    (project / ".dvc").rmdir()
    (project.parent / ".dvc").mkdir()
    report.main()
    html = (project / "reports/index.html").read_text()
    assert 'href="../../reports/timeline.html"' in html
    assert "<code>dvc repro project/dvc.yaml\ndvc status project/dvc.yaml</code>" in html
    option = f"project/params.yaml:experiments.{MEG}.seed=1"
    assert f"<code>dvc exp run -S {option} project/dvc.yaml:evaluate@{MEG}</code>" in html


def test_an_experiment_that_is_gone_leaves_nothing_behind(project):
    settings = all_params()
    del settings["experiments"][MEG]
    (project / "metrics" / "README.md").write_text("mine")
    report.write(project, settings)
    left = snapshot(project)
    assert not any(MEG in str(path) for path in left)
    assert MEG not in (project / "reports" / "index.html").read_text()
    assert Path("metrics/README.md") in left


def test_an_experiment_that_is_not_trained_here_is_left_out_and_its_results_stay(project, caplog):
    before = snapshot(project)
    (project / "models" / MEG).rename(project / "elsewhere")
    report.write(project, all_params())
    assert f"not trained and measured here, left out: {MEG}" in caplog.text
    assert MEG not in (project / "reports" / "index.html").read_text()
    kept = {path for path in before if MEG in path.name and path.parts[0] != "models"}
    assert len(kept) >= 3
    assert kept <= set(snapshot(project))


@pytest.mark.parametrize("file", ["run.json", "evaluation/metrics.json"])
def test_nor_is_what_is_half_trained_or_not_measured_an_error(project, caplog, file):
    """DVC removes what a training makes before it begins, and leaves its old evaluation."""
    (project / "models" / MEG / file).unlink()
    report.write(project, all_params())
    assert f"not trained and measured here, left out: {MEG}" in caplog.text


def run_with(project, **stages):
    """What DVC writes down when it has run `stages`: the parameters that each of them names."""
    entries = {name: {"params": {"params.yaml": used}} for name, used in stages.items()}
    with (project / "dvc.lock").open("w") as file:
        YAML(typ="safe").dump({"schema": "2.0", "stages": entries}, file)


@pytest.mark.parametrize(
    ("stage", "key", "left_out"),
    [
        (f"train@{MEG}", f"experiments.{MEG}.model", MEG),
        (f"sample@{MEG}", f"experiments.{MEG}.sample", MEG),
        (f"evaluate@{MEG}", f"experiments.{MEG}.evaluate", MEG),
        ("prepare@8gaussians", "datasets.8gaussians", MEG),
        ("reference@8gaussians", "datasets.8gaussians", MEG),
        (SAMPLERS, SAMPLERS, SAMPLERS),
    ],
)
def test_numbers_never_stand_beside_parameters_that_did_not_make_them(
    project, caplog, stage, key, left_out
):
    used = patch.at(all_params(), key)
    run_with(project, **{stage: {key: used, "seed": None}})
    report.write(project, all_params())
    assert left_out in (project / "reports" / "index.html").read_text()
    before = snapshot(project)
    run_with(project, **{stage: {key: used | {"seed": 77}}})
    report.write(project, all_params())
    assert f"made with other parameters or weights and left out: {left_out}" in caplog.text
    assert f'id="{left_out}' not in (project / "reports" / "index.html").read_text()
    assert snapshot(project).keys() == before.keys()


@pytest.mark.parametrize("stage", ["sample", "evaluate"])
def test_nor_beside_weights_that_they_are_not_of(project, caplog, stage):
    """A training alone, or one whose samples failed, leaves the evaluation of the one before."""
    path = f"models/{MEG}/weights.safetensors"
    lock = {
        f"train@{MEG}": {"outs": [{"path": path, "md5": "new"}]},
        f"{stage}@{MEG}": {"deps": [{"path": path, "md5": "old"}, {"path": "data", "md5": "a"}]},
    }
    for measured_on, left_out in (("old", True), ("new", False)):
        lock[f"{stage}@{MEG}"]["deps"][0]["md5"] = measured_on
        with (project / "dvc.lock").open("w") as file:
            YAML(typ="safe").dump({"schema": "2.0", "stages": lock}, file)
        caplog.clear()
        report.write(project, all_params())
        assert (f"or weights and left out: {MEG}" in caplog.text) == left_out


def test_a_page_without_experiments_is_none(project):
    settings = all_params()
    keys = {f"train@{name}": {f"experiments.{name}.seed": 77} for name in settings["experiments"]}
    run_with(project, **keys)
    before = snapshot(project)
    with pytest.raises(EBMError, match="no experiment is trained and measured with these"):
        report.write(project, settings)
    assert snapshot(project) == before


@pytest.mark.parametrize("text", ["<<<<<<< HEAD\n", "stages: [", "- 1", "stages:\n  a: 1\n"])
def test_a_record_of_dvc_that_cannot_be_read_is_named(project, text):
    (project / "dvc.lock").write_text(text)
    with pytest.raises(EBMError, match=r"dvc\.lock: cannot be read"):
        report.write(project, all_params())


@pytest.mark.parametrize("absent", [[MEG, SAMPLERS], [SAMPLERS]])
def test_so_do_those_of_a_comparison_that_is_not_made_here(project, caplog, absent):
    before = snapshot(project)
    for name in absent:
        (project / "models" / name).rename(project / name)
    report.write(project, all_params())
    assert f"not trained and measured here, left out: {', '.join(absent)}" in caplog.text
    kept = {p for p in before if SAMPLERS in p.name and p.parts[0] != "models"}
    assert kept
    assert kept <= set(snapshot(project))


BROKEN = [
    ("run.json", b"", "train"),
    ("run.json", b'{"seed": 1}', "train"),
    ("history.csv", None, "train"),
    ("history.csv", b"", "train"),
    ("history.csv", b"step,loss\n", "train"),
    ("history.csv", b"step,loss\n1,2\n2\n", "train"),
    ("history.csv", b"step,loss\n1,low\n", "train"),
    ("history.csv", b"\xff\xfe\x00", "train"),
    ("history.csv", b"\x00" * 200_000, "train"),
    ("history.csv", b"step,loss\ninf,2\n", "train"),
    ("history.csv", b"step,loss\n,2\n", "train"),
    ("evaluation/metrics.json", b'{"modes": 8', "evaluate"),
    ("evaluation/metrics.json", b'{"modes": "many"}', "evaluate"),
    ("evaluation/metrics.json", b'{"modes": null}', "evaluate"),
    ("evaluation/metrics.json", b'{"modes": true}', "evaluate"),
    ("evaluation/metrics.json", b'{"modes": 1' + 400 * b"0" + b"}", "evaluate"),
    ("evaluation/references.json", b'{"modes": [{"value": NaN}]}', "evaluate"),
    ("evaluation/references.json", b'{"modes": [{"value": 8, "kind": "guess"}]}', "evaluate"),
    ("evaluation/figures.json", b'[{"file": "figures/none.png"}]', "evaluate"),
    ("evaluation/figures/density.png", None, "evaluate"),
    ("evaluation/figures/density.png", b"\x89PNG\r\n\x1a\n", "evaluate"),
]


@pytest.mark.parametrize(("file", "content", "stage"), BROKEN)
def test_a_file_that_cannot_be_used_is_named_with_its_stage_and_nothing_is_lost(
    project, file, content, stage
):
    path = project / "models" / MEG / file
    path.unlink() if content is None else path.write_bytes(content)
    before = snapshot(project)
    with pytest.raises(EBMError) as error:
        report.write(project, all_params())
    message = str(error.value)
    assert f"{MEG}/{file}" in message
    assert f"{stage}@{MEG}" in message
    assert "\n" not in message
    assert ".int" not in message
    assert snapshot(project) == before


def test_what_remains_of_an_absent_experiment_is_not_that_of_one_with_a_longer_name(project):
    (project / "models" / MEG).rename(project / "elsewhere")
    kept = [f"metrics/{MEG}.json", f"reports/figures/{MEG}-density.png"]
    for name in (f"metrics/{MEG}-old.json", f"reports/figures/{MEG}-old-density.png"):
        (project / name).write_bytes(b"")
    report.write(project, all_params())
    left = {str(path) for path in snapshot(project)}
    assert set(kept) <= left
    assert not any(f"{MEG}-old" in name for name in left)


@pytest.mark.parametrize("name", ["results", "pipeline", "title", f"{RBM}-title", f"{RBM}-modes"])
def test_any_name_that_an_experiment_may_have_has_a_place_of_its_own(project, name):
    settings = all_params()
    settings["experiments"][name] = settings["experiments"][MEG]
    (project / "models" / MEG).rename(project / "models" / name)
    report.write(project, settings)
    html = (project / "reports" / "index.html").read_text()
    ids = re.findall(r' id="(.*?)"', html)
    assert name in ids
    assert len(ids) == len(set(ids))


def test_metrics_of_images_have_their_own_words_and_few_stand_in_the_overview():
    distances = ["frechet_distance", "frechet_distance_extrapolated", "kernel_distance"]
    shares = ["sample_precision", "sample_recall", "conditional_accuracy"]
    found = {name: page.metric(name) for name in [*distances, *shares, "auroc_mean"]}
    assert all(metric.meaning for metric in found.values())
    assert len({metric.label for metric in found.values()}) == len(found)
    assert [found[name].better for name in found] == [-1] * 3 + [+1] * 4
    shown = [name for name, metric in found.items() if metric.overview]
    assert shown == ["frechet_distance", *shares, "auroc_mean"]
    outliers = page.metric("auroc_fashion-mnist")
    assert (outliers.label, outliers.better) == ("AUROC, fashion-mnist", +1)
    assert not outliers.overview


BROKEN_COMPARISON = [
    ("run.json", b'{"seed": 1}'),
    ("metrics.json", None),
    ("table.json", b'[{"oracle": "banana"}]'),
    ("figures.json", b"{}"),
    ("figures/error.png", None),
]


@pytest.mark.parametrize(("file", "content"), BROKEN_COMPARISON)
def test_so_is_a_file_of_the_comparison_of_samplers(project, file, content):
    path = project / "models" / SAMPLERS / file
    path.unlink() if content is None else path.write_bytes(content)
    before = snapshot(project)
    with pytest.raises(EBMError, match=f"{SAMPLERS}/{file}: .*; run stage {SAMPLERS} again"):
        report.write(project, all_params())
    assert snapshot(project) == before


def lines(html):
    """The rows of the comparison of samplers by sampler: column -> text."""
    section = html.split('<section id="samplers"')[1].split("</section>")[0]
    found = {}
    for row in re.findall(r"<tr>.*?</tr>", section, re.DOTALL):
        pairs = re.findall(r'<td data-label="(.*?)">(.*?)</td>', row, re.DOTALL)
        name = re.search(r'<th scope="row">(.*?)</th>', row)
        if name:
            cells = {k: " ".join(re.sub("<.*?>", " ", v).split()) for k, v in pairs}
            found[name[1]] = cells
    return found


def test_the_comparison_of_samplers_is_a_table_of_what_applies(html):
    found = lines(html)
    assert list(found) == ["MALA", "Langevin", "tempered &lt;Gibbs&gt;"]
    assert found["MALA"]["Acceptance"] == "0.5741"
    assert found["MALA"]["Swaps"] == "—"
    assert found["MALA"]["ESS ↑, per 1000"] == "2.125"
    assert found["Langevin"]["Error ↓"] == "undefined 25 % diverged"
    assert found["tempered &lt;Gibbs&gt;"]["Round trips ↑"] == "44.50"
    section = html.split('<section id="samplers"')[1].split("</section>")[0]
    assert "Banana" in section
    assert "Ising lattice" in section
    assert "<falls>" not in section
    assert "0123456789" in section
    assert "ladders.banana" in section


def test_its_numbers_and_pictures_are_written_and_go_with_it(project):
    assert json.loads((project / "metrics" / "samplers.json").read_text()) == {
        "banana_MALA_error": 0.123457,
        "seconds": 93.1235,
    }
    assert (project / "reports" / "figures" / "samplers-error.png").exists()
    settings = all_params()
    del settings[SAMPLERS]
    report.write(project, settings)
    assert not any(SAMPLERS in path.name for path in snapshot(project))
    assert 'id="samplers"' not in (project / "reports" / "index.html").read_text()


def cells(html, experiment):
    """The overview's cells of one experiment, by column, as plain text."""
    rows = re.findall(r"<tr>.*?</tr>", html.split("</section>")[0], re.DOTALL)
    row = next(row for row in rows if f'href="#{experiment}"' in row)
    found = re.findall(r'<td data-label="(.*?)">(.*?)</td>', row, re.DOTALL)
    return {label: " ".join(re.sub("<.*?>", " ", cell).split()) for label, cell in found}


def test_the_overview_shows_numbers_with_their_references(html):
    assert cells(html, MEG) == {
        "Modes found ↑": "8 / 8 ceiling 8 published 7.5",
        "High-quality share ↑": "0.9123",
        "Mode KL ↓, nats": "undefined",
        "Density KL ↓, nats": "0.2500 exact 0",
        "Training time ↓": "1 min 33 s",
    }
    assert cells(html, RBM) == {
        "Log-likelihood ↑, nats": "−22.57 estimates −22.572 and −22.571 baseline −27.00",
        "Fréchet distance ↓": "1.23 × 10⁻⁵",
        "Training time ↓": "1 min 33 s",
    }


def test_what_is_known_as_a_density_stands_in_one_table_whatever_the_data(html):
    group = html.split("Densities of all families")[1].split("</table>")[0]
    assert {name for name in (RBM, MEG) if f'href="#{name}"' in group} == {RBM, MEG}
    shown = set(re.findall('data-label="(.*?)"', group))
    assert shown == {"Log-likelihood ↑, nats", "Density KL ↓, nats"}
    rows = re.findall(r"<tr>.*?</tr>", group, re.DOTALL)
    (meg,) = (row for row in rows if f'href="#{MEG}"' in row)
    assert "0.2500" in meg
    assert "−22.57" not in meg


def test_a_metric_that_was_not_measured_is_a_dash_and_no_zero(project):
    metrics = project / "models" / MEG / "evaluation" / "metrics.json"
    other = project / "models" / "meg-25gaussians"
    shutil.copytree(metrics.parents[1], other)
    metrics.write_text('{"grid_kl": 0.25}')
    settings = all_params()
    settings["experiments"]["meg-25gaussians"] = settings["experiments"][MEG]
    report.write(project, settings)
    html = (project / "reports" / "index.html").read_text()
    assert cells(html, MEG)["Modes found ↑"] == "—"
    assert cells(html, "meg-25gaussians")["Modes found ↑"].startswith("8 / 8")


def test_the_section_has_the_source_of_every_reference_and_the_number_before_mcmc(html):
    row = html.split(f'id="{MEG}_modes"')[1].split("</tr>")[0]
    for text in ("8 / 8", "7 / 8", "exact draws", "A paper, table 1", 'value="8"'):
        assert text in row
    assert "one &amp; &lt;two&gt;" in html
    assert "AUROC, uniform" in html


def test_a_section_has_one_row_for_a_number_and_all_that_belongs_to_it(html):
    rows = re.findall(f'<tr id="{RBM}_(.*?)"', html)
    assert rows == ["log_likelihood", "frechet_distance", "seconds", "auroc_uniform"]


def test_provenance_names_what_a_number_came_from(html):
    section = html.split(f'id="{MEG}"')[1].split("</section>")[0]
    told = (
        "0123456789abcdef",
        "uncommitted",
        record(MEG)["params_sha256"],
        "b" * 64,
        "d" * 32,
        "2.11.0",
        "1 restart",
    )
    assert [text for text in told if text not in section] == []
    assert "not tracked" in html.split(f'id="{RBM}"')[1].split("</section>")[0]


def test_words_from_files_are_escaped(html):
    assert "<so>" not in html
    assert "<two>" not in html


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.0, "0"),
        (25, "25"),
        (-3.14159, "−3.142"),
        (0.5, "0.5"),
        (0.00123456, "0.001235"),
        (0.000123456, "1.23 × 10⁻⁴"),
        (-0.00001, "−1.00 × 10⁻⁵"),
        (9999.6, "10\u2009000"),
        (12345.6, "12\u2009346"),
        (10000, "10\u2009000"),
        (math.inf, "undefined"),
        (-0.0, "0"),
        (-1, "−1"),
        (123_456_789, "123\u2009456\u2009789"),
        (3.2345e12, "3.23 × 10¹²"),
        (-(10**300), "−1.00 × 10³⁰⁰"),
    ],
)
def test_numbers_read_well(value, text):
    assert page.number(value) == text


def test_an_axis_has_ticks_within_it_whatever_its_ends():
    """0.3 - 0.1 is less than 0.2, while its logarithm is not."""
    ends = [k / 100 for k in range(101)] + [k / 3200 for k in range(100)]
    for low, high in itertools.combinations(sorted(set(ends)), 2):
        ticks = page._ticks(low, high)
        assert 2 <= len(ticks) <= 4, (low, high)
        assert low - 1e-12 <= ticks[0] < ticks[-1] <= high + 1e-12


def test_measured_numbers_keep_their_zeros_and_published_ones_get_none():
    assert page.measured(0.5) == "0.5000"
    assert page.measured(1234.0) == "1234"
    published = Reference(value=7.5, kind="published", source="")
    assert page.held_against(published) == "7.5"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.123, "0.123 s"), (59.4, "59.4 s"), (60, "1 min 00 s"), (3599.7, "1 h 00 min")],
)
def test_durations_read_well(seconds, text):
    assert page.duration(seconds) == text


def points(path):
    return [tuple(map(float, pair.split())) for pair in re.split("[ML]", path) if pair]


def test_an_equilibrium_lies_within_the_frame_where_the_curve_reaches_it():
    value, other = page.curves(
        {"step": [1.0, 2.0], "v": [-3.0, -1.0], "x": [0.0, 1.0]}, {"v": -1.0}
    )
    assert value.level == 0  # the curve ends there, at its highest
    assert other.level is None
    (below,) = page.curves({"step": [1.0, 2.0], "v": [0.0, 1.0]}, {"v": -1.0})
    assert below.level == page.HEIGHT


def test_a_curve_starts_left_ends_right_and_rises_upwards():
    (curve,) = page.curves({"step": [100.0, 200.0, 400.0], "x": [1.0, 2.0, 5.0]})
    assert points(curve.path) == [(0, page.HEIGHT), (70, 69), (page.WIDTH, 0)]
    assert curve.last == "5"


def test_a_gap_lifts_the_pen_and_a_constant_runs_through_the_middle():
    nan = math.nan
    gap, flat, none = page.curves(
        {"step": [0.0, 1.0, 2.0], "gap": [1.0, nan, 2.0], "flat": [7.0] * 3, "none": [nan] * 3}
    )
    assert gap.path.count("M") == 2
    assert {y for _, y in points(flat.path)} == {page.HEIGHT / 2}
    assert (none.path, none.last) == ("", "undefined")


def test_a_curve_begins_where_its_scalar_is_first_computed():
    found = page.curves(
        {
            "step": [0.0, 1.0, 2.0, 3.0],
            "game": [0.0, 0.0, -1.5, -1.4],
            "loss": [0.0, 3.0, 2.0, 0.0],
        },
        {"game": -1.4},
    )
    game, loss = found
    assert len(points(game.path)) == 2
    assert game.summary == "from −1.5 to −1.4"
    assert len(points(loss.path)) == 4  # one zero is a value


def test_what_is_always_zero_has_no_curve():
    (kept,) = page.curves({"step": [0.0, 1.0], "off": [0.0, 0.0], "on": [0.0, 1e-9]})
    assert kept.name == "on"


@pytest.mark.parametrize("low", [-3.7, 0.0, 1e-7, 123456.0])
@pytest.mark.parametrize("span", [1e-6, 0.3, 1.0, 9.99, 4e5])
def test_ticks_are_few_and_within_the_curve(low, span):
    (curve,) = page.curves({"step": [0.0, 1.0], "x": [low, low + span]})
    assert 2 <= len(curve.ticks) <= 4
    assert all(0 <= y <= page.HEIGHT for y, _ in curve.ticks)


@pytest.mark.parametrize(("low", "high"), [(-543210.4, -543210.1), (1234567, 1234570), (1, 1.5)])
def test_ticks_can_be_told_apart(low, high):
    (curve,) = page.curves({"step": [0.0, 1.0], "x": [low, high]})
    texts = [text for _, text in curve.ticks]
    assert len(set(texts)) == len(texts) >= 2


def test_a_number_near_the_end_of_all_numbers_leaves_a_gap():
    (curve,) = page.curves({"step": [0.0, 1.0, 2.0, 3.0], "x": [1.0, -1.7e308, 1.7e308, 2.0]})
    assert points(curve.path) == [(0, page.HEIGHT), (page.WIDTH, 0)]


def test_a_model_that_was_fitted_without_steps_has_no_curves(project):
    (project / "models" / MEG / "history.csv").write_text("step\n")
    report.write(project, all_params())
    assert not (project / "reports" / "curves" / f"{MEG}.csv").exists()
    html = (project / "reports" / "index.html").read_text()
    section = html.split(f'<section id="{MEG}"')[1].split("</section>")[0]
    assert "Fitted at once, without steps." in section
    assert section.count("<svg") == 0


def detector(name, variant, dataset, kind, metrics, references):
    """A result of anomaly detection, as read."""
    entries = {
        key: [Reference(value=v, kind=k, source=f"{k} of {key}") for k, v in several.items()]
        for key, several in references.items()
    }
    return Result(
        name=name,
        settings={"variant": variant, "dataset": dataset},
        data={"kind": kind},
        record=Record(**record(MEG) | {"variant": variant, "dataset": dataset}),
        history={"step": []},
        metrics=metrics | {"seconds": 5.0},
        references=entries,
        pictures=[],
    )


FOUND = {"f1": 0.93, "f1_std": 0.01234, "f1_gradient": 0.6, "f1_gradient_std": 0.0005}


def classes(variant, level):
    """Numbers of the digits 1, 4 and 10 under two protocols."""
    numbers = {}
    for area in ("auprc_released", "auprc_strict", "auroc_strict"):
        for k, digit in enumerate((10, 1, 4)):
            numbers |= {f"{area}_{digit}": level + k / 10, f"{area}_{digit}_std": 0.0123}
            numbers[f"{area}_{digit}_gradient"] = level / 2
        numbers[f"{area}_mean"] = level + 0.1
    bounds = {name: {"chance": 0.35, "floor": 0.2} for name in numbers if name[-1].isdecimal()}
    bounds["auprc_released_4"]["published"] = 0.29
    return detector(f"{variant}-m", variant, "mnist-novelty", "novelty", numbers, bounds)


def anomalies():
    """Detectors on the same data under two protocols, and of digits."""
    published = {"f1": {"ceiling": 0.99}, "f1_gradient": {"published": 0.9389}}
    return [
        detector("a", "meg", "kdd-paper", "kddcup99", FOUND, published),
        detector("b", "meg", "kdd-strict", "kddcup99", FOUND, {}),
        detector("c", "one_class_svm", "kdd-paper", "kddcup99", {"f1": 0.8}, {}),
        classes("meg", 0.4),
        classes("wgan_gp", 0.3),
    ]


@pytest.fixture(scope="module")
def detectors():
    return page.render(anomalies())


def test_a_number_by_the_gradient_stands_in_the_row_of_that_by_the_energy(detectors):
    shown = cells(detectors, "a")
    spoken = "by the norm of the gradient"
    both = f"0.9300 ± 0.012 ceiling 0.9900 ∇ {spoken} 0.6000 ± 0.00050 published 0.9389"
    assert shown["F1 ↑"] == both
    rows = re.findall('<tr id="a_(.*?)"', detectors)
    assert rows == ["f1", "seconds"]
    row = detectors.split('<tr id="a_f1"')[1].split("</tr>")[0]
    for text in ("0.6000 ± 0.00050", "published of f1_gradient", "ceiling of f1"):
        assert text in row
    assert "∇" not in cells(detectors, "c")["F1 ↑"]


def test_protocols_of_one_benchmark_are_one_table_whose_rows_name_their_data(detectors):
    (table,) = re.findall(r'<table class="overview">.*?</table>', detectors, re.DOTALL)
    assert "Network intrusions" in table
    rows = re.findall(r'href="#(\w+)">\w+</a>\s*<span class="note">(.*?)</span>', table)
    assert [name for name, _ in rows] == ["a", "c", "b"]
    assert [note for _, note in rows] == [
        "MEG · kdd-paper",
        "One-class SVM · kdd-paper",
        "MEG · kdd-strict",
    ]


def matrix_rows(html):
    """The first matrix: block -> rows of text."""
    table = re.search(r'<table class="matrix">.*?</table>', html, re.DOTALL)[0]
    found = {}
    for body in re.findall(r"<tbody>.*?</tbody>", table, re.DOTALL):
        lines = [
            [
                " ".join(re.sub("<.*?>", " ", cell).split())
                for cell in re.findall(r"<t[hd].*?</t[hd]>", row, re.DOTALL)
            ]
            for row in re.findall(r"<tr.*?</tr>", body, re.DOTALL)
        ]
        found[lines[0][0].split(":")[0]] = lines[1:]
    return table, found


def test_numbers_by_class_are_one_table_of_methods_and_protocols(detectors):
    table, blocks = matrix_rows(detectors)
    assert re.findall(r'<th scope="col">(.*?)</th>', table) == ["1", "4", "10", "mean"]
    assert list(blocks) == ["AUPRC, released", "AUPRC, strict"]
    for title, rows in blocks.items():
        heads = ["meg-m MEG", "meg-m MEG, norm of gradient"]
        heads += ["wgan_gp-m WGAN-GP", "wgan_gp-m WGAN-GP, norm of gradient"]
        heads += ["published MEG", "published WGAN-GP"] if title.endswith("released") else []
        assert [row[0] for row in rows] == [*heads, "chance", "floor"]
        assert rows[0][1:] == ["0.500 ± 0.012", "0.600 ± 0.012", "0.400 ± 0.012", "0.500"]
        assert rows[1][1:] == ["0.200", "0.200", "0.200", ""]
        assert rows[-2][1:] == ["0.350"] * 3 + [""]
    assert blocks["AUPRC, released"][4] == ["published MEG", "", "0.29", "", ""]


def test_numbers_below_chance_are_marked(detectors):
    table, _ = matrix_rows(detectors)
    marked = re.findall(r'class="flag" title="([\d.]+), below chance"', table)
    assert len(marked) == 2 * (3 + 1 + 3)
    assert max(map(float, marked)) < 0.35


def test_a_section_has_its_own_numbers_by_class_and_no_row_for_each(detectors):
    section = detectors.split('<section id="meg-m"')[1].split("</section>")[0]
    assert re.findall('<tr id="meg-m_(.*?)"', section) == ["seconds"]
    _, blocks = matrix_rows(section)
    assert list(blocks) == ["AUPRC, released", "AUPRC, strict", "AUROC, strict"]
    assert [row[0] for row in blocks["AUROC, strict"]] == [
        "MEG",
        "MEG, norm of gradient",
        "chance",
        "floor",
    ]


def test_areas_by_class_are_explained(detectors):
    glossary = detectors.split('<dl class="glossary">')[1].split("</dl>")[0]
    assert "<dt>AUPRC</dt>" in glossary
    assert "<dt>AUROC</dt>" in glossary
    assert "what scores that know nothing get" in glossary


def test_every_variant_and_kind_of_data_has_a_name_and_is_prepared(monkeypatch):
    def refused(settings):
        raise EBMError(settings.kind)

    from ebm.evaluation import EVALUATORS
    from ebm.variants import VARIANTS

    assert VARIANTS.keys() <= page.VARIANTS.keys()
    sections = get_args(get_args(schema.Dataset)[0])
    kinds = {get_args(section.model_fields["kind"].annotation)[0] for section in sections}
    assert len(kinds) == len(sections) == 9
    assert kinds == EVALUATORS.keys() == page.DATA.keys()
    for kind in kinds:
        monkeypatch.setattr(f"ebm.data.{kind}.prepare", refused)
        with pytest.raises(EBMError, match=kind):
            data.prepare(SimpleNamespace(kind=kind))


def test_the_stage_reports_the_experiments_of_params_yaml(project, monkeypatch):
    with (project / "params.yaml").open("w") as file:
        YAML(typ="safe").dump(all_params(), file)
    monkeypatch.chdir(project)
    shutil.rmtree("reports")
    report.main()
    assert params.load(Path("params.yaml")).experiments.keys() == {RBM, MEG}
    assert {path.stem for path in Path("reports/curves").iterdir()} == {RBM, MEG}


def test_the_stage_starts_without_heavy_imports():
    heavy = {"torch", "matplotlib", "mlflow", "dvc", "sklearn", "pandas", "numpy"}
    code = f"import sys, pipelines.report; print({heavy} & {{*sys.modules}})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.stdout == "set()\n", result.stderr


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api")
    found = [shutil.which(n) for n in ("chromium", "chromium-browser", "google-chrome")]
    with sync_api.sync_playwright() as playwright:
        program = next(filter(None, found), playwright.chromium.executable_path)
        if not Path(program).exists():
            pytest.skip("no Chromium is installed")
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(
    scope="module",
    params=[("light", 1280), ("light", 390), ("dark", 1280), ("dark", 390)],
    ids=lambda p: f"{p[0]}-{p[1]}",
)
def opened(request, browser, made):
    """The page in a browser, what its console said and what it asked the network for."""
    scheme, width = request.param
    context = browser.new_context(
        color_scheme=scheme, viewport={"width": width, "height": 800}, reduced_motion="reduce"
    )
    tab = context.new_page()
    said, asked = [], []
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto((made / "reports" / "index.html").as_uri(), wait_until="load")
    tab.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    yield scheme, tab, said, asked
    context.close()


def test_the_browser_has_nothing_to_say_and_nothing_to_fetch(opened):
    _, _, said, asked = opened
    assert said == []
    assert [url for url in asked if not url.startswith("data:")] == asked[:1]
    assert asked[0].startswith("file:")


def test_the_page_fits_its_width_and_shows_all_images(opened):
    _, tab, _, _ = opened
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
    images = tab.evaluate("[...document.images].map(i => [i.complete, i.naturalWidth, i.width])")
    assert len(images) == 5
    assert all(complete and natural and width for complete, natural, width in images)
    small = "[...document.querySelectorAll('figure:not(.wide) .paper')]"
    assert tab.evaluate(f"{small}.every(paper => paper.scrollWidth <= paper.clientWidth)")


def test_the_page_is_accessible_in_its_basics(opened):
    _, tab, _, _ = opened
    assert tab.evaluate("document.documentElement.lang") == "en"
    assert tab.evaluate("[...document.images].every(image => image.alt)")
    assert tab.evaluate("[...document.querySelectorAll('table')].every(t => t.caption?.innerText)")
    levels = tab.evaluate(
        "[...document.querySelectorAll('h1,h2,h3,h4')].map(h => Number(h.tagName[1]))"
    )
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert max(np.diff(levels)) <= 1
    ids = tab.evaluate("[...document.querySelectorAll('[id]')].map(e => e.id)")
    targets = tab.evaluate(
        "[...document.querySelectorAll('a[href^=\"#\"]')]"
        ".map(a => decodeURIComponent(a.hash.slice(1)))"
    )
    assert len(ids) == len(set(ids))
    assert set(targets) <= set(ids)


CONTRASTS = """() => {
  const rgb = c => c.match(/[\\d.]+/g).map(Number);
  const light = c => {
    const [r, g, b] = rgb(c).map(v => v / 255).map(
      v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = e => {
    for (; e; e = e.parentElement) {
      const c = getComputedStyle(e).backgroundColor;
      if (rgb(c)[3] !== 0) return c;
    }
    return 'rgb(255, 255, 255)';
  };
  const worded = e => [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim());
  return [...document.body.querySelectorAll('*')].filter(worded).map(e => {
    const style = getComputedStyle(e), ink = e.closest('svg') ? style.fill : style.color;
    const [a, b] = [light(ink), light(ground(e))].sort((x, y) => y - x);
    return [(a + 0.05) / (b + 0.05), e.outerHTML.slice(0, 80)];
  });
}"""


def test_all_text_has_enough_contrast_in_light_and_dark(opened):
    scheme, tab, _, _ = opened
    contrasts = tab.evaluate(CONTRASTS)
    assert len(contrasts) > 100
    assert [text for contrast, text in contrasts if contrast < 4.5] == []
    background = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    level = np.mean([float(v) for v in re.findall(r"[\d.]+", background)[:3]])
    assert level < 60 if scheme == "dark" else level > 230


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_tables_of_detectors_fit_and_can_be_read(scheme, width, browser, detectors, tmp_path):
    path = tmp_path / "index.html"
    path.write_text(detectors, encoding="utf-8")
    view = {"width": width, "height": 800}
    context = browser.new_context(color_scheme=scheme, viewport=view, reduced_motion="reduce")
    tab = context.new_page()
    tab.goto(path.as_uri(), wait_until="load")
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert [text for contrast, text in tab.evaluate(CONTRASTS) if contrast < 4.5] == []
    assert tab.evaluate("[...document.querySelectorAll('table')].every(t => t.caption?.innerText)")
    shown = "[...document.querySelectorAll('.matrix')].map(t => getComputedStyle(t).display)"
    assert set(tab.evaluate(shown)) == {"table"}
    context.close()
