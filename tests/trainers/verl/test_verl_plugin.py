"""How the engine with replay comes into verl: each test is a process that imports verl anew."""

import os
import subprocess
import sys

import pytest
from places import DEMO_MODEL, ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

CLASSES = """
from verl.workers.engine import EngineRegistry
print(*(EngineRegistry.get_engine_cls(*key).__name__ for key in (
    ("language_model", "fsdp"), ("language_model", "fsdp2"), ("value_model", "fsdp2"))))
"""


@pytest.fixture
def installed(tmp_path):
    """Environment in which the project's entry points are those of its pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    folder = tmp_path / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    lines = [
        f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in points.items())
        for group, points in project["entry-points"].items()
    ]
    (folder / "entry_points.txt").write_text("\n".join(lines))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("VERL_")}
    return environment | {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ["PYTHONPATH"]])}


def run(code: str, environment: dict[str, str]) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-W", "ignore", "-c", code], env=environment, capture_output=True, text=True)


def test_installed_is_enough(installed):
    """And costs a process that only imports verl none of its engines."""
    done = run("import sys, verl\nassert 'verl.workers.engine' not in sys.modules" + CLASSES, installed)
    assert done.stdout.split() == ["RoutingReplayEngine", "RoutingReplayEngine", "FSDPEngineWithValueHead"], done.stderr


def test_external_lib_is_enough(installed):
    code = f"""
from verl.workers.config import HFModelConfig
import verl.workers.engine
HFModelConfig(path={str(DEMO_MODEL)!r}, external_lib="trainer_hooks.verl")
HFModelConfig(path={str(DEMO_MODEL)!r}, external_lib="trainer_hooks.verl")
"""
    done = run(code + CLASSES, installed | {"VERL_USE_EXTERNAL_PLUGINS": "none"})
    assert done.stdout.split() == ["RoutingReplayEngine", "RoutingReplayEngine", "FSDPEngineWithValueHead"], done.stderr


def test_an_engine_that_fails_to_import_is_not_silent(installed):
    """verl hides what its plugins raise while they are loaded."""
    done = run("import sys, verl\nsys.modules['trainer_hooks.verl.rows'] = None\nimport verl.workers.engine", installed)
    assert done.returncode == 1
    assert "ModuleNotFoundError: import of trainer_hooks.verl.rows halted" in done.stderr


@pytest.mark.parametrize(("mode", "setting", "plugins"), [("R2", "top_k=50", "all"), ("R3", "top_p=0.9", "none")])
def test_an_actor_whose_rollouts_are_cut_is_refused(installed, mode, setting, plugins):
    """However the plugin is loaded: where `external_lib` alone does it, the first worker is there before the plugin."""
    key = "actor_rollout_ref.actor.fsdp_config.router_replay.mode"
    code = f"""
import torch.distributed as dist
import verl.trainer.config
from hydra import compose, initialize_config_dir
from verl.workers.engine_workers import ActorRolloutRefWorker
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
shared = [f"actor_rollout_ref.{{each}}" for each in (
    "model.path={DEMO_MODEL}", "model.external_lib=trainer_hooks.verl", "actor.strategy=fsdp2",
    "actor.fsdp_config.use_torch_compile=false", "actor.ppo_micro_batch_size_per_gpu=1",
    "rollout.log_prob_micro_batch_size_per_gpu=1")]
shared.append("+actor_rollout_ref.model.override_config.attn_implementation=sdpa")
with initialize_config_dir(verl.trainer.config.__path__[0], version_base=None):
    on, cut = "+{key}={mode}", "actor_rollout_ref.rollout.{setting}"
    made = [compose("ppo_trainer", overrides=[*shared, *each]) for each in ([on, cut], [on], [cut])]
for config in made:
    worker = ActorRolloutRefWorker(config.actor_rollout_ref, "actor")
    try:
        worker.init_model()
    except Exception as error:
        print("seen", type(error).__name__, str(error).replace(chr(10), " "))
    else:
        print("seen made", worker.actor.engine.mode_of_replay)
"""
    more = {"VERL_PLATFORM": "r3cpu", "VERL_USE_EXTERNAL_MODULES": "cpu_platform"}
    more |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    done = run(code, installed | more | ({"VERL_USE_EXTERNAL_PLUGINS": "none"} if plugins == "none" else {}))
    seen = [line.removeprefix("seen ") for line in done.stdout.splitlines() if line.startswith("seen ")]
    assert seen[1:] == [f"made {mode}", "made disabled"], done.stderr
    cut = seen[0]
    assert cut.startswith(f"ConfigError routing replay in verl ({key}={mode}):"), done.stderr
    assert "actor_rollout_ref.rollout.top_p or top_k: " in cut
    assert "Set actor_rollout_ref.rollout.top_p=1.0 and" in cut
