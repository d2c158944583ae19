"""The house rules: the core knows no machinery, nothing imports in a circle, and every module
that a stage computes with is one of its DVC dependencies."""

import ast
import functools
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from pipelines.train import SECTIONS

ROOT = Path(__file__).resolve().parents[1]
SRC = ROOT / "src"
MACHINERY = {
    "mlflow": "machine mlflow_model mlflow_registry mlflow_store",
    "prefect": "flows sweep_flow",
    "optuna": "study",
    "prefect_dask": "flows",
    "distributed": "worker",
    "dvc": "dag lockfile repository reproduce",
}

ROUTING = {
    "ebm/__init__.py": "defines the error class",
    "ebm/files.py": "writes whole files, holds locks",
    "ebm/params.py": "parses; holds no number",
    "ebm/schema.py": "declares; no field has a default (tests/test_params.py)",
    "ebm/variants/__init__.py": "finds a variant by its name",
    "pipelines/__init__.py": "finds the source tree",
    "pipelines/ended.py": "removes what a result needs no more",
    "pipelines/places.py": "says where records and checkpoints lie",
    "pipelines/polling.py": "looks beside the work",
    "pipelines/processes.py": "starts others; how many there are changes rounding at most",
    "pipelines/provenance.py": "says where results come from",
    "pipelines/gpu.py": "chooses among cards",
    "pipelines/supervise.py": "starts and ends processes",
    "pipelines/commands.py": "what the user is told of errors, signals",
    "pipelines/stage.py": "its argument; device and threads change rounding at most",
    "pipelines/tracking.py": "reports what was computed",
    "pipelines/spool.py": "reports what was computed",
}
"""Modules that can change no result, with the reason: they need not be dependencies."""


def modules():
    files = [*(ROOT / "src/ebm").rglob("*.py"), *(ROOT / "pipelines").glob("*.py")]
    return {file: ast.parse(file.read_text(encoding="utf-8")) for file in files}


def imports(tree, top_level_only=False):
    """Absolute names that a module imports, `if TYPE_CHECKING` blocks left out."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif not (top_level_only and isinstance(node, ast.FunctionDef)):
            yield from imports(node, top_level_only)


def offenders(trees):
    """(file, machinery) for every import of machinery outside the rooms that may."""
    for file, tree in trees.items():
        for name in {name.split(".")[0] for name in imports(tree)} & MACHINERY.keys():
            if file.parent.name != "pipelines" or file.stem not in MACHINERY[name].split():
                yield file.name, name


def test_machinery_stays_in_its_rooms():
    assert list(offenders(modules())) == []


def test_that_rule_fails_when_it_is_broken():
    broken = {ROOT / "src/ebm/data.py": ast.parse("def f():\n    import mlflow.pytorch\n")}
    assert list(offenders(broken)) == [("data.py", "mlflow")]


def test_the_core_imports_nothing_of_the_shell():
    core = {f: t for f, t in modules().items() if f.is_relative_to(SRC)}
    assert not [f for f, t in core.items() if any(n.startswith("pipelines") for n in imports(t))]


def module_name(file):
    relative = file.relative_to(SRC if file.is_relative_to(SRC) else ROOT).with_suffix("")
    return ".".join(relative.parts).removesuffix(".__init__")


def cycle(graph):
    """A module that reaches itself by imports at module level, or None."""
    for start in graph:
        seen, todo = set(), list(graph[start])
        while todo:
            name = todo.pop()
            if name == start:
                return start
            if name in graph and name not in seen:
                seen.add(name)
                todo += graph[name]
    return None


def import_graph():
    trees = {module_name(file): tree for file, tree in modules().items()}
    return {
        name: {i for i in imports(tree, top_level_only=True) if i in trees and i != name}
        for name, tree in trees.items()
    }


def test_nothing_imports_in_a_circle():
    assert cycle(import_graph()) is None


def test_that_rule_fails_when_a_circle_is_closed():
    graph = import_graph()
    graph["ebm.seeds"] = {"ebm.train"}
    assert cycle(graph) is not None


OF_NO_VARIANT = ("prepare", "reference", "samplers", "report")


def stage_dependencies():
    """(stage, variant or None, deps) by the templates of dvc.yaml over both params.yaml, one key
    each."""
    yaml = YAML(typ="safe")
    stages = yaml.load(ROOT / "dvc.yaml")["stages"]
    both = [yaml.load(ROOT / folder / "params.yaml")["experiments"] for folder in ("", "paper")]
    for variant in sorted({e["variant"] for some in both for e in some.values()}):
        for name, stage in stages.items():
            body = stage.get("do", stage)
            deps = [d.replace("${item.variant}", variant) for d in body["deps"]]
            yield name, None if name in OF_NO_VARIANT else variant, set(deps)


USED = """
import importlib, json, os, sys
for heavy in "matplotlib.figure pandas pydantic.main torch".split():
    importlib.import_module(heavy)
for modules in json.loads(sys.argv[1]):
    if not os.fork():
        for name in modules:
            importlib.import_module(name)
        files = [getattr(m, "__file__", None) for n, m in list(sys.modules.items())
                 if n.split(".")[0] in ("ebm", "pipelines")]
        print(json.dumps([f for f in files if f]), flush=True)
        os._exit(0)
    if os.wait()[1]:
        sys.exit(f"{modules} cannot be imported")
"""
"""Prints, for each list of modules, the files of ours that a process has loaded when it has
imported them: a process of its own, forked from one that has imported nothing of ours, only what
is slow. (What is missing among the latter costs time and nothing else.)"""


def entrances(stage, variant):
    """What a stage imports: its module, and what its functions import later."""
    tree = ast.parse((ROOT / "pipelines" / f"{stage}.py").read_text(encoding="utf-8"))
    later = {name for name in imports(tree) if name.startswith("ebm.")}
    later = {name for name in later if _is_module(name)}
    if stage in ("train", "sample", "evaluate"):
        later.add(f"ebm.variants.{variant}")
    return ["pipelines", f"pipelines.{stage}", *sorted(later)]


@functools.cache
def used():
    """(stage, variant) -> the files of ours that it loads."""
    cases = list(dict.fromkeys((stage, variant) for stage, variant, _ in CASES))
    lists = json.dumps([entrances(*case) for case in cases])
    command = [sys.executable, "-c", USED, lists]
    output = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout
    lines = map(json.loads, output.splitlines())
    files = [{str(Path(file).relative_to(ROOT)) for file in line} for line in lines]
    return dict(zip(cases, files, strict=True))


def _is_module(name):
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def undeclared(loaded, deps, variant):
    """Loaded files that are neither a dependency, nor under one, nor exempt. The settings of
    variants other than `variant` are loaded to check params.yaml as a whole, and used for
    nothing."""
    for file in sorted(loaded):
        plain = file.removeprefix("src/")
        foreign_settings = plain.startswith("ebm/variants/") and plain.endswith("_config.py")
        if plain in ROUTING or (foreign_settings and plain != f"ebm/variants/{variant}_config.py"):
            continue
        if not any(file == dep or file.startswith(f"{dep}/") for dep in deps):
            yield file


CASES = list(stage_dependencies())


@pytest.mark.parametrize(
    ("stage", "variant", "deps"),
    CASES,
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_module_that_a_stage_loads_is_its_dependency(stage, variant, deps):
    loaded = used()[stage, variant]
    assert list(undeclared(loaded, deps, variant)) == []
    dropped = next(d for d in sorted(deps) if d in loaded)
    assert list(undeclared(loaded, deps - {dropped}, variant)) == [dropped]  # the rule can fail


def test_no_stage_depends_on_another_variant():
    for _, variant, deps in CASES:
        others = {v for _, v, _ in CASES} - {variant, None}
        assert not [d for d in deps for o in others if d.endswith((f"/{o}.py", f"/{o}_config.py"))]


def test_every_exempt_module_exists():
    assert all((ROOT / "src" / f).exists() or (ROOT / f).exists() for f in ROUTING)


def test_dvc_trains_anew_when_what_a_training_reads_has_changed():
    stages = YAML(typ="safe").load(ROOT / "dvc.yaml")["stages"]
    watched = stages["train"]["do"]["params"]
    assert sorted(watched) == sorted(f"experiments.${{key}}.{section}" for section in SECTIONS)


def test_the_published_experiments_have_the_stages_of_the_default_ones():
    """paper/dvc.yaml is dvc.yaml one folder down: the same code, other numbers, no samplers."""
    yaml = YAML(typ="safe")
    default, paper = (
        {name: stage.get("do", stage) for name, stage in yaml.load(path)["stages"].items()}
        for path in (ROOT / "dvc.yaml", ROOT / "paper/dvc.yaml")
    )
    assert default.keys() - paper.keys() == {"samplers"}
    for name, stage in paper.items():
        deps = default[name]["deps"]
        assert stage["deps"] == [
            f"../{dep}" if dep.startswith(("src/", "pipelines/")) else dep for dep in deps
        ]
        assert stage["params"] == [key for key in default[name]["params"] if key != "samplers"]
        assert stage["outs"] == default[name]["outs"]
        assert stage["cmd"] == f"env PYTHONPATH=.. {default[name]['cmd']}"
