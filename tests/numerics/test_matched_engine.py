"""Log-probabilities of a real batch-invariant engine, against a matched trainer: equal to the last bit."""

import functools
from unittest import mock

import pytest
import torch
from ranks import Ranks

pytestmark = [pytest.mark.gpu, pytest.mark.engine]


@pytest.fixture(scope="module")
def process():
    """Variables that cuBLAS reads once: a process that has not used CUDA."""
    ranks = Ranks(1, device="cpu", parents=True)
    yield ranks
    ranks.close()


def _differences(folder: str, kind: str) -> float:
    """The largest difference between a trainer's log-probabilities and an engine's, nats, of random tokens."""
    import vllm
    from test_matched_model import SIGMOID, SIZES, labels_of
    from transformers import AutoModelForCausalLM, Glm4MoeConfig, Qwen3Config, Qwen3MoeConfig

    import r3
    from r3 import numerics
    from r3.capture import collect, running_engine
    from r3.parallel import fused_head

    numerics.prepare()
    torch.manual_seed(0)
    sizes = SIZES | dict(vocab_size=512, hidden_size=512, head_dim=128, max_position_embeddings=1024)
    if kind == "moe":
        shape = Qwen3MoeConfig(
            num_experts=16, num_experts_per_tok=4, moe_intermediate_size=64, norm_topk_prob=True, **sizes
        )
    elif kind == "sigmoid":
        wide = dict(n_routed_experts=16, num_experts_per_tok=4, moe_intermediate_size=64, intermediate_size=256)
        shape = Glm4MoeConfig(**SIGMOID | sizes | wide)
    else:
        shape = Qwen3Config(intermediate_size=256, **sizes)
    made = AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16)
    with torch.no_grad():
        for name, tensor in made.state_dict().items():
            if name.endswith("bias"):  # of zeros they would hide where they are added
                tensor.normal_(std=0.1)
    made.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).cuda()
    replay = None if kind == "dense" else r3.attach(model)
    routed = str(kind != "dense").lower()
    engine = "generator.inference_engine"
    config = r3.R3Config.from_overrides(
        [
            f"trainer.policy.model.path={folder}",
            "trainer.policy.numerics=matched",
            f"trainer.policy.fsdp_config.moe_enable_routing_replay={routed}",
            f"trainer.diagnostics.alarms.enabled={routed}",
            f"{engine}.enable_return_routed_experts={routed}",
            f"{engine}.max_model_len=512",
            f"{engine}.enforce_eager=false",
            f"{engine}.gpu_memory_utilization=0.1",
            "generator.sampling_params.max_generate_length=300",
        ]
    )
    prompts = torch.randint(0, 512, (12, 40)).tolist()
    plain = functools.partial(vllm.LLM, skip_tokenizer_init=True)
    with mock.patch.object(vllm, "LLM", plain), running_engine(config) as llm:
        sampling = r3.capture.sampling_kwargs(config) | {"ignore_eos": True}
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        outputs = llm.generate(inputs, vllm.SamplingParams(**sampling), use_tqdm=False)
    batch = collect(outputs, replay.spec if replay is not None else None).batch(0)
    head = fused_head(model)
    numerics.match_engine(model, head)
    ids, mask = batch.input_ids.cuda(), batch.attention_mask.cuda()
    given = {"routed_experts": batch.routing} if replay is not None else {}
    with torch.no_grad():
        found = head.logprobs(
            model, labels_of(ids, mask.bool()), input_ids=ids, attention_mask=mask, use_cache=False, **given
        )
    apart = found[:, :-1] - batch.logprobs.cuda()[:, 1:]
    return apart[batch.response_mask[:, 1:].cuda()].abs().max().item()


@pytest.mark.parametrize("kind", ["moe", "sigmoid", "dense"])
def test_every_sampled_token_is_equal(process, tmp_path, kind):
    (largest,) = process.all(_differences, str(tmp_path), kind, timeout_s=400)
    assert largest == 0
