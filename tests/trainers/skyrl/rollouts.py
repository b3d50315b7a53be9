"""Rollouts in SkyRL's own shapes, and what plain Hugging Face forwards make of them."""

import pickle
from types import SimpleNamespace

import numpy as np
import stand_ins  # noqa: F401  (before SkyRL)
import torch
from places import DEMO_MODEL
from skyrl.train.trainer import RayPPOTrainer
from trainers.conformance import Oracle, Scored, plain_model, rows_of

from trainer_hooks.skyrl.entry_point import parsed

# Prompt, response, and how many of the last tokens have no row: the sampled one, or also what a last turn was told.
SHAPES = [(5, 8, 1), (9, 12, 1), (3, 4, 3), (7, 6, 1), (2, 9, 5), (6, 3, 1)]
DP_SIZE = 4  # fills the batch up to 8 samples


def settings(*more: str):
    """Settings with replay on, parsed as the entry point does."""
    return parsed(
        [
            f"trainer.policy.model.path={DEMO_MODEL}",
            "trainer.policy.fsdp_config.moe_enable_routing_replay=true",
            "generator.inference_engine.enable_return_routed_experts=true",
            "generator.inference_engine.distributed_executor_backend=mp",
            "generator.n_samples_per_prompt=2",
            "trainer.train_batch_size=3",
            "trainer.policy_mini_batch_size=3",
            "trainer.micro_forward_batch_size_per_gpu=3",
            "trainer.micro_train_batch_size_per_gpu=3",
            "trainer.remove_microbatch_padding=false",
            "trainer.flash_attn=false",
            "trainer.algorithm.use_kl_loss=false",
            "trainer.gradient_checkpointing=false",
            "trainer.logger=console",
            *more,
        ]
    )


def samples() -> list[tuple[list[int], list[int], np.ndarray]]:
    """Prompt, response and the captured rows of each sample."""
    generator = torch.Generator().manual_seed(1)
    out = []
    for prompt, response, missing in SHAPES:
        tokens = torch.randint(5, 300, (prompt + response,), generator=generator).tolist()
        out.append((tokens[:prompt], tokens[prompt:], rows_of(tokens)[: len(tokens) - missing].numpy()))
    return out


def training_batch(cfg, **more):
    """The batch of these rollouts, two a prompt; `more` of a generator's output."""
    prompts, responses, rows = (list(part) for part in zip(*samples(), strict=True))
    return training_batch_of(
        cfg,
        {
            "prompt_token_ids": prompts,
            "response_ids": responses,
            "rewards": [0.0] * len(responses),
            "loss_masks": [[1] * len(response) for response in responses],
            "rollout_logprobs": [[-1.0] * len(response) for response in responses],
            "rollout_expert_indices": rows,
            **more,
        },
    )


def training_batch_of(cfg, output):
    """The batch that SkyRL's trainer makes of a generator's output, as a worker gets it: padded, and through pickle."""
    trainer = RayPPOTrainer.__new__(RayPPOTrainer)
    trainer.cfg, trainer.all_metrics = cfg, {}
    trainer.tokenizer = SimpleNamespace(pad_token_id=0)
    trainer.dispatch = SimpleNamespace(get_lcm_dp_size=lambda: DP_SIZE)
    rewards = [
        [0.0] * len(response) if isinstance(reward, float) else reward
        for reward, response in zip(output["rewards"], output["response_ids"], strict=True)
    ]
    per_prompt = cfg.generator.n_samples_per_prompt
    batch = trainer.convert_to_training_input(
        output | {"rewards": rewards}, [str(index // per_prompt) for index in range(len(rewards))]
    )
    shape = batch["loss_mask"].shape
    generator = torch.Generator().manual_seed(2)
    batch["advantages"] = torch.randn(shape, generator=generator)
    batch["action_log_probs"] = -5 + torch.rand(shape, generator=generator)
    return pickle.loads(pickle.dumps(batch))


def oracle(sets=None) -> Oracle:
    """The plain model, which has the rows of the samples, and `sets` of them."""
    rows = {(*prompt, *response): torch.from_numpy(rows) for prompt, response, rows in samples()}
    return Oracle(plain_model(), rows, sets)


def plain_logprobs(plain: Oracle, *, replayed: bool = True) -> list[torch.Tensor]:
    """`[response]` of each sample."""
    return [plain.logprobs(prompt + response, replayed=replayed)[-len(response) :] for prompt, response, _ in samples()]


def scored(plain: Oracle, old: list[torch.Tensor], trained: list[torch.Tensor]) -> list[Scored]:
    """Old log-probabilities of the samples' responses, and those of the training forward."""
    ids = [prompt + response for prompt, response, _ in samples()]
    return [plain.scored(zip(ids, part, strict=True), in_loss=part is trained) for part in (old, trained)]


def of_samples(batch, padded) -> list[torch.Tensor]:
    """The response's part of `[B, response_length]` of each sample that is not a filling."""
    mask = batch["response_mask"].bool()
    return [padded[index][mask[index]] for index in range(len(mask)) if batch["loss_mask"][index].any()]
