"""What r3 relies on in ms-swift, and what it refuses."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from r3.capture.engine import is_truncated
from trainer_hooks.ms_swift.engine import sampling
from trainer_hooks.sampling_sets import without_bound
from trainer_hooks.support import Refusal, Seam

TESTED = "4.6.0"


def seams() -> Iterator[Seam]:
    """Those of swift's GRPO trainer and of its samples."""
    from swift.rl_core.data import GRPOSample
    from swift.rlhf_trainers import grpo_trainer

    trainer = grpo_trainer.GRPOTrainer
    for name, parameters in {
        "_prepare_vllm_engine": (),
        "_get_request_config": (),
        "_move_full_model_to_vllm": (),
        "_prepare_batch_inputs": ("samples",),
        "_collate_teacher_opsd_batch": ("batch", "template"),
        "_compute_teacher_logps": ("model_inputs", "grpo_batch"),
        "_get_per_token_logps_and_entropies": ("model", "model_inputs", "grpo_batch"),
        "null_ref_context": (),
    }.items():
        yield Seam(where=f"GRPOTrainer.{name}", target=getattr(trainer, name, None), parameters=parameters)
    yield Seam(where="GRPOTrainer.sample_cls", target=getattr(trainer, "sample_cls", None))
    yield Seam(
        where="GRPOSample.apply_rollout_output",
        target=getattr(GRPOSample, "apply_rollout_output", None),
        parameters=("rollout_output",),
    )
    yield Seam(
        where="swift.rlhf_trainers.grpo_trainer.collate_to_grpo_micro_batch",
        target=getattr(grpo_trainer, "collate_to_grpo_micro_batch", None),
        parameters=("samples", "template"),
    )


def subject(args: Any, given: dict[str, Any]) -> SimpleNamespace:
    """What refusals look at: the configuration, and the trainer's other arguments."""
    return SimpleNamespace(args=args, given=given, template=given.get("template"))


def _zero_stage(it: Any) -> int:
    return getattr(getattr(it.args, "deepspeed_plugin", None), "zero_stage", 0)


REFUSALS = (
    Refusal(
        setting="use_vllm false",
        why="completions of transformers' own generation come without the experts that they used",
        cure="Set --use_vllm true --vllm_mode colocate",
        found=lambda it: not it.args.use_vllm,
    ),
    Refusal(
        setting="vllm_mode server",
        why="r3 does not start that engine, and cannot see whether it captures as it should",
        cure="Set --vllm_mode colocate",
        found=lambda it: it.args.use_vllm and it.args.vllm_mode != "colocate",
    ),
    Refusal(
        setting="vllm_enable_lora",
        why="the engine then runs the adapter beside the weights, which is untried with capture",
        cure="Leave it off: the adapter is merged into the weights that are synced",
        found=lambda it: it.args.vllm_enable_lora,
    ),
    Refusal(
        setting="sequence_parallel_size above 1",
        why="swift cuts the tokens of a micro-batch, and does not cut their rows",
        cure="Set --sequence_parallel_size 1",
        found=lambda it: getattr(it.template, "sequence_parallel_size", 1) > 1,
    ),
    Refusal(
        setting="use_liger_kernel",
        why="its loss runs the decoder by itself, without the forward that replays",
        cure="Set --use_liger_kernel false",
        found=lambda it: it.args.use_liger_kernel,
    ),
    Refusal(
        setting="multi_turn_scheduler",
        why="the rows of one answer need not be those of the turns before it",
        cure="Train on single turns",
        found=lambda it: bool(it.args.multi_turn_scheduler),
    ),
    Refusal(
        setting="chord_sft_dataset",
        why="demonstrations were not sampled by the engine, and have no rows",
        cure="Leave it out",
        found=lambda it: bool(it.given.get("chord_sft_dataset")),
    ),
    without_bound(lambda it: sampling(it.args)),
    Refusal(
        setting="teacher_model_server with top_p, top_k or min_p",
        why="the server's log-probabilities are over the whole vocabulary, the policy's over the ids that were left",
        cure="Set teacher_model, or sample from the whole vocabulary: --top_k -1 --top_p 1",
        found=lambda it: is_truncated(sampling(it.args)) and bool(it.given.get("teacher_model_server")),
    ),
    Refusal(
        setting="DeepSpeed ZeRO-3",
        why="parameters are in parts that neither replay's proof nor the weight sync can read",
        cure="Use FSDP2, or ZeRO-2",
        found=lambda it: _zero_stage(it) == 3,
    ),
)
