"""Rollouts in SkyRL's own shapes, and what plain replayed Hugging Face forwards make of them.

A row is a function of its token, so that a row at another token is seen.
"""

import pickle
from types import SimpleNamespace

import numpy as np
import stand_ins  # noqa: F401  (before SkyRL)
import torch
from places import DEMO_MODEL
from skyrl.train.trainer import RayPPOTrainer
from transformers import AutoModelForCausalLM

import r3
from trainer_hooks.skyrl.entry_point import parsed

LAYERS, EXPERTS, TOP_K, VOCAB = 8, 32, 4, 300
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


def rows_of(tokens) -> np.ndarray:
    """uint8 `[T, L, K]`: distinct experts of each token and layer."""
    first = np.asarray(tokens)[:, None, None] * 31 + np.arange(LAYERS)[:, None] * 7
    return ((first + np.array([0, 5, 11, 18])) % EXPERTS).astype(np.uint8)


def samples() -> list[tuple[list[int], list[int], np.ndarray]]:
    """Prompt, response and the captured rows of each sample."""
    generator = torch.Generator().manual_seed(1)
    out = []
    for prompt, response, missing in SHAPES:
        tokens = torch.randint(5, VOCAB, (prompt + response,), generator=generator).tolist()
        out.append((tokens[:prompt], tokens[prompt:], rows_of(tokens)[: len(tokens) - missing]))
    return out


def training_batch(cfg):
    """The batch of these rollouts, two a prompt."""
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


def plain_logprobs(model, *, replayed: bool = True) -> list[torch.Tensor]:
    """`[response]` of each sample, by a forward each of a plain model to which replay is attached."""
    out = []
    for prompt, response, rows in samples():
        ids = torch.tensor(prompt + response, device=model.device)
        routing = ids.new_full((1, len(ids), LAYERS, TOP_K), -1)
        routing[0, : len(rows)] = torch.from_numpy(rows).to(ids)
        more = {"routed_experts": routing} if replayed else {}
        logits = model(input_ids=ids[None], use_cache=False, **more).logits
        out.append(logits.log_softmax(-1)[0, :-1].gather(-1, ids[1:, None])[-len(response) :, 0])
    return out


def plain_model():
    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32)
    r3.attach(model)
    return model


def of_samples(batch, padded) -> list[torch.Tensor]:
    """The response's part of `[B, response_length]` of each sample that is not a filling."""
    mask = batch["response_mask"].bool()
    return [padded[index][mask[index]] for index in range(len(mask)) if batch["loss_mask"][index].any()]


def farthest(left, right) -> float:
    return max((a - b).abs().max().item() for a, b in zip(left, right, strict=True))
