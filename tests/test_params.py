"""`params.yaml`: the real one is right, and any broken one ends in one line that names the key."""

import copy
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
from ruamel.yaml import YAML

from ebm import params
from ebm.densities import DENSITIES
from ebm.params import ParamsError
from ebm.schema import (
    Contrasted,
    Data,
    Dataset,
    DensityData,
    DensityDetection,
    Detection,
    Experiment,
    Section,
)
from ebm.variants import VARIANTS

EXPERIMENTS = Experiment.__subclasses__()
ROOT = Path(__file__).resolve().parents[1]
GOOD = YAML(typ="safe").load(ROOT / "params.yaml")
SAMPLERS = "samplers"
MEG, RBM = "experiments.meg-25gaussians", "experiments.rbm-digits"

REMOVED = [
    "datasets",
    "experiments",
    "datasets.digits.kind",
    "datasets.digits.seed",
    "datasets.digits.reference",
    "datasets.digits.reference.kind",
    "datasets.digits.reference.width",
    "datasets.swissroll.train",
    "datasets.swissroll.reference.kind",
    f"{MEG}.variant",
    f"{MEG}.dataset",
    f"{MEG}.seed",
    f"{MEG}.train",
    f"{MEG}.train.steps",
    f"{MEG}.train.watch.limits",
    f"{MEG}.model.generator",
    f"{MEG}.sample.step_size",
    f"{RBM}.evaluate.chains",
    f"{SAMPLERS}.seed",
    f"{SAMPLERS}.ladders",
]
EXTRA = [
    "extra",
    "datasets.digits.binarise",
    "datasets.digits.reference.widht",
    "datasets.swissroll.reference.width",
    f"{MEG}.modle",
    f"{MEG}.train.stesp",
    f"{MEG}.train.watch.limit",
    f"{MEG}.model.widht",
    f"{MEG}.sample.step",
    f"{RBM}.model.width",
    f"{RBM}.evaluate.chians",
    f"{SAMPLERS}.chians",
    f"{SAMPLERS}.ladders.bananna",
]
WRONG = [
    ("datasets", None),
    ("datasets", []),
    ("datasets.digits", "digits"),
    ("datasets.digits.kind", "digit"),
    ("datasets.digits.binarize", "samples"),
    ("datasets.digits.test", 0),
    ("datasets.digits.reference", "classifier"),
    ("datasets.digits.reference.kind", "clasifier"),
    ("datasets.digits.reference.epochs", 0),
    ("datasets.swissroll.reference.kind", "classifier"),
    ("datasets.digits.seed", -1),
    ("datasets.digits.reference.batch_size", 1),
    ("datasets.swissroll.density", "swissrol"),
    ("datasets.swissroll.train", "many"),
    ("datasets.swissroll.train", 1.5),
    (f"{MEG}.dataset", "25gausians"),
    (f"{MEG}.variant", "mge"),
    (f"{MEG}.variant", 3),
    (f"{MEG}.seed", "zero"),
    (f"{MEG}.threads", 0),
    (f"{MEG}.train.steps", -5),
    (f"{MEG}.train.steps", True),
    (f"{MEG}.train.steps", 0),
    ("experiments.dsebm-tumours.train.steps", 0),
    ("experiments.flow-25gaussians.train.steps", 0),
    (f"{MEG}.train.batch_size", "512"),
    (f"{MEG}.train.checkpoint_every", 75),
    (f"{MEG}.train.cooldown", 1.5),
    (f"{MEG}.train.watch.limits.energy_gap", -1.0),
    (f"{MEG}.train.watch.restarts", -1),
    (f"{MEG}.model.betas", [0.5]),
    (f"{MEG}.model.betas", 0.5),
    (f"{MEG}.model.betas", [0.5, 1.0]),
    (f"{MEG}.evaluate.grid", 0),
    ("experiments.igebm-8gaussians.model.bounds", [-3.0, float("inf")]),
    ("experiments.fce-digits.model.warmup", 100_000),
    ("experiments.fce-25gaussians.model.warmup", 10_000),
    ("experiments.nce-25gaussians.model.warmup", 100_000),
    ("experiments.kernel-pca-tumours.ensemble.without", [0, 1, 2, 3, 4, 5]),
    (f"{MEG}.model.ema", 2.0),
    (f"{MEG}.model.energy_ema", 1.0),
    (f"{MEG}.model.energy_learning_rate", 0.0),
    (f"{MEG}.model.score_penalty", float("nan")),
    (f"{MEG}.model.entropy", float("inf")),
    (f"{MEG}.sample", 7),
    (f"{RBM}.model.hidden", 0),
    (f"{RBM}.model.learning_rate", "1e-3"),
    (f"{RBM}.sample.count", None),
    (f"{RBM}.sample.count", 0),
    (f"{MEG}.sample.count", 1),
    (f"{RBM}.evaluate.temperatures", 1),
    (f"{RBM}.model.hidden", 10**18),
    (f"{RBM}.model.chains", 10**40),
    (f"{RBM}.model.learning_rate", 1e300),
    (f"{RBM}.threads", 100_000),
    (f"{MEG}.model.network", {"kind": "fourier", "frequencies": 9}),
    (f"{MEG}.model.network", {"kind": "mlp"}),
    (f"{SAMPLERS}.chains", 3),
    (f"{SAMPLERS}.warmup", 1.5),
    (f"{SAMPLERS}.evaluations", 10),
    (f"{SAMPLERS}.ladders", {}),
    (f"{SAMPLERS}.ladders.banana", []),
    (f"{SAMPLERS}.ladders.banana", [1.0]),
    (f"{SAMPLERS}.ladders.banana", [0.5, 0.2, 1.0]),
    (f"{SAMPLERS}.ladders.banana", [0.5, 0.9]),
    (f"{SAMPLERS}.ladders.banana", [-0.5, 1.0]),
    (f"{SAMPLERS}.ladders.banana", [0.5, "one"]),
]


def broken(change):
    content = copy.deepcopy(GOOD)
    change(content)
    return content


def at(content, path):
    *parents, last = path.split(".")
    for key in parents:
        content = content[key]
    return content, last


def remove(path):
    def change(content):
        holder, key = at(content, path)
        del holder[key]

    return change


def put(path, value):
    def change(content):
        holder, key = at(content, path)
        holder[key] = value

    return change


CASES = (
    [(path, broken(remove(path))) for path in REMOVED]
    + [(path, broken(put(path, 1))) for path in EXTRA]
    + [(path, broken(put(path, value))) for path, value in WRONG]
)


def complaint(folder, content):
    file = folder / "params.yaml"
    YAML().dump(content, file)
    with pytest.raises(ParamsError) as caught:
        params.load(file)
    return str(caught.value)


@pytest.mark.parametrize(
    ("path", "content"), CASES, ids=[f"{i}-{c[0]}" for i, c in enumerate(CASES)]
)
def test_a_broken_file_is_one_line_that_names_the_key(tmp_path, path, content):
    line = complaint(tmp_path, content)
    assert "\n" not in line
    assert line.startswith(f"params.yaml: {path}")


def test_keys_of_a_section_beside_which_a_word_would_do_are_named(tmp_path):
    features = {"kind": "fourier", "frequencies": 9, "bandwidth": 1.0, "colour": 4}
    line = complaint(tmp_path, broken(put(f"{MEG}.model.network", features)))
    assert line.endswith("network.colour: unknown key; allowed: kind, frequencies, bandwidth")


def test_the_real_file_is_right():
    loaded = params.load(ROOT / "params.yaml")
    assert set(loaded.experiments) >= {"rbm-digits", "rbm-digits-cd1", "meg-25gaussians"}


def test_the_published_file_is_right():
    loaded = params.load(ROOT / "paper" / "params.yaml")
    assert set(loaded.datasets) >= {"mnist", "fashion-mnist", "cifar10"}


def keys_below(content, path):
    """The path of every key of nested mappings; which limits there are is the writer's choice."""
    for key, value in content.items():
        yield (*path, key)
        if isinstance(value, dict) and key != "limits":
            yield from keys_below(value, (*path, key))


@pytest.mark.parametrize("file", ["params.yaml", "paper/params.yaml"])
def test_any_key_that_is_missing_misspelt_or_holds_nonsense_is_named(monkeypatch, file):
    """Every key below every experiment, one after another."""
    content = YAML(typ="safe").load(ROOT / file)
    monkeypatch.setattr(params, "value", lambda text: content)
    paths = [p for p in keys_below(content["experiments"], ("experiments",)) if len(p) > 2]
    for path in paths:
        holder, key = at(content, ".".join(path))
        value = holder.pop(key)
        misspelt = key if key in ("variant", "kind") else f"{key}_"  # what tells the others' names
        changes = [(key, {}), (misspelt, {f"{key}_": value})]
        changes += [(key, {key: wrong}) for wrong in (["nonsense", None], {"nonsense": None})]
        for name, held in changes:
            holder |= held
            with pytest.raises(ParamsError) as caught:
                params.parse("")
            line, named = str(caught.value), ".".join([*path[:-1], name])
            assert "\n" not in line
            assert line.startswith(f"params.yaml: {named}")
            assert not re.search(r"\.(constrained-|literal\[|list\[|function-)", line)
            for added in held:
                del holder[added]
        holder[key] = value
    assert len(paths) > 300


def test_colours_are_not_binarised(tmp_path):
    content = YAML(typ="safe").load(ROOT / "paper" / "params.yaml")
    put("datasets.mnist.binarize", "threshold")(content)
    put("datasets.cifar10.binarize", "threshold")(content)
    assert complaint(tmp_path, content).startswith("params.yaml: datasets.cifar10.binarize")


@pytest.mark.parametrize("outliers", [["mnist"], ["usps", "usps"], ["uspss"], "usps"])
def test_outliers_are_other_sets_each_once(tmp_path, outliers):
    content = YAML(typ="safe").load(ROOT / "paper" / "params.yaml")
    put("datasets.mnist.outliers", outliers)(content)
    assert complaint(tmp_path, content).startswith("params.yaml: datasets.mnist.outliers")


TABLE = {
    "kind": "table",
    "path": "tables/mine.csv",
    "label": "state",
    "normal": ["ok"],
    "categorical": [],
    "ignore": [],
    "missing": "drop",
    "scale": "minmax",
    "validation": 0.1,
    "test": 0.2,
    "seed": 0,
    "reference": {"kind": "coordinates"},
}


@pytest.mark.parametrize("path", [".", "mine.csv", "/tables/mine.csv", "tables/../mine.csv"])
def test_a_table_that_dvc_does_not_watch_is_refused(tmp_path, path):
    line = complaint(tmp_path, broken(put("datasets.mine", TABLE | {"path": path})))
    assert line.startswith(f"params.yaml: datasets.mine.path = {path!r}: should lie in tables/")


IMAGES = {
    "kind": "folder",
    "path": "images/mine",
    "size": 16,
    "colour": True,
    "outliers": [],
    "validation": 0.1,
    "test": 0.2,
    "seed": 0,
    "reference": {"kind": "coordinates"},
}


@pytest.mark.parametrize("path", [".", "tables/mine", "images/../mine"])
def test_images_that_dvc_does_not_watch_are_refused(tmp_path, path):
    line = complaint(tmp_path, broken(put("datasets.mine", IMAGES | {"path": path})))
    assert line.startswith(f"params.yaml: datasets.mine.path = {path!r}: should lie in images/")


@pytest.mark.parametrize(("classes", "labelled"), [(2, 0), (0, 7)])
def test_classes_and_labelled_points_come_together(tmp_path, classes, labelled):
    """Without labels the twin that is measured beside the energy would never be trained."""
    content = broken(put("experiments.fce-spirals-semi.model.classes", classes))
    content["experiments"]["fce-spirals-semi"]["model"]["labelled"] = labelled
    line = complaint(tmp_path, content)
    told = f"model.labelled = {labelled}: should be 0 where `classes` is, and nowhere else"
    assert line.endswith(told)


def watched(limit, kl):
    content = broken(put("experiments.igebm-digits.train.watch.limits.energy_gap", limit))
    content["experiments"]["igebm-digits"]["model"] |= {"energy_penalty": 0.125, "kl": kl}
    return content


def test_a_gap_that_its_penalty_keeps_below_the_limit_is_not_watched(tmp_path):
    """Where chains find nothing, gap + a (E_data^2 + E_chains^2) is least at a gap of -1 / a."""
    file = tmp_path / "params.yaml"
    for limit, kl in ((7.9, 0.0), (80.0, 1.0)):
        YAML().dump(watched(limit, kl), file)
        params.load(file)
    for limit in (8.0, 80.0):
        line = complaint(tmp_path, watched(limit, 0.0))
        told = "keeps |energy_gap| below 8: train.watch.limits.energy_gap should be less than that"
        assert line.startswith("params.yaml: experiments.igebm-digits.model = ")
        assert line.endswith(told)


def test_an_ensemble_is_one_of_detectors(tmp_path):
    """Samples of several trainings would be measured as one: together they miss no mode."""
    members = {"members": 2, "snapshots": 0, "every": 1, "without": []}
    line = complaint(tmp_path, broken(put("experiments.meg-8gaussians.ensemble", members)))
    told = "should be null: of density data only one training is measured at a time"
    assert line == f"params.yaml: experiments.meg-8gaussians.ensemble: {told}"


@pytest.mark.parametrize("ensemble", [None, {"members": 2, "without": []}])
def test_what_no_training_leaves_out_is_no_novelty(tmp_path, ensemble):
    content = YAML(typ="safe").load(ROOT / "paper" / "params.yaml")
    mine = content["experiments"]["meg-mnist-anomaly"]
    mine["ensemble"] = ensemble and mine["ensemble"] | ensemble
    line = complaint(tmp_path, content)
    assert "experiments.meg-mnist-anomaly.ensemble: should leave classes out by `without`" in line


def test_without_labels_a_share_to_flag_is_needed_before_anything_is_trained(tmp_path):
    paper = YAML(typ="safe").load(ROOT / "paper" / "params.yaml")["experiments"]
    mine = paper["meg-kdd99-strict"] | {"dataset": "mine"}
    content = broken(put("datasets.mine", TABLE))
    content["experiments"]["meg-mine"] = mine
    file = tmp_path / "params.yaml"
    YAML().dump(content, file)
    params.load(file)
    content["datasets"]["mine"] = TABLE | {"label": None, "normal": []}
    line = complaint(tmp_path, content)
    assert line.startswith("params.yaml: experiments.meg-mine.evaluate.flagged = None: should be ")
    mine["evaluate"] = mine["evaluate"] | {"flagged": 0.1}
    YAML().dump(content, file)
    params.load(file)
    content["experiments"]["rbm-mine"] = content["experiments"]["rbm-digits"] | {"dataset": "mine"}
    line = complaint(tmp_path, content)
    assert line.startswith("params.yaml: experiments.rbm-mine.evaluate.flagged = None: should be ")
    del content["experiments"]["rbm-mine"]
    content["datasets"]["mine"] = TABLE
    line = complaint(tmp_path, content)
    assert line.endswith("evaluate.flagged = 0.1: should be null, as labels set the threshold")


def test_what_flags_no_share_is_not_for_the_paper_protocol(tmp_path):
    with (ROOT / "paper" / "params.yaml").open() as file:
        content = YAML(typ="safe").load(file)
    wgan = content["experiments"]["wgan-gp-stacked-mnist"] | {"dataset": "kdd99-paper"}
    content["experiments"]["wgan-gp-kdd99"] = wgan
    line = complaint(tmp_path, content)
    key = "params.yaml: experiments.wgan-gp-kdd99.evaluate.flagged"
    told = "should be the share of rows to flag, as the protocol 'paper' flags a share of the rows"
    assert line == f"{key} = None: {told}"
    wgan["evaluate"] = {"grid": 0, "flagged": 0.2}
    file = tmp_path / "params.yaml"
    YAML().dump(content, file)
    params.load(file)


def test_every_kind_of_data_and_every_variant_says_what_is_asked_of_experiments():
    assert all(issubclass(section, Data) for section in get_args(get_args(Dataset)[0]))
    sections = [experiment.model_fields["evaluate"].annotation for experiment in EXPERIMENTS]
    assert all(issubclass(section, Detection) for section in sections)


def test_a_density_in_the_plane_needs_cells_to_be_integrated_on(tmp_path):
    content = broken(put(f"{RBM}.dataset", "8gaussians"))
    told = "= '8gaussians': variant rbm has no `evaluate.grid`, which such data need"
    assert complaint(tmp_path, content) == f"params.yaml: {RBM}.dataset {told}"
    for cells in (0, 159):
        line = complaint(tmp_path, broken(put(f"{MEG}.evaluate.grid", cells)))
        told = "should be the cells per axis, at least 160"
        plane = "as 25gaussians lies in the plane and has narrow peaks"
        assert line.endswith(f"grid = {cells}: {told}, {plane}")


def test_too_few_samples_of_images_are_refused_before_anything_is_trained(tmp_path):
    line = complaint(tmp_path, broken(put("experiments.rbm-digits.sample.count", 29)))
    assert line.endswith("rbm-digits.sample.count = 29: images are measured from 30 on")


@pytest.mark.parametrize(
    ("dataset", "problem"),
    [
        ("digits", None),
        ("8gaussians", "density data are measured by samples"),
        ("stacked-digits", "stacked data are measured by samples"),
    ],
)
def test_what_draws_nothing_is_for_data_that_energies_can_be_measured_on(
    tmp_path, dataset, problem
):
    paper = YAML(typ="safe").load(ROOT / "paper" / "params.yaml")["experiments"]
    content = broken(lambda _: None)
    mine = paper["kernel-pca-kdd99-strict"] | {"dataset": dataset, "ensemble": None}
    content["experiments"]["mine"] = mine
    if problem:
        assert problem in complaint(tmp_path, content)
        return
    file = tmp_path / "params.yaml"
    YAML().dump(content, file)
    params.load(file)


@pytest.mark.parametrize(
    ("path", "value", "hint"),
    [
        (f"{MEG}.train.stesp", 1, "'steps'"),
        (f"{MEG}.dataset", "25gausians", "'25gaussians'"),
        (f"{MEG}.variant", "mge", "'meg'"),
        ("datasets.digits.binarize", "samples", "'sample'"),
        ("datasets.digits.reference.widht", 8, "'width'"),
        ("datasets.digits.reference.kind", "clasifier", "'classifier'"),
        ("samplers.chians", 64, "'chains'"),
        ("samplers.ladders.bananna", [1.0], "'banana'"),
    ],
)
def test_a_typo_gets_a_suggestion(tmp_path, path, value, hint):
    assert f"did you mean {hint}" in complaint(tmp_path, broken(put(path, value)))


@pytest.mark.parametrize("value", ["auto", {"a": 1}, [1], None])
def test_a_value_that_is_none_of_several_things_hears_of_all_of_them(monkeypatch, value):
    content = YAML(typ="safe").load(ROOT / "paper" / "params.yaml")
    monkeypatch.setattr(params, "value", lambda text: content)
    content["experiments"]["one-class-svm-kdd99-strict"]["model"]["gamma"] = value
    with pytest.raises(ParamsError) as caught:
        params.parse("")
    end = f".model.gamma = {value!r}: should be a valid number or 'scale'"
    assert str(caught.value).endswith(end)


@pytest.mark.parametrize(
    "text",
    [
        *["a: [1", "a: 1\na: 2\n", "\tx: 1", "- 1\n", "", "x: \x00", "a: *nobody"],
        *["seed: 2001-13-45", "seed: !!int abc", "seed: !!bool abc"],
    ],
)
def test_what_is_not_a_mapping_in_yaml_is_one_line(tmp_path, text):
    file = tmp_path / "params.yaml"
    file.write_text(text)
    with pytest.raises(ParamsError) as caught:
        params.load(file)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ParamsError, match="no such file"):
        params.load(tmp_path / "params.yaml")
    with pytest.raises(ParamsError, match="cannot be read: Is a directory"):
        params.load(tmp_path)


def test_a_name_that_no_folder_can_have_is_refused(tmp_path):
    line = complaint(tmp_path, broken(put("datasets.Di/gits", GOOD["datasets"]["digits"])))
    assert "lower-case" in line


@pytest.mark.parametrize("name", ["samplers", "reference"])
def test_no_experiment_has_the_name_of_another_folder_of_models(tmp_path, name):
    line = complaint(
        tmp_path, broken(put(f"experiments.{name}", GOOD["experiments"]["rbm-digits"]))
    )
    assert line.startswith(f"params.yaml: experiments.{name}: ")
    assert "choose another" in line


def test_there_need_be_no_comparison_of_samplers(tmp_path):
    file = tmp_path / "params.yaml"
    YAML().dump(broken(remove("samplers")), file)
    assert params.load(file).samplers is None


def test_parameters_are_checked_before_torch_is_imported():
    code = "import sys, pipelines; from pathlib import Path; from ebm import params; "
    code += "params.load(Path('params.yaml')); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def below(section):
    """It, and all that derive from it."""
    yield section
    for derived in section.__subclasses__():
        yield from below(derived)


def test_no_shared_section_has_a_default():
    """schema.py is no DVC dependency of any stage: a number hidden there would change results
    unseen."""
    shared = [s for s in below(Section) if s.__module__ == "ebm.schema"]
    assert {Experiment, Contrasted, DensityDetection, *get_args(get_args(Dataset)[0])} < {*shared}
    assert all(field.is_required() for s in shared for field in s.model_fields.values())


def test_the_schema_knows_every_density_and_variant():
    assert set(DensityData.model_fields["density"].annotation.__args__) == set(DENSITIES)
    assert all((ROOT / "src/ebm/variants" / f"{name}.py").exists() for name in VARIANTS)
