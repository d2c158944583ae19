"""A small DVC repository with all of our code and parameters, whose stages take no time: what they
measure is a known function of the parameters."""

import shutil
import subprocess

from toy_house import CHECKOUT, House

STAGE = '''\
"""Stands in for the stages of an experiment; `told` says what it does beside."""

import json, os, pathlib, subprocess, sys, time

from ruamel.yaml import YAML

from pipelines import ROOT, tracking

stage, name = sys.argv[1:]
told = json.loads((ROOT / "told").read_text()) if (ROOT / "told").exists() else {}

def note(event, pid=os.getpid()):
    with open(ROOT / "events", "a") as file:
        file.write(json.dumps([event, f"{stage} {pathlib.Path.cwd().name}", 0.0, pid]) + "\\n")

note("start")
if stage == "prepare":
    pathlib.Path("data/digits").mkdir(parents=True)
    pathlib.Path("data/digits/points").write_text(pathlib.Path("source").read_text())
    sys.exit()
assert pathlib.Path("data/digits").is_dir()
settings = YAML(typ="safe").load(pathlib.Path("params.yaml"))["experiments"][name]
rate, hidden = settings["model"]["learning_rate"], settings["model"]["hidden"]
models = pathlib.Path("models", name)
if stage == "train":
    if told.get("child"):
        note("child", subprocess.Popen(["sleep", "600"]).pid)
    if hidden in told.get("diverges", ()):
        sys.exit("error: diverged")
    with tracking.Run.start(name, params=settings, tags={}, dataset=None) as run:
        for step in range(1, 11):
            run.log({"loss": rate}, step * settings["train"]["steps"] // 10)
            time.sleep(told.get("seconds", 0) / 10)
        models.mkdir(parents=True, exist_ok=True)
        (models / "weights").write_text(str(rate))
else:
    assert (models / "weights").exists()
    (models / "evaluation").mkdir(exist_ok=True)
    burn_in = settings["evaluate"]["burn_in"]
    measured = {"log_likelihood": -rate - abs(hidden - 70), "burn_in": burn_in}
    (models / "evaluation" / "metrics.json").write_text(json.dumps(measured))
note("end")
'''
GRAPH = """\
stages:
  prepare:
    foreach: [digits]
    do:
      cmd: python -m fake prepare ${item}
      deps: [source]
      params:
      - datasets.${item}
      outs:
      - data/${item}
  train:
    foreach: [rbm-digits]
    do:
      cmd: python -m fake train ${item}
      deps: [data/digits]
      params:
      - experiments.${item}.model
      - experiments.${item}.train
      outs:
      - models/${item}/weights
  evaluate:
    foreach: [rbm-digits]
    do:
      cmd: python -m fake evaluate ${item}
      deps:
      - data/digits
      - models/${item}/weights
      params:
      - experiments.${item}.evaluate
      outs:
      - models/${item}/evaluation
"""


def build(root):
    """Make one in which no stage has run."""
    ignored = shutil.ignore_patterns("__pycache__")
    for folder in ("pipelines", "src"):
        shutil.copytree(CHECKOUT / folder, root / folder, ignore=ignored)
    for file in ("params.yaml", ".gitignore", ".dvcignore"):
        shutil.copy(CHECKOUT / file, root)
    subprocess.run(["git", "init", "-q", root], check=True)
    house = House(root)
    (root / ".dvc").mkdir()
    for path, text in {
        ".dvc/config": "",
        ".dvc/.gitignore": "/tmp\n/cache\n",
        "fake.py": STAGE,
        "dvc.yaml": GRAPH,
        "source": "points",
    }.items():
        house.write(path, text)
    return house
