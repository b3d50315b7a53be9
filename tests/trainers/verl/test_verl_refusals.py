"""What verl's engine with replay refuses by name, and how its setting is read."""

import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import verl.trainer.config
from hydra import compose, initialize_config_dir
from models import tiny_moe
from omegaconf import OmegaConf
from trainers.conformance import check_refused
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.config import FSDPEngineConfig
from verl.workers.engine import FSDPEngineWithLMHead
from verl_jobs import batch, configs, engine, gradients, logprobs, rows_of, samples

from r3 import ConfigError, ReplayError, RoutingError
from trainer_hooks.support import require_supported
from trainer_hooks.verl.engine import RoutingReplayEngine
from trainer_hooks.verl.mode import KEY, REFUSALS, replay_mode


@pytest.fixture(scope="module")
def replaying(one_rank):
    return engine("R3")


def test_the_keys_of_the_command_line():
    with initialize_config_dir(str(Path(verl.trainer.config.__file__).parent), version_base=None):
        config = compose(
            "ppo_trainer",
            overrides=[
                f"+{KEY}=R3",
                "actor_rollout_ref.rollout.enable_rollout_routing_replay=True",
                "actor_rollout_ref.model.external_lib=trainer_hooks.verl",
                "+actor_rollout_ref.rollout.engine_kwargs.vllm.hf_overrides.head_dtype=float32",
            ],
        )
    actor, reference = config.actor_rollout_ref.actor, config.actor_rollout_ref.ref
    assert replay_mode(omega_conf_to_dataclass(actor.fsdp_config)) == "R3"
    assert replay_mode(omega_conf_to_dataclass(reference.fsdp_config)) == "disabled"
    assert omega_conf_to_dataclass(reference.fsdp_config).forward_only
    assert config.actor_rollout_ref.rollout.logprobs_mode == "processed_logprobs"
    assert OmegaConf.to_container(config.actor_rollout_ref.rollout.engine_kwargs.vllm)["hf_overrides"] == {
        "head_dtype": "float32"
    }


@pytest.mark.parametrize("given", [{"mode": "r3"}, {"enable": True}, {"mode": None}])
def test_an_unknown_mode_is_refused(given):
    with pytest.raises(ConfigError, match=rf"{KEY}: expected one of disabled, R2, R3, got"):
        replay_mode(FSDPEngineConfig(router_replay=given))


def test_modes():
    assert replay_mode(FSDPEngineConfig()) == replay_mode(FSDPEngineConfig(router_replay={})) == "disabled"
    assert replay_mode(FSDPEngineConfig(router_replay={"mode": "R2"})) == "R2"


def test_forwards_of_the_actor_without_routing_are_refused(replaying):
    for forward in (gradients, logprobs):
        with pytest.raises(ReplayError, match=r"mode=R3.*no `routed_experts`.*enable_rollout_routing_replay=True"):
            forward(replaying, batch(samples(), None))


def test_rows_of_other_tokens_are_refused(replaying):
    ids = samples()
    rows = [rows_of(part) for part in ids]
    rows[0], rows[1] = rows[1], rows[0]
    with pytest.raises(RoutingError, match=r"a row of each token, jagged like input_ids of \[.*\] tokens, got \["):
        logprobs(replaying, batch(ids, rows, max_token_len_per_gpu=200))


def test_damaged_rows_are_refused(replaying):
    ids = samples()
    rows = [rows_of(part) for part in ids]
    rows[2][3, 1] = 0  # in one layer only
    with pytest.raises(RoutingError, match=r"(?s)not 4 distinct expert ids.*decoder layer 1: \[0, 0, 0, 0\]"):
        logprobs(replaying, batch(ids, rows))


def test_fused_kernels_are_refused(one_rank):
    with check_refused("use_fused_kernels=True", "Set it to False"):
        engine("R3", model={"use_fused_kernels": True})


def test_one_expert_a_token_is_refused(one_rank, tmp_path):
    tiny_moe(num_experts_per_tok=1, norm_topk_prob=False).save_pretrained(tmp_path)
    with check_refused("routes each token to one expert", "Turn replay off"):
        engine("R3", model={"path": str(tmp_path), "load_tokenizer": False})


def test_images_with_ulysses_are_refused():
    subject = SimpleNamespace(
        model_config=SimpleNamespace(use_fused_kernels=False, hf_config=SimpleNamespace(vision_config={})),
        engine_config=SimpleNamespace(use_fused_kernels=False),
        use_ulysses_sp=True,
        replay=None,
    )
    with check_refused("takes images", "ulysses_sequence_parallel_size=1"):
        require_supported("verl", REFUSALS, subject)
    subject.use_ulysses_sp = False
    require_supported("verl", REFUSALS, subject)


def test_captured_and_not_replayed_is_said_once(one_rank, caplog):
    made = engine("disabled")
    ids = samples()
    with caplog.at_level(logging.WARNING, logger="r3"):
        for _ in range(2):
            logprobs(made, batch(ids, [rows_of(part) for part in ids]))
    assert [record.getMessage() for record in caplog.records if "not replayed" in record.getMessage()] == [
        "actor_rollout_ref.rollout.enable_rollout_routing_replay=True and actor_rollout_ref.actor.fsdp_config."
        "router_replay.mode=disabled: the rollout's routing is captured and carried, and not replayed. Set "
        f"+{KEY}=R3 to replay it"
    ]


def test_another_verl_is_refused_where_replay_is_on(one_rank, monkeypatch):
    def forward_step(self, batch, loss_function): ...

    monkeypatch.setattr(FSDPEngineWithLMHead, "forward_step", forward_step)
    with pytest.raises(ConfigError, match=r"(?s)verl 0\.9.*forward_step: expected parameters micro_batch,"):
        RoutingReplayEngine(**configs("R3"))
    RoutingReplayEngine(**configs("disabled"))


def test_ulysses_that_verl_does_not_split_is_said(two_ranks):
    assert "verl splits no other attention" in two_ranks.all(warned_of_sdpa)[0]


def warned_of_sdpa() -> str:
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("r3").addHandler(handler)
    engine("disabled", ulysses_sequence_parallel_size=2)
    logging.getLogger("r3").removeHandler(handler)
    return "\n".join(said)
