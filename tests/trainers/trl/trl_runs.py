"""Runs of TRL's trainers that tests look at: what the engine answered, what each forward of the policy gave.

python trl_runs.py SETTINGS.json RESULT.pt        # one rank of a launcher
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from places import DEMO_MODEL
from torch import Tensor
from trainers.conformance import EQUAL, Oracle, Scored, check_gap, check_replayed, plain_model, plain_weights

from r3.capture import SamplingMask
from r3.weight_sync import GlooTransport
from trainer_hooks import trl as hooks

PROMPTS = [f"{a}+{b}=\n" * (1 + a % 3) for a in range(10, 14) for b in range(10, 14)]


def varied(completions: list, **_: Any) -> list[float]:
    """A reward that differs within a group."""
    return [float(len(set(str(completion)))) for completion in completions]


class Watched:
    """Put before one of r3's trainers: records what its forwards gave beside what a plain model gives.

    Attributes:
        scored: of each call that scores with the policy or the reference.
        rows, sampled, sets: the engine's own rows, log-probabilities and sets of each sequence, by its tokens.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.scored: list[Scored] = []
        self.rows: dict[tuple[int, ...], Tensor] = {}
        self.sampled: dict[tuple[int, ...], Tensor] = {}
        self.sets: dict[tuple[int, ...], SamplingMask] = {}
        super().__init__(*args, **kwargs)
        if self.replay is not None:
            take = self._engine.take
            self._engine.take = lambda *a: self._kept(take(*a))

    def _kept(self, rollouts: list) -> list:
        for rollout in rollouts:
            ids = (*rollout.prompt_ids, *rollout.token_ids)
            self.rows[ids] = rollout.routing.expert_ids[0, :-1]
            self.sampled[ids] = rollout.logprobs
            if rollout.sampling_mask is not None:
                self.sets[ids] = rollout.sampling_mask
        return rollouts

    def _sync_weights(self) -> None:
        # As the engine has them: else float32 weights alone are a gap.
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.copy_(parameter.to(torch.bfloat16).to(parameter.dtype))
        super()._sync_weights()

    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep, *args, **kwargs):
        result = super()._get_per_token_logps_and_entropies(
            model, input_ids, attention_mask, logits_to_keep, *args, **kwargs
        )
        if self.replay is not None and self.rows:
            self._look(model, input_ids.cpu(), attention_mask.cpu(), result[0].detach().float().cpu(), logits_to_keep)
        return result

    def _look(self, model: Any, input_ids: Tensor, mask: Tensor, got: Tensor, keep: int) -> None:
        plain = self.ref_model if model is self.ref_model else self.accelerator.unwrap_model(self.model)
        oracle = Oracle(plain_model(plain_weights(plain)), self.rows, self.sets if self.model.training else {})
        prompt = input_ids.shape[1] - keep
        forward = []
        for row, attended, logps in zip(input_ids, mask.bool(), got, strict=True):
            if not attended[prompt]:
                continue  # TRL masks all of a completion that was cut: its tokens see nothing, and are not in the loss
            if self.model.training:
                ids, start = self._sequence(row.tolist())
            else:
                ids, start = tuple(row[attended].tolist()), int(attended.int().argmax())
            forward.append((ids, logps[: len(ids) - (prompt - start)]))
        kind = {
            "in_loss": self._loss_rows is not None,
            "training": self.model.training,
            "reference": self._is_reference(model),
        }
        sampled = None if kind["in_loss"] or kind["reference"] else self.sampled
        self.scored.append(oracle.scored(forward, sampled, self.temperature, **kind))

    def _sequence(self, row: list[int]) -> tuple[tuple[int, ...], int]:
        """The known sequence in a padded row, and where it begins: the longest, since a turn is in its next."""
        found = [
            (len(ids), start, ids)
            for ids in self.rows
            for start in range(len(row) - len(ids) + 1)
            if tuple(row[start : start + len(ids)]) == ids
        ]
        assert found, "a row of the loss is no sequence that the engine answered"
        _, start, ids = max(found)
        return ids, start


def check(scored: list[Scored], log: list[dict[str, Any]], equal: float = EQUAL) -> None:
    """The policy is replayed, and TRL's own metric (of GRPO; RLOO has none: the same computed) falls to a third."""
    check_replayed(scored, equal)
    sampled = [each for forward in scored if forward.training for each in forward.sampled]
    mine, live, engine = (torch.cat(parts) for parts in zip(*sampled, strict=True))
    metric = "sampling/sampling_logp_difference/mean"
    own = torch.tensor([line[metric] for line in log if metric in line] or [(mine - engine).abs().mean()]).mean()
    check_gap(own.item(), (live - engine).abs().mean().item())


class WatchedGRPO(Watched, hooks.GRPOTrainer):
    pass


class WatchedRLOO(Watched, hooks.RLOOTrainer):
    pass


TRAINERS = {"grpo": (WatchedGRPO, hooks.GRPOConfig), "rloo": (WatchedRLOO, hooks.RLOOConfig)}


def trainer(folder: Path, *, kind: str = "grpo", given: dict | None = None, **settings: Any) -> Any:
    """A trainer of the demo's model on PROMPTS."""
    made, config = TRAINERS[kind]
    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "max_completion_length": 12,
        "max_steps": 2,
        "learning_rate": 1e-4,
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "model_init_kwargs": {"dtype": "float32"},
        "use_vllm": True,
        "vllm_mode": "colocate",
        "vllm_max_model_length": 256,
        "vllm_gpu_memory_utilization": 0.1,
    } | settings
    given = {"train_dataset": Dataset.from_dict({"prompt": PROMPTS})} | (given or {})
    return made(model=str(DEMO_MODEL), reward_funcs=varied, args=config(**settings), **given)


def main(settings: str, result: str) -> None:
    given = json.loads(Path(settings).read_text())
    sent = count_bytes_sent()
    made = trainer(Path(settings).parent, **given)
    made.train()
    rank = made.accelerator.process_index
    torch.save({"scored": made.scored, "log": made.state.log_history, "sent": sum(sent)}, f"{result}.{rank}")


def count_bytes_sent() -> list[int]:
    """Of each chunk that this rank will hand to gloo."""
    publish, sent = GlooTransport.publish, []

    def counting(transport: Any, index: int, chunk: Any) -> Any:
        sent.append(sum(tensor.nbytes for _, tensor in chunk))
        return publish(transport, index, chunk)

    GlooTransport.publish = counting
    return sent


if __name__ == "__main__":
    main(*sys.argv[1:])
