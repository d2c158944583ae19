"""The flow of a sweep shows each trial as a task."""

import json

import pytest
import sweep_house
from test_flows import runs
from toy_house import wait_for


@pytest.mark.slow
def test_every_trial_is_a_task_and_the_table_an_artifact(tmp_path, prefect):
    client, environment = prefect
    house = sweep_house.build(tmp_path / "house")
    house.write("told", json.dumps({"diverges": list(range(50, 75))}))
    search = ("rbm-digits", "--metric", "log_likelihood", "--search", "model.hidden=50..100")
    options = ("-j2", "--trials", "4", "--seed", "1")
    code, output = house.run(
        *search, *options, module="sweep_flow", EBM_TRACKING="0", **environment
    )
    assert code == 0, output
    (table,) = runs(client, "artifacts", artifacts={"key": {"any_": ["trials"]}})
    rows = json.loads(table["data"])
    assert [row["trial"] for row in rows] == [0, 1, 2, 3]
    assert {row["state"] for row in rows} == {"done", "failed"}
    expected = {
        f"trial-{row['trial']}": "Completed" if row["state"] == "done" else "Failed"
        for row in rows
    }

    wait_for(lambda: states_of_trials(client) == expected, 10)


def states_of_trials(client):
    """Those of the newest sweep; its upstream stages are another flow run's."""
    flow_run = [run for run in runs(client) if run["parent_task_run_id"] is None][-1]
    tasks = runs(client, "task_runs", flow_runs={"id": {"any_": [flow_run["id"]]}})
    return {t["name"]: t["state_name"] for t in tasks if t["name"].startswith("trial-")}
