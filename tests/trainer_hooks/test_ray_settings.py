"""What a run on Ray refuses before it starts anything. Needs no Ray."""

import sys

import pytest
from places import DEMO_MODEL

import r3
from trainer_hooks.launch import train
from trainer_hooks.ray import train_on_ray
from trainer_hooks.ray.cluster import Needs, Node, joined_cluster, require_transport

GPU_NODE = {"CPU": 8.0, "GPU": 4.0}


def settings(*pairs: str) -> r3.R3Config:
    return r3.R3Config.from_overrides(pairs, {"trainer.policy.model.path": str(DEMO_MODEL), "ray.num_workers": 4})


def nodes(*resources: dict[str, float]) -> list[Node]:
    return [Node(f"id-{number}", f"10.0.0.{number}", each) for number, each in enumerate(resources)]


@pytest.mark.parametrize(
    ("resources", "size", "engines", "fits"),
    [
        ([GPU_NODE, GPU_NODE], 2, 2, True),
        ([GPU_NODE, GPU_NODE], 4, 1, True),
        ([GPU_NODE, GPU_NODE], 2, 3, False),  # 6 GPUs and 4 of 8
        ([{"CPU": 8.0, "GPU": 2.0}] * 4, 4, 1, False),  # enough GPUs, and no node with 4
        ([{"CPU": 3.0}, {"CPU": 3.0}], 4, 2, True),  # on CPUs an engine's workers share its own
        ([{"CPU": 3.0}, {"CPU": 2.0}], 1, 2, False),
        ([{}, {"CPU": 6.0}], 1, 2, True),  # a head that takes nothing
    ],
)
def test_room_for_engines_and_ranks(resources, size, engines, fits):
    config = settings(
        f"generator.inference_engine.tensor_parallel_size={size}", f"generator.inference_engine.num_engines={engines}"
    )
    found = nodes(*resources)
    needs = Needs.of(config, found)
    if fits:
        needs.require_room(found)
        return
    with pytest.raises(r3.ConfigError, match=r"10\.0\.0\.1: .* CPUs, .* GPUs") as raised:
        needs.require_room(found)
    assert f"got {len(found)} nodes" in str(raised.value)


@pytest.mark.parametrize(
    ("pairs", "count", "accepted"),
    [
        ([], 1, True),
        ([], 2, False),
        (["transport=gloo"], 2, True),
        (["transport=nccl"], 2, True),
        (["transport=ipc"], 1, False),
        (["folder=/shared/weights"], 2, True),
    ],
)
def test_weights_have_to_get_to_other_nodes(pairs, count, accepted):
    config = settings(*(f"generator.inference_engine.weight_sync.{pair}" for pair in pairs))
    if accepted:
        require_transport(config, nodes(*[GPU_NODE] * count))
        return
    with pytest.raises(r3.ConfigError, match="expected gloo or nccl"):
        require_transport(config, nodes(*[GPU_NODE] * count))


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ("ray.max_failures=1", "expected trainer.resume_from=auto"),
        ("generator.inference_engine.addresses=[http://a:1]", "expected none beside ray.num_workers=4"),
        ("ray.num_workers=0", None),
        ("ray.cpus_per_worker=0", "expected a value above 0"),
    ],
)
def test_settings_that_contradict(pair, message):
    if message is None:
        settings(pair)
        with pytest.raises(r3.ConfigError, match="expected 1 or more beside other settings of ray"):
            settings(pair, "ray.cpus_per_engine=2")
        return
    with pytest.raises(r3.ConfigError, match=message):
        settings(pair)


def test_requests_may_go_on_in_a_sync_with_one_engine_on_ray():
    settings("generator.inference_engine.weight_sync.on_running=keep")


def test_settings_of_ray_are_not_ignored_by_a_run_without_it(tmp_path):
    with pytest.raises(r3.ConfigError, match="which runs on a Ray cluster"):
        train(settings(f"trainer.output_dir={tmp_path / 'run'}"), None)
    assert not (tmp_path / "run").exists()


def test_what_is_missing_is_said_first(monkeypatch):
    with pytest.raises(r3.ConfigError, match="expected the number of trainer ranks, got 0"):
        train_on_ray(settings("ray.num_workers=0"), None)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(r3.ConfigError, match=r"pip install 'moe-routing-replay\[ray\]'"):
        train_on_ray(settings(), None)


def test_a_ray_client_is_refused(monkeypatch):
    with pytest.raises(r3.ConfigError, match="ray job submit"), joined_cluster("ray://host:10001"):
        pass
    monkeypatch.setenv("RAY_ADDRESS", "ray://host:10001")
    with pytest.raises(r3.ConfigError, match="got ray://host:10001"), joined_cluster(None):
        pass


def test_batches_that_ranks_cannot_share_are_refused_before_the_cluster_is_joined():
    with pytest.raises(r3.ConfigError, match="expected a multiple of 4"):
        train_on_ray(settings("trainer.train_batch_size=3", "generator.n_samples_per_prompt=2"), None)
