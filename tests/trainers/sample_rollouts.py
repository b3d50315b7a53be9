"""Makes rollouts.safetensors, for trainers that have no engine on a CPU: what vLLM samples from the demo's model.

    python tests/trainers/sample_rollouts.py

In bfloat16, with logits in float32, as r3 sets it.
"""

from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

import r3
from r3.capture import SamplingSettings, collect, running_engine, sampling_kwargs, save_rollouts

EXAMPLES = Path(__file__).parents[2] / "examples"
FILE = Path(__file__).with_name("rollouts.safetensors")
PROMPTS = [f"{a}+{b}=\n" * (1 + a % 2) for a in range(10, 14) for b in (11, 13)]
TOKENS = 48


def main() -> None:
    from vllm import SamplingParams

    model = EXAMPLES / "chain_sum_moe"
    config = r3.R3Config.from_overrides([], {"trainer.policy.model.path": str(model)})
    spec = r3.attach(AutoModelForCausalLM.from_pretrained(model)).spec
    tokenizer = AutoTokenizer.from_pretrained(model)
    prompts = [{"prompt_token_ids": tokenizer(text).input_ids} for text in PROMPTS]
    given = sampling_kwargs(config) | {"n": 1, "max_tokens": TOKENS, "ignore_eos": True, "seed": 0}
    with running_engine(config) as engine:
        rollouts = collect(engine.generate(prompts, SamplingParams(**given)), spec)
    save_rollouts(rollouts, FILE, settings=SamplingSettings.of(config))


if __name__ == "__main__":
    main()
