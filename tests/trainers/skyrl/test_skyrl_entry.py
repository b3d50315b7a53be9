"""The entry point: SkyRL's own parsing and validation, with one more setting and one check exchanged."""

import dataclasses
import pickle
import sys

import pytest
from ray import cloudpickle
from rollouts import settings
from skyrl.backends.skyrl_train.workers.fsdp import fsdp_worker
from skyrl.train.config import SkyRLTrainConfig
from skyrl.train.entrypoints import main_base
from skyrl.train.utils import utils
from trainers.conformance import check_identical, check_refused

import r3
import trainer_hooks.skyrl
from trainer_hooks.skyrl import entry_point, seams
from trainer_hooks.skyrl.config import validate_cfg
from trainer_hooks.skyrl.worker import RoutingReplayPolicyWorker

ENGINE = "generator.inference_engine"
OFF = ["trainer.logger=console", "trainer.policy.model.path=model"]


@pytest.fixture
def started(monkeypatch):
    """What the entry point would start on a Ray cluster, and with which settings."""
    calls = []

    class Task:
        def __init__(self, name):
            self.remote = lambda cfg: calls.append((name, cfg))

    monkeypatch.setattr(entry_point, "initialize_ray", lambda cfg: None)
    monkeypatch.setattr(entry_point.ray, "get", lambda reference: None)
    monkeypatch.setattr(entry_point, "routing_replay_entrypoint", Task("replay"))
    monkeypatch.setattr(main_base, "skyrl_entrypoint", Task("stock"))
    return calls


def test_settings_travel_to_rays_processes():
    cfg = settings()
    assert cfg.trainer.policy.fsdp_config.moe_enable_routing_replay is True
    assert pickle.loads(cloudpickle.dumps(cfg)) == cfg
    assert isinstance(cfg, SkyRLTrainConfig)


@pytest.mark.filterwarnings("ignore:trainer.strategy='fsdp2':DeprecationWarning")
def test_capture_is_admitted_under_fsdp():
    cfg = settings("trainer.strategy=fsdp2")
    before = utils.validate_inference_engine_cfg
    validate_cfg(cfg)
    assert cfg.generator.inference_engine.enable_return_routed_experts is True
    assert cfg.trainer.strategy == "fsdp"
    assert utils.validate_inference_engine_cfg is before
    with pytest.raises(AssertionError, match="only supported with Megatron"):
        utils.validate_cfg(cfg)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("generator.inference_engine.expert_parallel_size=3", "expert"),  # in the same function as the exchanged check
        ("generator.merge_stepwise_output=true", "merge_stepwise_output"),
        ("trainer.algorithm.policy_loss_type=none", "policy_loss_type"),
        ("trainer.max_ckpts_to_keep=0", "max_ckpts_to_keep"),
    ],
)
def test_all_other_checks_of_skyrl_remain(setting, message):
    cfg = settings(setting)
    with pytest.raises((AssertionError, ValueError), match=message):
        validate_cfg(cfg)
    assert cfg.generator.inference_engine.enable_return_routed_experts is True


@pytest.mark.parametrize(
    ("setting", "named", "cure"),
    [
        (f"{ENGINE}.enable_return_routed_experts=false", "routed_experts=false: ", "Set .*routed_experts=true"),
        ("trainer.strategy=megatron", "strategy other than fsdp: ", "megatron_config.moe_enable_routing_replay"),
        (f"{ENGINE}.distributed_executor_backend=ray", "backend other than mp: ", "distributed_executor_backend=mp"),
        ("generator.sampling_params.top_p=0.9", "without .*support_replay: ", "enable_return_sample_support_set=true"),
        ("generator.sampling_params.min_p=0.1", "without .*support_replay: ", "enable_return_sample_support_set=true"),
    ],
)
def test_what_replay_cannot_do_is_refused_by_name(setting, named, cure):
    with check_refused(f"routing replay in SkyRL:\n.*{named}", cure):
        validate_cfg(settings(setting))


def test_sampling_that_skyrl_carries_is_admitted():
    carried = ("trainer.algorithm.enable_sample_support_replay=true", f"{ENGINE}.enable_return_sample_support_set=true")
    validate_cfg(settings("generator.sampling_params.top_k=50", "generator.sampling_params.top_p=0.9", *carried))


def test_an_unknown_setting_is_still_an_error():
    with pytest.raises(ValueError, match="moe_enable_routing_repaly"):
        settings("trainer.policy.fsdp_config.moe_enable_routing_repaly=true")
    with pytest.raises(ValueError, match="moe_enable_routing_replay"):
        settings("trainer.ref.fsdp_config.moe_enable_routing_replay=true")


@pytest.mark.parametrize("named", [[], ["trainer.override_entrypoint=trainer_hooks.skyrl"]])
def test_with_replay_on_its_own_task_is_started(named, started, monkeypatch):
    arguments = [
        *OFF,
        *named,
        "trainer.policy.fsdp_config.moe_enable_routing_replay=true",
        "generator.inference_engine.enable_return_routed_experts=true",
        "generator.inference_engine.distributed_executor_backend=mp",
    ]
    monkeypatch.setattr(sys, "argv", ["main", *arguments])
    if named:
        main_base.main()  # SkyRL's own, which hands over
    else:
        trainer_hooks.skyrl.main()
    ((name, cfg),) = started
    assert name == "replay"
    assert cfg.trainer.policy.fsdp_config.moe_enable_routing_replay


def test_with_replay_off_skyrls_own_task_is_started_with_its_own_settings(started, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["main", *OFF])
    trainer_hooks.skyrl.main()
    ((name, cfg),) = started
    assert name == "stock"
    stock = SkyRLTrainConfig.from_cli_overrides(OFF)
    utils.validate_cfg(stock)
    got = dataclasses.asdict(cfg)
    assert got["trainer"]["policy"]["fsdp_config"].pop("moe_enable_routing_replay") is False
    check_identical(got, dataclasses.asdict(stock))
    with pytest.raises(AssertionError, match="only supported with Megatron"):
        validate_cfg(
            entry_point.parsed(
                [
                    *OFF,
                    "generator.inference_engine.enable_return_routed_experts=true",
                    "generator.inference_engine.distributed_executor_backend=mp",
                ]
            )
        )


def test_the_trainer_builds_replaying_policy_workers(monkeypatch):
    built = []

    class Trainer:
        def __init__(self, **kwargs):
            self.cfg = kwargs["cfg"]

        def build_models(self, PolicyWorker, CriticWorker, RefWorker):
            built.append((PolicyWorker, CriticWorker, RefWorker))

    monkeypatch.setattr(main_base, "RayPPOTrainer", Trainer)
    experiment = entry_point.RoutingReplayExp.__new__(entry_point.RoutingReplayExp)
    rest = ("tracker", "tokenizer", "train_dataset", "eval_dataset", "inference_engine_client", "generator")
    trainer = experiment.get_trainer(cfg="cfg", **dict.fromkeys(rest), colocate_pg=None)
    assert trainer.cfg == "cfg"
    trainer.build_models(fsdp_worker.PolicyWorker, fsdp_worker.CriticWorker, fsdp_worker.RefWorker)
    assert built == [(RoutingReplayPolicyWorker, fsdp_worker.CriticWorker, fsdp_worker.RefWorker)]
    with pytest.raises(r3.ConfigError, match="policy worker: expected SkyRL's own"):
        trainer.build_models(fsdp_worker.RefWorker, None, None)


def test_another_skyrl_is_refused_with_its_version(monkeypatch):
    seams.require_skyrl()
    monkeypatch.delattr("skyrl.train.utils.utils.validate_inference_engine_cfg")
    monkeypatch.setattr(seams, "SEAMS", seams.SEAMS | {"skyrl.backends.gone:PackedTensor": ()})
    monkeypatch.setattr(fsdp_worker.FSDPPolicyWorkerBase, "_forward_micro_batch", lambda self, batch: None)
    with pytest.raises(r3.ConfigError) as caught:
        trainer_hooks.skyrl.main()
    text = str(caught.value)
    assert "skyrl 0.4.0" in text
    assert "tested with 0.4.0" in text
    assert "skyrl.train.utils.utils.validate_inference_engine_cfg: not there" in text
    assert "skyrl.backends.gone.PackedTensor: not there" in text
    assert "_forward_micro_batch: expected parameters micro_batch, got batch" in text
