"""The sink of gauges, and a cluster that a run starts for itself."""

import os
import signal
import time
import urllib.request

import pytest
from ray_nodes import CALM, Run, soon

from r3 import ConfigError
from r3.diagnostics import RunFolder, open_sinks
from trainer_hooks.ray.cluster import joined_cluster


def scraped(port: int) -> str:
    return urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5).read().decode()


def test_metrics_are_gauges_of_the_cluster(tmp_path, monkeypatch):
    import ray

    for name, value in CALM.items():
        monkeypatch.setenv(name, value)
    folder = RunFolder(tmp_path / "first", {})
    with pytest.raises(ConfigError, match="expected a process of a Ray cluster"):
        open_sinks(["ray"], run_folder=folder, settings={}, project="r3")
    ray.init(address="local", num_cpus=1, _system_config={"metrics_report_interval_ms": 500})
    try:
        [node] = ray.nodes()
        with open_sinks(["ray"], run_folder=folder, settings={}, project="r3") as sinks:
            sinks.log(7, {"reward/mean": 0.25, "routing/differing_rows/layer_03": 0.5})
            lines: list[str] = []

            def arrived() -> bool:
                lines[:] = [line for line in scraped(node["MetricsExportPort"]).splitlines() if "ray_r3_" in line]
                return any("ray_r3_step" in line for line in lines)

            assert soon(arrived, 60)
    finally:
        ray.shutdown()
    values = {line.split("{")[0]: line for line in lines if not line.startswith("#")}
    for name, value in (("step", 7), ("reward_mean", 0.25), ("routing_differing_rows_layer_03", 0.5)):
        line = values[f"ray_r3_{name}"]
        assert 'run="first"' in line
        assert float(line.split()[-1]) == value


@pytest.mark.parametrize("address", ["127.0.0.1:1", "auto"])
def test_a_cluster_that_does_not_answer_is_named_at_once(address):
    with pytest.raises(ConfigError, match=f"no Ray cluster answers at {address}"), joined_cluster(address):
        pass


@pytest.mark.engine
@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_cluster_of_its_own_ends_with_a_run_that_is_killed(tmp_path):
    run = Run(
        [], "--address=local", "ray.cpus_per_worker=0.5", "ray.cpus_per_engine=0.5", f"trainer.output_dir={tmp_path}/a"
    )
    try:
        run.wait_for(lambda: run.processes("api_server"), "an engine")
        time.sleep(5.0)
        os.kill(run.process.pid, signal.SIGKILL)
        run.ended(10)
        # Agents of Ray itself ask for its head for a minute.
        assert soon(lambda: not [each for each in run.processes().values() if "Agent" not in each]), run.processes()
        assert soon(lambda: not run.processes(), 120), run.processes()
    finally:
        run.kill()
