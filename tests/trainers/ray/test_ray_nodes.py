"""r3's trainer on Ray clusters of several nodes: it trains, and what becomes of it when nodes are lost."""

import json
import signal
from pathlib import Path

import pytest
from network_hosts import needs_hosts
from ray_nodes import RayNodes, soon

pytestmark = [pytest.mark.engine, pytest.mark.long, pytest.mark.timeout(900), needs_hosts]


def steps_of(folder: Path) -> list[dict]:
    file = folder / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def check_steps(folder: Path, count: int) -> None:
    steps = steps_of(folder)
    assert [step["step"] for step in steps] == list(range(1, count + 1))
    assert [step["sync/version"] for step in steps] == list(range(1, count + 1))
    for step in steps:
        assert step["routing/rows_replayed"] > 10 * step["routing/rows_live"]
        assert 0 < step["logprob_diff/replayed/k3"] < step["logprob_diff/live/k3"]


def test_two_ranks_and_an_engine_train_on_nodes_of_their_own(tmp_path):
    with RayNodes(1, 1, 1) as cluster:
        run = cluster.run("ray.num_workers=2", "trainer.max_steps=2", f"trainer.output_dir={tmp_path / 'run'}")
        run.wait_for(lambda: steps_of(tmp_path / "run"), "a step")
        assert len(cluster.having("RayTrainWorker")) == 2
        assert len(cluster.having("EngineServer")) == 1
        assert run.ended() == 0, run.output
        check_steps(tmp_path / "run", 2)
        assert soon(lambda: not cluster.of_the_run()), cluster.of_the_run()


def test_a_run_goes_on_without_an_engine_whose_node_is_lost(tmp_path):
    with RayNodes(0, 1, 1, 1) as cluster:
        run = cluster.run(
            *("ray.num_workers=1", "generator.inference_engine.num_engines=2", "trainer.max_steps=4"),
            *("generator.inference_engine.on_engine_lost=remove", f"trainer.output_dir={tmp_path / 'run'}"),
        )
        run.wait_for(lambda: steps_of(tmp_path / "run"), "a step")
        cluster.nodes[cluster.having("EngineServer")[0]].kill()
        assert run.ended() == 0, run.output
        assert "is lost" in run.output
        check_steps(tmp_path / "run", 4)
        assert soon(lambda: not cluster.of_the_run()), cluster.of_the_run()


def test_the_loss_of_the_only_engine_is_named(tmp_path):
    with RayNodes(0, 1, 1) as cluster:
        run = cluster.run("ray.num_workers=1", "trainer.max_steps=40", f"trainer.output_dir={tmp_path / 'run'}")
        run.wait_for(lambda: steps_of(tmp_path / "run"), "a step")
        [number] = cluster.having("EngineServer")
        cluster.nodes[number].kill()
        assert run.ended(240) == 1, run.output
        last = run.output.strip().splitlines()[-30:]
        assert any(line.startswith(("CaptureError: ", "SyncError: ")) for line in last), run.output
        assert soon(lambda: not cluster.of_the_run()), cluster.of_the_run()


def test_an_engine_that_finds_no_node_again_is_named(tmp_path):
    with RayNodes(0, 1, 1) as cluster:
        run = cluster.run(
            *("ray.num_workers=1", "ray.max_failures=1", "ray.start_timeout_s=10", "trainer.max_steps=40"),
            *("trainer.save_every=1", "trainer.resume_from=auto", f"trainer.output_dir={tmp_path / 'run'}"),
        )
        run.wait_for(lambda: steps_of(tmp_path / "run"), "a step")
        cluster.nodes[cluster.having("EngineServer")[0]].kill()
        assert run.ended(300) == 1, run.output
        assert "CaptureError: 1 of 1 engines have no node after 10 s (ray.start_timeout_s)" in run.output
        assert soon(lambda: not cluster.of_the_run()), cluster.of_the_run()


def test_a_lost_trainer_node_resumes_from_the_checkpoint(tmp_path):
    folder = tmp_path / "run"
    with RayNodes(0, 1, 1, 1) as cluster:
        run = cluster.run(
            *("ray.num_workers=1", "ray.max_failures=1", "trainer.max_steps=4", "trainer.save_every=1"),
            *("trainer.resume_from=auto", f"trainer.output_dir={folder}"),
        )
        run.wait_for((folder / "checkpoints/step-000002/run.json").is_file, "a checkpoint")
        [number] = cluster.having("RayTrainWorker")
        cluster.nodes[number].kill()
        assert run.ended() == 0, run.output
        check_steps(folder, 4)
        assert soon(lambda: not cluster.of_the_run()), cluster.of_the_run()


def test_a_lost_trainer_node_without_another_is_named(tmp_path):
    with RayNodes(0, 1, 1) as cluster:
        run = cluster.run(
            *("ray.num_workers=1", "ray.max_failures=1", "ray.start_timeout_s=10", "trainer.max_steps=40"),
            *("trainer.save_every=1", "trainer.resume_from=auto", f"trainer.output_dir={tmp_path / 'run'}"),
        )
        run.wait_for(lambda: steps_of(tmp_path / "run"), "a step")
        [number] = cluster.having("RayTrainWorker")
        cluster.nodes[number].kill()
        assert run.ended(240) == 1, run.output
        assert "ParallelError: Ray Train could not go on" in run.output
        assert soon(lambda: not cluster.of_the_run()), cluster.of_the_run()


def test_a_cluster_that_is_too_small_is_refused_at_once(tmp_path):
    with RayNodes(1, 1) as cluster:
        run = cluster.run("ray.num_workers=2", f"trainer.output_dir={tmp_path / 'run'}")
        assert run.ended(60) == 1, run.output
        assert "engines, 1 of 1 CPU on one node each, and trainer ranks, 2 of 1 CPU; got 2 nodes" in run.output
        assert not cluster.of_the_run()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_nothing_is_left_of_a_driver_that_is_ended(tmp_path, sent, code):
    with RayNodes(0, 1, 1) as cluster:
        run = cluster.run("ray.num_workers=1", "trainer.max_steps=40", f"trainer.output_dir={tmp_path / 'run'}")
        run.wait_for(lambda: steps_of(tmp_path / "run"), "a step")
        run.process.send_signal(sent)
        assert run.ended(120) == code, run.output
        assert soon(lambda: not cluster.of_the_run(), 60), cluster.of_the_run()
