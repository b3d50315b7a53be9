"""Rollouts from a running `vllm serve` with the ordinary OpenAI client, ready to be replayed.

python examples/capture_openai.py serve        # prints the command that starts a server as capture needs it
python examples/capture_openai.py http://127.0.0.1:8000
"""

import shlex
import sys
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import openai
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import r3
from r3.capture import collect, handshake, request_fields, server_command
from r3.diagnostics import compare_logprobs
from r3.parallel import token_logprobs

MODEL = str(Path(__file__).parent / "chain_sum_moe")
QUESTIONS = ["12 + 7 = ", "93 - 5 = ", "41 + 41 - 8 = ", "8 + 60 = "]


def main(url: str) -> None:
    config = r3.R3Config.from_overrides(["generator.n_samples_per_prompt=4"], {"trainer.policy.model.path": MODEL})
    if url == "serve":
        print(shlex.join(server_command(config)))
        return
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    replay = r3.attach(model)
    handshake(url, replay.spec)  # raises, and says why, if capture does not work

    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
    name = client.models.list().data[0].id

    def ask(question: str) -> openai.types.Completion:
        # Token ids, not text: what is trained on is then what the engine saw.
        ids = tokenizer(question).input_ids
        return client.completions.create(model=name, prompt=ids, **request_fields(config))

    with ThreadPoolExecutor() as pool:
        requests = [pool.submit(ask, question) for question in QUESTIONS]
        wait(requests)
    rollouts = collect(requests, replay.spec, on_error="skip")  # what failed is in rollouts.failed
    batch = rollouts.batch(tokenizer.pad_token_id)

    labels = torch.where(batch.response_mask, batch.input_ids, -100)[:, 1:]
    for routing in (None, batch.routing):
        with torch.no_grad():
            logits = model(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                use_cache=False,
                **({} if routing is None else {"routed_experts": routing}),
            ).logits[:, :-1]
        found = compare_logprobs(token_logprobs(logits, labels), batch.logprobs[:, 1:], batch.response_mask[:, 1:])
        print(f"{'live' if routing is None else 'replayed':8} k3 {found['k3']:.2e} nats")


if __name__ == "__main__":
    main(sys.argv[1])
