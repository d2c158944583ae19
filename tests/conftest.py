"""Fixtures: float64, bfloat16, an empty root, MLflow's database made once, a Prefect server."""

import os
import shutil
import signal
import subprocess
import sys
import warnings

import httpx
import pytest
from toy_house import free_port, healthy, wait_for
from tracking_store import Lookup, serving

from pipelines import tracking
from pipelines.courier import SETTINGS, SYSTEM_METRICS


@pytest.fixture(scope="session", autouse=True)
def heard():
    """An interrupt reaches what the tests start, also where a shell runs them in the background
    and has them ignore it, and so does a hang-up, also under nohup."""
    for number, handler in (
        (signal.SIGINT, signal.default_int_handler),
        (signal.SIGHUP, signal.SIG_DFL),
    ):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)


@pytest.fixture
def double():
    """Tensors are made in float64."""
    import torch

    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def one_stage():
    """What a stage sets for its whole process ends with the test."""
    import torch

    deterministic = torch.utils.deterministic
    threads, fill = torch.get_num_threads(), deterministic.fill_uninitialized_memory
    only, tf32 = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.allow_tf32
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(only, warn_only=warns)
    deterministic.fill_uninitialized_memory = fill
    torch.backends.cudnn.allow_tf32 = tf32


@pytest.fixture
def bfloat16(monkeypatch):
    """Layers that are to compute in bfloat16 do, whatever the processor is good at."""
    from ebm.variants import base

    monkeypatch.setattr(base, "multiplies_bfloat16", lambda device: True)


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory):
    """MLflow's database without a run, made once: it takes seconds."""
    path = tmp_path_factory.mktemp("database") / "mlflow.db"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MLflow warns of its own type hints as it is imported
        from pipelines.mlflow_store import create_database

        create_database(path)
    return path


@pytest.fixture
def fresh_root(tmp_path, monkeypatch):
    """An empty root, and no trace of the environment that the tests run in; without what MLflow is
    told of this machine."""
    for name in ("EBM_TRACKING", "MLFLOW_TRACKING_URI", "DVC_STAGE", "DVC_EXP_NAME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {**SETTINGS, SYSTEM_METRICS: "false", "DVC_ROOT": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def no_courier(monkeypatch):
    """A run starts no courier: the test delivers, or calls flush."""
    courier = tracking._courier
    monkeypatch.setattr(tracking, "_courier", lambda *key: None if key else courier())


@pytest.fixture
def store(fresh_root, empty_database, no_courier):
    """A root with a database, where nobody delivers but the test."""
    shutil.copy(empty_database, fresh_root / "mlflow.db")
    return Lookup(f"sqlite:///{fresh_root}/mlflow.db")


@pytest.fixture
def server(store, monkeypatch):
    """A stand-in for an MLflow server, and the environment that names it."""
    with serving() as server:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
        yield server


@pytest.fixture
def cup(tmp_path, monkeypatch):
    """What prepares a made-up KDD Cup, which is all that is to be had."""
    from made_up_tables import publish_cup

    return publish_cup(tmp_path, monkeypatch)


@pytest.fixture(scope="session")
def prefect(tmp_path_factory):
    """A Prefect server on the loopback, as a client and the environment of those who use it."""
    home, port = tmp_path_factory.mktemp("prefect"), free_port()
    environment = {
        "PREFECT_HOME": str(home),
        "PREFECT_API_URL": f"http://127.0.0.1:{port}/api",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "true",
    }
    command = ["-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    with (
        (home / "server.log").open("w") as log,
        httpx.Client(base_url=environment["PREFECT_API_URL"], timeout=30) as client,
        subprocess.Popen(
            [sys.executable, *command],
            env={**os.environ, **environment},
            stdout=log,
            stderr=log,
            start_new_session=True,
        ) as server,
    ):
        try:
            wait_for(lambda: healthy(client), 120)
            yield client, environment
        finally:
            os.killpg(server.pid, signal.SIGKILL)
