"""What r3 relies on in TRL, and what it refuses."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from r3.capture.engine import is_truncated
from trainer_hooks.sampling_sets import without_bound
from trainer_hooks.support import Refusal, Seam

TESTED = "1.16.0"

_LOGPS = ("model", "input_ids", "attention_mask", "logits_to_keep")
_HEAD = (
    *("ctx", "hidden", "weight", "bias", "targets", "temperature", "chunk_size"),
    *("final_logit_softcapping", "logit_scale", "outputs"),
)


def seams(trainer: type) -> Iterator[Seam]:
    """Those of a class of trainers."""
    from trl.generation import vllm_generation
    from trl.generation.vllm_client import VLLMClient
    from trl.trainer import utils

    for name, parameters in {
        "_generate": ("prompts",),
        "_generate_single_turn": ("prompt_ids",),
        "_generate_and_score_completions": ("inputs",),
        "_get_per_token_logps_and_entropies": _LOGPS,
        "_compute_loss": ("model", "inputs"),
    }.items():
        yield Seam(where=f"{trainer.__name__}.{name}", target=getattr(trainer, name, None), parameters=parameters)
    generation = vllm_generation.VLLMGeneration
    for name in ("sync_weights", "generate"):
        yield Seam(where=f"VLLMGeneration.{name}", target=getattr(generation, name, None))
    for name in ("LLM", "VLLMClient"):
        yield Seam(where=f"trl.generation.vllm_generation.{name}", target=getattr(vllm_generation, name, None))
    head = getattr(utils, "_ChunkedLogProbFunction", None)
    yield Seam(
        where="trl.trainer.utils._use_triton", target=getattr(utils, "_use_triton", None), parameters=("device",)
    )
    yield Seam(
        where="trl.trainer.utils._ChunkedLogProbFunction", target=getattr(head, "forward", None), parameters=_HEAD
    )
    yield Seam(where="VLLMClient._post", target=getattr(VLLMClient, "_post", None), parameters=("url",))
    yield Seam(where="VLLMClient.init_communicator", target=getattr(VLLMClient, "init_communicator", None))


def sampling(args: Any) -> dict[str, Any]:
    """What TRL's requests sample with, as `vllm.SamplingParams`."""
    own = {"temperature": args.temperature, "top_p": args.top_p, "top_k": args.top_k, "min_p": args.min_p or 0.0}
    return own | (args.generation_kwargs or {})


def subject(args: Any, given: dict[str, Any], state: Any = None) -> SimpleNamespace:
    """What refusals look at: the configuration, the trainer's other arguments, and accelerate's state."""
    return SimpleNamespace(args=args, given=given, state=state)


def _has_entropy_bonus(args: Any) -> bool:
    return bool(getattr(args, "entropy_coef", 0) or getattr(args, "use_adaptive_entropy", False))


BEFORE_START = (
    Refusal(
        setting="use_vllm=False",
        why="completions of transformers' own generation come without the experts that they used",
        cure="Set use_vllm=True",
        found=lambda it: not it.args.use_vllm,
    ),
    Refusal(
        setting="rollout_func",
        why="r3 does not see which requests its tokens come from",
        cure="Use tools or environment_factory for turns, or turn moe_enable_routing_replay off",
        found=lambda it: it.given.get("rollout_func") is not None,
    ),
    Refusal(
        setting="generation_kwargs: n",
        why="TRL asks for one completion of each prompt in a list",
        cure="Set num_generations",
        found=lambda it: "n" in (it.args.generation_kwargs or {}),
    ),
    Refusal(
        setting="vllm_model_impl='transformers'",
        why="vLLM then runs transformers' own layers, from which capture is untried",
        cure="Leave it at 'vllm'",
        found=lambda it: it.args.vllm_model_impl == "transformers",
    ),
    Refusal(
        setting="generation_kwargs: temperature",
        why="the engine samples at it, and TRL's log-probabilities stay at the other: importance ratios are off",
        cure="Set temperature itself",
        found=lambda it: sampling(it.args)["temperature"] != it.args.temperature,
    ),
    without_bound(lambda it: sampling(it.args)),
    Refusal(
        setting="entropy_coef or use_adaptive_entropy with top_p, top_k or min_p",
        why="entropy over the ids that tokens were sampled from comes without gradient: the bonus would do nothing",
        cure="Leave the bonus off, or sample from the whole vocabulary",
        found=lambda it: is_truncated(sampling(it.args)) and _has_entropy_bonus(it.args),
    ),
)

AFTER_START = (
    Refusal(
        setting="DeepSpeed ZeRO-3",
        why="parameters are in parts that neither replay's proof nor the weight sync can read",
        cure="Use FSDP2 (fsdp_version: 2), or ZeRO-2",
        found=lambda it: getattr(getattr(it.state, "deepspeed_plugin", None), "zero_stage", 0) == 3,
    ),
    Refusal(
        setting="fsdp_version: 1",
        why="FullyShardedDataParallel's flat parameters cannot be synced by name",
        cure="Set fsdp_version: 2 in accelerate's configuration",
        found=lambda it: getattr(getattr(it.state, "fsdp_plugin", None), "fsdp_version", 2) == 1,
    ),
)
