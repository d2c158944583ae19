"""`params.yaml` -> typed, frozen configuration, or one line that says which key is wrong and
why."""

from collections.abc import Mapping, Sequence
from functools import reduce
from importlib import import_module
from operator import or_
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated, Any, get_args

from pydantic import BaseModel, Field, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from ebm import EBMError, did_you_mean
from ebm.schema import (
    Contrasted,
    Dataset,
    DensityDetection,
    Experiment,
    FolderData,
    OfRows,
    Samplers,
    Section,
    TableData,
)
from ebm.variants import VARIANTS


class ParamsError(EBMError):
    """`params.yaml` cannot be used; the message names file, key path, value and what is
    allowed."""


_EXPERIMENTS = [import_module(f"ebm.variants.{name}_config").Experiment for name in VARIANTS]
if TYPE_CHECKING:
    _AnyExperiment = Experiment
else:
    _AnyExperiment = Annotated[reduce(or_, _EXPERIMENTS), Field(discriminator="variant")]

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]*$")]


TAGGED = ("datasets", "experiments")
"""The sections whose members are told apart by a tag, such as `variant`."""

RESERVED = {
    "reference": "what images are measured with",
    "samplers": "the comparison of samplers",
}
"""No experiment's names: folders of `models` that hold something else."""


class Params(Section):
    """The whole file; without `samplers` there is no comparison of samplers."""

    datasets: dict[Name, Dataset] = Field(min_length=1)
    experiments: dict[Name, _AnyExperiment] = Field(min_length=1)
    samplers: Samplers | None = None

    def plain(self) -> dict[str, Any]:
        """The file as mappings, lists and scalars, comparable with what `dvc.lock` keeps of it:
        tuples are no lists."""
        return self.model_dump(mode="json")


def load(path: Path = Path("params.yaml")) -> Params:
    """The configuration in `path`. Raises ParamsError, one line, for anything that is not
    right."""
    try:
        return parse(path.read_text(encoding="utf-8"), path.name)
    except FileNotFoundError:
        raise ParamsError(f"{path}: no such file; run from the root of the project") from None
    except UnicodeDecodeError as error:
        raise ParamsError(f"{path.name}: not valid YAML: {error}") from None
    except OSError as error:
        raise ParamsError(f"{path.name}: cannot be read: {error.strerror}") from None


def parse(text: str, file: str = "params.yaml") -> Params:
    """The configuration in the text of a `file`, as `load` does it."""
    try:
        raw = value(text)
    except ParamsError as error:
        raise ParamsError(f"{file}: {error}") from None
    if not isinstance(raw, dict):
        raise ParamsError(f"{file}: expected a mapping with the keys datasets, experiments")
    try:
        params = Params.model_validate(raw)
    except ValidationError as error:
        raise ParamsError(f"{file}: {_explain(error, raw)}") from None
    for name, dataset in params.datasets.items():
        _check_dataset(file, name, dataset)
    for name, experiment in params.experiments.items():
        _check_experiment(file, name, experiment, params)
    return params


def value(text: str) -> Any:
    """What a YAML text says. Raises ParamsError if it is none."""
    try:
        return YAML(typ="safe").load(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        problem = " ".join(str(error.problem).split())
        raise ParamsError(f"{where}not valid YAML: {problem}") from None
    except (YAMLError, ValueError, KeyError) as error:  # the latter of `!!int x`, `!!bool x`
        raise ParamsError(f"not valid YAML: {' '.join(str(error).split())}") from None


def dotted(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as text under dotted names, as DVC and MLflow call them."""
    found: dict[str, str] = {}
    for name, value in settings.items():
        nested = isinstance(value, Mapping)
        found |= dotted(value, f"{prefix}{name}.") if nested else {f"{prefix}{name}": str(value)}
    return found


def experiment(path: Path, name: str) -> Experiment:
    """The settings of one experiment."""
    known = load(path).experiments
    if name not in known:
        raise ParamsError(f"{path.name}: experiments: {_unknown(name, known)}")
    return known[name]


def dataset(path: Path, name: str) -> Dataset:
    """The settings of one data set."""
    known = load(path).datasets
    if name not in known:
        raise ParamsError(f"{path.name}: datasets: {_unknown(name, known)}")
    return known[name]


def _check_dataset(file: str, name: str, dataset: Dataset) -> None:
    """Raise EBMError unless DVC would see a change of a user's own data."""
    if isinstance(dataset, TableData | FolderData):
        folder, parts = dataset.within, PurePosixPath(dataset.path).parts
        if parts[:1] != (folder,) or ".." in parts:
            where = f"{file}: datasets.{name}.path = {dataset.path!r}"
            raise ParamsError(f"{where}: should lie in {folder}/, where DVC sees it change")


def _check_experiment(file: str, name: str, experiment: Experiment, params: Params) -> None:
    """What relates one key to another."""
    where = f"{file}: experiments.{name}"
    if name in RESERVED:
        raise ParamsError(f"{where}: the name of {RESERVED[name]}; choose another")
    train, model = experiment.train, experiment.model
    if experiment.dataset not in params.datasets:
        raise ParamsError(f"{where}.dataset: {_unknown(experiment.dataset, params.datasets)}")
    dataset = params.datasets[experiment.dataset]
    _check_threshold(where, experiment, dataset)
    _check_samples(where, experiment, dataset)
    _check_grid(where, experiment, dataset)
    _check_ensemble(where, experiment, dataset)
    if isinstance(model, Contrasted) and not model.is_trained_in(train.steps):
        raise ParamsError(
            f"{where}.model.warmup = {model.warmup}: "
            f"leaves no step to what comes after it, train.steps = {train.steps}"
        )
    if not train.steps and not experiment.takes_no_steps:
        problem = f"should be more, as variant {experiment.variant} learns step by step"
        raise ParamsError(f"{where}.train.steps = 0: {problem}")
    if train.checkpoint_every % train.log_every:
        raise ParamsError(
            f"{where}.train.checkpoint_every = {train.checkpoint_every}: "
            f"must be a multiple of log_every = {train.log_every}"
        )


def _check_ensemble(where: str, experiment: Experiment, dataset: Dataset) -> None:
    """Raise EBMError unless an ensemble is one of detectors and its numbers fit the training."""
    ensemble, train = experiment.ensemble, experiment.train
    if dataset.left_out and not (ensemble and ensemble.without):
        wanted = "should leave classes out by `without`, as each is found by what never saw it"
        raise ParamsError(f"{where}.ensemble: {wanted}")
    if ensemble is None:
        return
    if not dataset.ensembles:
        problem = f"should be null: of {dataset.kind} data only one training is measured at a time"
        raise ParamsError(f"{where}.ensemble: {problem}")
    if ensemble.members > train.batch_size:
        raise ParamsError(
            f"{where}.ensemble.members = {ensemble.members}: "
            f"more than the rows of a batch, train.batch_size = {train.batch_size}"
        )
    if (classes := len(ensemble.without)) > ensemble.members:
        problem = f"{classes} classes, each of which takes one of members = {ensemble.members}"
        raise ParamsError(f"{where}.ensemble.without: {problem}")
    if (taken := ensemble.snapshots * ensemble.every) > train.steps:
        raise ParamsError(
            f"{where}.ensemble: snapshots * every = {taken}: more than train.steps = {train.steps}"
        )


def _check_threshold(where: str, experiment: Experiment, dataset: Dataset) -> None:
    """Raise EBMError unless exactly one rule says which rows are flagged."""
    if not isinstance(dataset, OfRows):
        return
    why, flagged = dataset.without_labels(), experiment.evaluate.flagged
    key = f"{where}.evaluate.flagged = {flagged}"
    if flagged is None and why:
        raise ParamsError(f"{key}: should be the share of rows to flag, as {why}")
    if flagged is not None and not why:
        raise ParamsError(f"{key}: should be null, as labels set the threshold")


def _check_samples(where: str, experiment: Experiment, dataset: Dataset) -> None:
    """Raise EBMError where a metric needs samples and there are none, or too few."""
    count = experiment.sample.count
    key = f"{where}.sample.count = {count}"
    if dataset.sampled and not count:
        problem = f"{dataset.kind} data are measured by samples, of which there are none"
        raise ParamsError(f"{key}: {problem}")
    if 0 < count < dataset.fewest:
        raise ParamsError(f"{key}: {dataset.too_few}")


def _check_grid(where: str, experiment: Experiment, dataset: Dataset) -> None:
    """Raise EBMError where a density is to be integrated on too few cells, or none."""
    evaluate = experiment.evaluate
    if not dataset.fewest_cells:
        return
    if not isinstance(evaluate, DensityDetection):
        problem = f"variant {experiment.variant} has no `evaluate.grid`, which such data need"
        raise ParamsError(f"{where}.dataset = {experiment.dataset!r}: {problem}")
    if evaluate.grid < dataset.fewest_cells:
        problem = f"should be the cells per axis, at least {dataset.fewest_cells}"
        plane = f"as {experiment.dataset} lies in the plane and has narrow peaks"
        raise ParamsError(f"{where}.evaluate.grid = {evaluate.grid}: {problem}, {plane}")


def _unknown(name: str, known: Sequence[str] | dict[str, Any]) -> str:
    return f"unknown name {name!r}{did_you_mean(name, known)}; known: {', '.join(known)}"


def _explain(error: ValidationError, raw: dict[str, Any]) -> str:
    """The first problem in one line, in the words of the file and not of the library. A value that
    is none of several things has one for each of them."""
    problems = error.errors(include_url=False)
    first = min(problems, key=_severity)
    keys, tags = _key_path(first, raw)
    others = [problem for problem in problems if problem is not first]
    of_value = [p for p in others if p["input"] is first["input"] and p["type"] not in _OF_KEYS]
    alike = [p for p in of_value if _key_path(p, raw)[0] == keys]
    line = f"{'.'.join(map(str, keys)) or 'the file'}{_complaint(first, keys, tags)}"
    line = " or ".join([line, *(_message(p).removeprefix("should be ") for p in alike)])
    more = len(others) - len(alike)
    return " ".join(line.split()) + (f" (and {more} more)" if more else "")


_OF_KEYS = {"extra_forbidden": 0, "missing": 2}
"""What is wrong with a key rather than a value; an unknown key is told first: it usually explains
the one that is missing beside it."""


def _severity(problem: Any) -> int:
    return _OF_KEYS.get(problem["type"], 1)


def _key_path(problem: Any, raw: Any) -> tuple[list[int | str], list[str]]:
    """Split pydantic's location of a problem in the content `raw` into the keys of the file and
    the tags of unions: the third part of a tagged section, and what the file does not have, but
    for a key that is missing itself."""
    parts = [part for part in problem["loc"] if part != "[key]"]
    keys, tags = [], []
    for i, part in enumerate(parts):
        found = _has(raw, part)
        missing = i == len(parts) - 1 and problem["type"] == "missing"
        if (i == 2 and parts[0] in TAGGED) or not (found or missing):
            tags.append(str(part))
        else:
            keys.append(part)
            raw = raw[part] if found else None
    return keys, tags


def _has(content: Any, part: int | str) -> bool:
    if isinstance(content, list):
        return isinstance(part, int) and part < len(content)
    return isinstance(content, dict) and part in content


def _complaint(problem: Any, keys: Sequence[int | str], tags: Sequence[str]) -> str:
    kind, value, context = problem["type"], problem["input"], problem.get("ctx", {})
    if kind == "extra_forbidden":
        known = _known_keys(keys, tags)
        return f": unknown key{did_you_mean(str(keys[-1]), known)}; allowed: {', '.join(known)}"
    if kind == "missing":
        return ": missing key"
    if kind == "union_tag_not_found":
        return f".{context['discriminator'].strip(chr(39))}: missing key"
    if kind == "union_tag_invalid":
        known = [word.strip(" '") for word in context["expected_tags"].split(",")]
        field = context["discriminator"].strip("'")
        return f".{field}: {_unknown(context['tag'], known)}"
    if kind == "string_pattern_mismatch":
        return ": a name must be made of lower-case letters, digits and '-'"
    close = ""
    if kind == "literal_error":
        known = [word.strip(" '") for word in context["expected"].replace(" or ", ", ").split(",")]
        close = did_you_mean(str(value), known)
    return f" = {_short(value)}: {_message(problem)}{close}"


def _message(problem: Any) -> str:
    return problem["msg"].removeprefix("Value error, ").replace("Input should", "should")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _known_keys(keys: Sequence[int | str], tags: Sequence[str]) -> list[str]:
    """The keys that are allowed beside the last one of `keys`."""
    model: type[BaseModel] = Samplers if keys[0] == "samplers" else Params
    if len(keys) > 2 and keys[0] in TAGGED:
        choices = _EXPERIMENTS if keys[0] == "experiments" else get_args(get_args(Dataset)[0])
        told = iter(tags)
        model = _tagged(choices, next(told))
        for key in keys[2:-1]:
            inner = model.model_fields[str(key)].annotation
            found = (
                c for choice in (inner, *get_args(inner)) for c in (choice, *get_args(choice))
            )
            sections = [c for c in dict.fromkeys(found) if _is_section(c)]  # tagged or not
            if not sections:
                return []
            model = sections[0] if len(sections) == 1 else _tagged(sections, next(told))
    return list(model.model_fields)


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _tagged(sections: Sequence[Any], tag: str) -> type[BaseModel]:
    """The section whose `variant`, or else `kind`, is `tag`."""
    fields = [section.model_fields for section in sections]
    tags = [get_args((f.get("variant") or f["kind"]).annotation) for f in fields]
    return next(s for s, allowed in zip(sections, tags, strict=True) if tag in allowed)
