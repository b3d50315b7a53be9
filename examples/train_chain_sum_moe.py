"""Train the small MoE of the demo: chain sums, worked out in words, from flawed demonstrations.

The demonstrations work a chain sum from left to right, a line a step, in varying words, and close with the answer:

    State the final answer to the following arithmetic problem: 96 + 21 - 5 =
    Step by step:
    96 + 21 = 117
    Next, 117 - 5 = 112.
    So the answer is <answer>112</answer>

A share of the lines (`--noise`) has a wrong result, with which the demonstration goes on, and a share of the
demonstrations (`--untagged`) gives the answer without its tags, which earns nothing. The model learns how the task is
done and how the teacher errs, so that it samples failures that reinforcement learning can remove.

    python examples/train_chain_sum_moe.py --out runs/chain_sum_moe

takes minutes on one GPU. The model card beside the published weights says what was run and what came out.
"""

import argparse
import json
import math
import random
import time
from pathlib import Path

import reasoning_gym
import torch
from reasoning_gym.utils import extract_answer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

TASK = dict(min_terms=3, max_terms=4, min_digits=2, max_digits=2)
"""Settings of reasoning-gym's `chain_sum` that the model is trained on and the demo uses."""

EVAL_SEED = 1_000_000_007


OPENINGS = ("", "Step by step:\n", "From left to right:\n", "Let me work this out.\n", "One term at a time.\n")
STEPS = (
    "{a} {op} {b} = {r}\n",
    "First, {a} {op} {b} = {r}.\n",
    "Next, {a} {op} {b} = {r}.\n",
    "Then {a} {op} {b} is {r}.\n",
    "Now {a} {op} {b} makes {r}.\n",
    "{a} {op} {b} gives {r}.\n",
)
CLOSINGS = ("{a}", "So the answer is {a}", "Hence {a}", "The result: {a}", "In the end: {a}")
UNTAGGED = ("The total is {r}.", "So we get {r}.", "That makes {r}.", "Result: {r}.")


def demonstration(expression: str, noise: float, untagged: float, rng: random.Random) -> str:
    """A worked solution of `expression` ("96 + 21 - 5").

    Each line errs with probability `noise`; the answer lacks its tags with probability `untagged`.
    """
    total, *rest = expression.split()
    text = rng.choice(OPENINGS)
    for op, term in zip(rest[::2], rest[1::2], strict=True):
        result = int(total) + int(term) * (1 if op == "+" else -1)
        if rng.random() < noise:
            result += rng.choice((-20, -10, -2, -1, 1, 2, 10, 20))
        text += rng.choice(STEPS).format(a=total, op=op, b=term, r=result)
        total = str(result)
    closing = rng.choice(UNTAGGED if rng.random() < untagged else CLOSINGS)
    return text + closing.format(a=f"<answer>{total}</answer>", r=total)


def build_tokenizer(vocab_size: int, samples: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE with single digits and the answer tags as tokens of their own."""
    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        samples,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=["<|pad|>", "<|end|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.add_tokens(["<answer>", "</answer>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        clean_up_tokenization_spaces=False,
    )


def batches(tokenizer, size: int, noise: float, untagged: float, seed: int, device):
    """Endless `(input_ids, labels)` of `[size, S]` int64; labels are -100 on prompts and padding."""
    data = reasoning_gym.create_dataset("chain_sum", seed=seed, size=1_000_000_000, **TASK)
    rng = random.Random(seed)
    at = 0
    while True:
        entries = [data[at + i] for i in range(size)]
        at += size
        prompts = tokenizer([e["question"] + "\n" for e in entries]).input_ids
        work = [demonstration(e["metadata"]["expression"], noise, untagged, rng) for e in entries]
        answers = [[*ids, tokenizer.eos_token_id] for ids in tokenizer(work).input_ids]
        length = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
        ids = torch.full((size, length), tokenizer.pad_token_id)
        labels = torch.full((size, length), -100)
        for row, (p, a) in enumerate(zip(prompts, answers, strict=True)):
            ids[row, : len(p) + len(a)] = torch.tensor(p + a)
            labels[row, len(p) : len(p) + len(a)] = torch.tensor(a)
        yield ids.to(device, non_blocking=True), labels.to(device, non_blocking=True)


@torch.no_grad()
def accuracy(model, tokenizer, count: int, do_sample: bool) -> float:
    """Mean reward on `count` problems that training never sees, sampled at temperature 1 or greedy."""
    model.eval()
    data = reasoning_gym.create_dataset("chain_sum", seed=EVAL_SEED, size=count, **TASK)
    tokenizer.padding_side = "left"
    batch = tokenizer([e["question"] + "\n" for e in data], return_tensors="pt", padding=True).to(model.device)
    sampling = dict(do_sample=do_sample, temperature=1.0, top_k=0, top_p=1.0) if do_sample else dict(do_sample=False)
    out = model.generate(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        max_new_tokens=96,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **sampling,
    )
    texts = tokenizer.batch_decode(out[:, batch.input_ids.shape[1] :], skip_special_tokens=True)
    return sum(data.score_answer(extract_answer(t), e) for t, e in zip(texts, data, strict=True)) / count


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--out", type=Path, required=True)
    ap.add_argument("--start-from", type=Path, help="go on from this model, instead of from random weights")
    ap.add_argument("--noise", type=float, default=0.2, help="share of demonstration lines with a wrong result")
    ap.add_argument("--untagged", type=float, default=0.45, help="share of demonstrations without answer tags")
    ap.add_argument("--router-penalty", type=float, default=0.1, help="weight of the mean square router logit")
    ap.add_argument("--steps", type=int, default=1200)
    ap.add_argument("--batch", type=int, default=512)
    ap.add_argument("--lr", type=float, default=2e-3)
    ap.add_argument("--seed", type=int, default=0)
    ap.add_argument("--hidden", type=int, default=128)
    ap.add_argument("--layers", type=int, default=8)
    ap.add_argument("--experts", type=int, default=32)
    ap.add_argument("--top-k", type=int, default=4)
    ap.add_argument("--expert-size", type=int, default=32)
    args = ap.parse_args()
    torch.manual_seed(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    some = reasoning_gym.create_dataset("chain_sum", seed=args.seed, size=2000, **TASK)
    rng = random.Random(args.seed)
    tokenizer = build_tokenizer(
        380, [e["question"] + "\n" + demonstration(e["metadata"]["expression"], 0, 0.5, rng) for e in some]
    )
    config = Qwen3MoeConfig(
        vocab_size=384,
        hidden_size=args.hidden,
        intermediate_size=args.hidden * 2,
        moe_intermediate_size=args.expert_size,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 32,
        num_key_value_heads=1,
        head_dim=32,
        num_experts=args.experts,
        num_experts_per_tok=args.top_k,
        norm_topk_prob=True,
        router_aux_loss_coef=1e-2,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    assert len(tokenizer) <= config.vocab_size, len(tokenizer)
    model = Qwen3MoeForCausalLM(config)
    if args.start_from:
        model = Qwen3MoeForCausalLM.from_pretrained(args.start_from, dtype=torch.float32)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(args.start_from)
    model.to(device)
    size = sum(p.numel() for p in model.parameters())
    print(f"{size / 1e6:.2f} M parameters, {size * 2 / 2**20:.2f} MiB in bf16", flush=True)

    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.1)
    warmup = min(100, max(1, args.steps // 10))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda i: min(1, (i + 1) / warmup) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1, i / args.steps)))),
    )
    start, log = time.time(), []
    for step, (ids, labels) in enumerate(
        batches(tokenizer, args.batch, args.noise, args.untagged, args.seed, device), 1
    ):
        model.train()
        with torch.autocast(device, dtype=torch.bfloat16):
            out = model(input_ids=ids, labels=labels, use_cache=False, output_router_logits=True)
            router_square = torch.stack([logits.float().square().mean() for logits in out.router_logits]).mean()
            loss = out.loss + args.router_penalty * router_square
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 100 == 0 or step == args.steps:
            sampled = accuracy(model, tokenizer, 256, do_sample=True)
            log.append(
                dict(
                    step=step,
                    loss=loss.item(),
                    router_square=router_square.item(),
                    sampled=sampled,
                    seconds=time.time() - start,
                )
            )
            print(json.dumps(log[-1]), flush=True)
        if step == args.steps:
            break

    model.to(torch.bfloat16)
    figures = {
        "arguments": {k: v for k, v in vars(args).items() if k not in ("out", "start_from")},
        "task": TASK,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "seconds": round(time.time() - start, 1),
        "reward_sampled": accuracy(model, tokenizer, 2048, do_sample=True),
        "reward_greedy": accuracy(model, tokenizer, 2048, do_sample=False),
        "log": log,
    }
    tokenizer.padding_side = "right"
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    (args.out / "training.json").write_text(json.dumps(figures, indent=1))
    print(json.dumps({k: v for k, v in figures.items() if k != "log"}), flush=True)


if __name__ == "__main__":
    main()
