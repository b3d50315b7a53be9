"""Capture over HTTP from a real server, with the ordinary OpenAI client: all routes, and what goes wrong on the way.

One server for all tests of the file; the last one kills it.
"""

import contextlib
import copy
import dataclasses
import time
from concurrent.futures import Future, ThreadPoolExecutor, wait

import httpx
import openai
import pytest
import torch
import vllm
from models import tiny_moe
from places import DEMO_MODEL
from vllm_server import running_server

import r3
from r3.capture import Rollout, Rollouts, collect, handshake, request_fields
from r3.diagnostics import compare_logprobs
from r3.doctor import examine
from r3.parallel import fused_head, token_logprobs

pytestmark = pytest.mark.engine

GREEDY = {"temperature": 0.0, "n": 1}


@pytest.fixture(scope="module")
def config():
    return r3.R3Config.from_overrides(
        ["generator.n_samples_per_prompt=4", "generator.sampling_params.max_generate_length=32"],
        {"trainer.policy.model.path": str(DEMO_MODEL)},
    )


@pytest.fixture(scope="module")
def server(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    template = folder / "template.jinja"
    template.write_text("{% for message in messages %}{{ message['content'] }}{% endfor %}")
    with running_server(config, folder, "--chat-template", str(template), "--max-logprobs", "54") as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=120, max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def model(client):
    return client.models.list().data[0].id


@pytest.fixture(scope="module")
def trainer():
    """The trainer's model with replay attached."""
    from transformers import AutoModelForCausalLM

    made = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32).eval()
    return made, r3.attach(made)


@pytest.fixture(scope="module")
def spec(trainer):
    return trainer[1].spec


def prompts(count: int, length: int = 24) -> list[list[int]]:
    return torch.randint(2, 300, (count, length), generator=torch.Generator().manual_seed(0)).tolist()


def generate(server, body: dict, timeout: float = 120):
    """A request of the token-in/token-out route: its response, or the lines of its stream."""
    url = f"{server.url}/inference/v1/generate"
    if not body.get("stream"):
        return httpx.post(url, json=body, timeout=timeout).json()
    with httpx.stream("POST", url, json=body, timeout=timeout) as response:
        return list(response.iter_lines())


def ask(server, client, model: str, config, route: str, prompt: list[int], prompt_start: int = 0, **changes):
    """One request on `route`; "stream" is the token-in/token-out route, streamed. `changes` of sampling."""
    if route == "completions":
        return client.completions.create(
            model=model, prompt=prompt, **request_fields(config, "completions", prompt_start) | changes
        )
    fields = request_fields(config, "generate", prompt_start)
    # Streams of several samples end in "list index out of range" in vLLM 0.30 (and 0.26 by its source, not 0.32).
    fields["sampling_params"] |= ({"n": 1} if route == "stream" else {}) | changes
    return generate(server, {"token_ids": prompt, "stream": route == "stream"} | fields)


def gap(trainer, rollouts: Rollouts, shift: int = 0) -> float:
    """k3 between the trainer, with routing moved by `shift` positions, and the engine."""
    model, _ = trainer
    batch = rollouts.batch(pad_token_id=0)
    routing = batch.routing
    if shift:
        ids = routing.expert_ids.roll(shift, dims=1)
        routing = r3.RolloutRouting(ids, routing.valid & (ids.sum((2, 3)) > 0), routing.layer_ids, routing.num_experts)
    with torch.no_grad():
        logits = model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, routed_experts=routing, use_cache=False
        ).logits
    labels = torch.where(batch.response_mask, batch.input_ids, -100)[:, 1:]
    found = token_logprobs(logits[:, :-1], labels)
    return compare_logprobs(found, batch.logprobs[:, 1:], batch.response_mask[:, 1:])["k3"]


def require_lined_up(trainer, rollouts: Rollouts) -> None:
    """Rows, tokens and log-probabilities are of each other: one position off, the gap is a hundred times larger."""
    right = gap(trainer, rollouts)
    assert 0 < right < 1e-2
    assert gap(trainer, rollouts, shift=1) > 100 * right


@pytest.mark.parametrize("route", ["completions", "generate", "stream"])
def test_replayed_rows_of_a_route_give_the_engines_logprobs(server, client, model, config, trainer, route):
    with ThreadPoolExecutor() as pool:
        asked = [pool.submit(ask, server, client, model, config, route, prompt) for prompt in prompts(8)]
    rollouts = collect(asked, trainer[1].spec, weight_version=range(8))
    samples = 1 if route == "stream" else 4
    assert [rollout.prompt_index for rollout in rollouts] == [index for index in range(8) for _ in range(samples)]
    assert [rollout.weight_version for rollout in rollouts] == [rollout.prompt_index for rollout in rollouts]
    assert [rollout.prompt_ids for rollout in rollouts.items[::samples]] == prompts(8)
    assert all(rollout.routing.rows_valid == len(rollout) - 1 for rollout in rollouts)
    assert all(len(rollout.token_ids) == 32 or rollout.finish_reason == "stop" for rollout in rollouts)
    require_lined_up(trainer, rollouts)


def test_chat_gives_the_tokens_of_its_template(client, model, config, trainer):
    from transformers import AutoTokenizer

    texts = [f"{a} + {b} = " for a, b in ((12, 7), (93, 5), (41, 41), (8, 60))]
    responses = [
        client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": text}], **request_fields(config, "chat")
        )
        for text in texts
    ]
    rollouts = collect(responses, trainer[1].spec)
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    assert [rollout.prompt_ids for rollout in rollouts.items[::4]] == [tokenizer(text).input_ids for text in texts]
    require_lined_up(trainer, rollouts)


@pytest.mark.parametrize("route", ["completions", "generate", "stream", "chat"])
def test_every_route_gives_the_ids_that_tokens_were_sampled_from(server, client, model, trainer, route):
    pairs = ["n_samples_per_prompt=4", "sampling_params.max_generate_length=32", "sampling_params.top_k=50"]
    config = r3.R3Config.from_overrides(
        [f"generator.{pair}" for pair in [*pairs, "sampling_params.top_p=0.8"]],
        {"trainer.policy.model.path": str(DEMO_MODEL)},
    )
    if route == "chat":
        message = {"role": "user", "content": "12 + 7 = "}
        fields = request_fields(config, "chat") | {"seed": 0}
        asked = [client.chat.completions.create(model=model, messages=[message], **fields)]
    else:
        count = 8 if route == "stream" else 2  # of one sample or four: as many tokens
        asked = [ask(server, client, model, config, route, prompt, seed=0) for prompt in prompts(count)]
    batch = collect(asked, trainer[1].spec, sampling_mask=True).batch(0)
    labels = torch.where(batch.response_mask, batch.input_ids, -100).roll(-1, 1)
    mask = batch.sampling_mask
    mask = mask.take(mask.positions().roll(-1, 1).masked_fill(labels == -100, -1))
    head = fused_head(trainer[0])
    with contextlib.ExitStack() as stack, torch.no_grad():
        stack.callback(head.detach)
        found = head.logprobs(
            trainer[0],
            labels,
            sampling_mask=mask,
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            routed_experts=batch.routing,
            use_cache=False,
        )[:, :-1]
    theirs, sampled = batch.logprobs[:, 1:], batch.response_mask[:, 1:]
    sizes = batch.sampling_mask.sizes[batch.response_mask]
    assert 1 <= int(sizes.min()) < int(sizes.max()) <= 50
    # The trainer's weights are float32: 0.01 to 0.03 apart; over the vocabulary 0.08 to 0.16.
    assert compare_logprobs(found, theirs, sampled)["abs_mean"] < 0.05
    assert not found[sampled][sizes == 1].any()
    assert not theirs[sampled][sizes == 1].any()


def test_prompts_of_one_request_are_told_apart(client, model, config, trainer):
    response = client.completions.create(model=model, prompt=prompts(3), **request_fields(config))
    rollouts = collect([response, response.to_dict(), response.to_json()], trainer[1].spec)
    assert [rollout.prompt_index for rollout in rollouts] == [index for index in range(9) for _ in range(4)]
    assert [rollout.prompt_ids for rollout in rollouts.items[::4]] == prompts(3) * 3


def same(a: Rollout, b: Rollout) -> bool:
    return (
        a.prompt_ids == b.prompt_ids
        and a.token_ids == b.token_ids
        and torch.equal(a.logprobs, b.logprobs)
        and torch.equal(a.routing.expert_ids, b.routing.expert_ids)
        and torch.equal(a.routing.valid, b.routing.valid)
    )


def test_a_greedy_request_gives_the_same_rows_on_every_route(server, client, model, config, spec):
    (prompt,) = prompts(1)
    routes = ["completions", "completions", "generate", "stream"]
    responses = [ask(server, client, model, config, route, prompt, **GREEDY) for route in routes]
    first, *others = collect(responses, spec)
    assert all(same(first, other) for other in others)


@pytest.mark.parametrize("route", ["completions", "generate", "stream"])
def test_prompt_start_leaves_rows_out_and_the_rest_is_the_same(server, client, model, config, spec, route):
    (prompt,) = prompts(1)
    whole = collect([ask(server, client, model, config, route, prompt, **GREEDY)], spec).items[0]
    response = ask(server, client, model, config, route, prompt, 17, **GREEDY)
    rest = collect([response], spec, prompt_start=17).items[0]
    assert rest.token_ids == whole.token_ids
    assert rest.routing.valid[0].tolist() == [False] * 17 + [True] * (len(rest) - 18) + [False]
    assert torch.equal(rest.routing.expert_ids[:, 17:], whole.routing.expert_ids[:, 17:])
    assert rest.routing.rows_valid == whole.routing.rows_valid - 17
    with pytest.raises(r3.CaptureError, match=rf"= \({len(rest) - 1}, 8, 4\), got uint8 \({len(rest) - 18}, 8, 4\)"):
        collect([response], spec)


def test_a_server_that_ignores_prompt_start_sends_all_rows_and_they_are_kept(server, client, model, config, spec):
    (prompt,) = prompts(1)
    response = ask(server, client, model, config, "completions", prompt, **GREEDY)
    assert same(collect([response], spec, prompt_start=17).items[0], collect([response], spec).items[0])


def test_what_a_request_leaves_out_is_named_with_its_field(client, model, config, spec):
    fields = request_fields(config)

    def asked(**changes):
        return client.completions.create(model=model, prompt=prompts(1)[0], **fields | changes)

    extra = fields["extra_body"]
    with pytest.raises(r3.CaptureError, match="return_token_ids=True"):
        collect([asked(extra_body=extra | {"return_token_ids": False})], spec)
    with pytest.raises(r3.CaptureError, match=r"logprobs=0 \(completions\)"):
        collect([asked(logprobs=None)], spec)
    with pytest.raises(r3.CaptureError, match=r"each of 32 sampled tokens, got 56 .*echo=True"):
        collect([asked(extra_body=extra | {"ignore_eos": True}, echo=True)], spec)


@pytest.mark.parametrize("route", ["completions", "chat"])
def test_a_stream_of_an_openai_route_says_where_its_routing_is(client, model, config, spec, route):
    if route == "completions":
        fields = request_fields(config) | {"stream": True}
        chunks = list(client.completions.create(model=model, prompt=prompts(1)[0], **fields))
    else:
        fields = request_fields(config, "chat") | {"stream": True}
        chunks = list(
            client.chat.completions.create(model=model, messages=[{"role": "user", "content": "1"}], **fields)
        )
    with pytest.raises(r3.CaptureError, match=r"only without streaming.*stream=False.*/inference/v1/generate"):
        collect([chunks], spec)


def test_what_the_server_refuses_is_told_in_its_words(server, spec):
    with pytest.raises(r3.CaptureError, match=r"answered with an error:[\s\S]*sampling_params"):
        collect([generate(server, {"token_ids": [5]})], spec)


@pytest.fixture(scope="module")
def response(client, model, config):
    """A response that is right, as a dictionary to break."""
    return client.completions.create(model=model, prompt=prompts(1)[0], **request_fields(config)).to_dict()


def without(choice: dict, name: str) -> None:
    del choice[name]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda choice: choice.update(routed_experts="garbage!"), "expected base64"),
        (lambda choice: choice.update(routed_experts=17), "expected base64 text, got int"),
        (lambda choice: choice.update(routed_experts=choice["routed_experts"][:-8]), "expected .* bytes"),
        (lambda choice: choice.update(routed_experts=None), "null.*--enable-return-routed-experts"),
        (lambda choice: without(choice, "routed_experts"), "no field routed_experts"),
        (lambda choice: choice["token_ids"].pop(), "each of .* sampled tokens"),
        (lambda choice: choice["token_ids"].reverse(), "is of token"),
        (lambda choice: choice.update(token_ids=["a"]), "expected a list of integers"),
        (lambda choice: choice["logprobs"]["token_logprobs"].__setitem__(3, -9999.0), r"sampled tokens \[3\]"),
        (lambda choice: choice["logprobs"]["token_logprobs"].__setitem__(3, 7.5), "processed_logprobs"),
        (lambda choice: choice.update(logprobs="text"), "logprobs: expected those of"),
    ],
)
def test_a_choice_that_is_wrong_is_listed_and_the_others_are_kept(response, spec, change, message):
    broken = copy.deepcopy(response)
    change(broken["choices"][2])
    with pytest.raises(r3.CaptureError, match=rf"1 of 4 samples:\s+sample 2 \(prompt 0, completion 2\).*{message}"):
        collect([broken], spec)
    kept = collect([broken], spec, on_error="skip")
    assert len(kept) == 3
    assert list(kept.failed) == [2]


def test_a_response_that_is_none_is_listed_and_the_others_are_kept(response, spec):
    kept = collect(["<html>bad gateway</html>", response, ValueError("no route")], spec, on_error="skip")
    assert [rollout.prompt_index for rollout in kept] == [1, 1, 1, 1]
    assert "expected a response in JSON, got '<html>" in kept.failed[0]
    assert "the request failed with ValueError: no route" in kept.failed[5]


def test_another_model_behind_the_url_is_seen(response, spec):
    for other, expected in (
        (dataclasses.replace(spec, layer_ids=tuple(range(6)), num_layers=6), r", 6, 4\), got uint8 \(.*, 8, 4\)"),
        (dataclasses.replace(spec, top_k=8), r", 8, 8\), got uint8 \(.*, 8, 4\)"),
        (dataclasses.replace(spec, num_experts=16), r"distinct expert ids in \[0, 16\)"),
        (dataclasses.replace(spec, layer_ids=tuple(range(1, 8))), r"layers \[0\] are routed in the engine"),
    ):
        with pytest.raises(r3.CaptureError, match=expected):
            collect([response], other)


def test_a_handshake_says_what_works(server, model, spec):
    found = handshake(f"{server.url}/v1/", spec)
    assert (found.prompt_tokens, found.sampled_tokens, found.rows) == (7, 4, 10)
    assert (found.layers, found.decoder_layers, found.experts, found.top_k) == (8, 8, 32, 4)
    assert found.vllm_version == vllm.__version__
    assert found.model == model
    assert found.seconds > 0


def test_a_handshake_says_what_does_not(server, spec):
    for other, message in (
        (dataclasses.replace(spec, top_k=8), r"= \(10, 8, 8\), got uint8 \(10, 8, 4\)"),
        (dataclasses.replace(spec, layer_ids=tuple(range(1, 8))), r"layers \[0\] are routed in the engine"),
    ):
        with pytest.raises(r3.CaptureError, match=rf"handshake with {server.url}: [\s\S]*{message}"):
            handshake(server.url, other)
    with pytest.raises(r3.CaptureError, match="answered with status 400"):
        handshake(server.url, spec, prompt_ids=[100_000])
    with pytest.raises(r3.CaptureError, match=r"no answer from .*/version: .*Is the server up"):
        handshake("http://127.0.0.1:9", spec)
    with pytest.raises(r3.CaptureError, match="expected http://host:port, got 'localhost:8000'"):
        handshake("localhost:8000", spec)


def test_doctor_checks_a_server_with_the_trainers_model(server, config, monkeypatch):
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)  # of which it warns, rightly
    checks = {check.name: check for check in examine(config, url=server.url)}
    told = {name: check.status for name, check in checks.items() if check.status != "ok"}
    # The control routes alone are not there: nothing here asks for them.
    assert told == {"server routes": "warning"}
    assert "VLLM_SERVER_DEV_MODE=1" in checks["server routes"].detail
    assert "token-in" not in checks["server routes"].detail
    assert checks["server capture"].detail.startswith("10 rows of 8 layers, 4 sampled tokens")


def test_doctor_sees_that_the_server_has_another_model(server, tmp_path):
    tiny_moe().save_pretrained(tmp_path)
    other = r3.R3Config.from_overrides([], {"trainer.policy.model.path": str(tmp_path)})
    capture = {check.name: check for check in examine(other, url=server.url)}["server capture"]
    assert capture.status == "problem"
    assert "= (10, 3, 2), got uint8 (10, 8, 4)" in capture.detail


def test_doctor_without_a_model_does_not_check_routing(server):
    checks = {check.name: check for check in examine(r3.R3Config(), url=server.url)}
    assert (checks["server"].status, checks["server capture"].status) == ("ok", "warning")
    assert "--model" in checks["server capture"].remedy


def test_a_stream_that_breaks_off_is_refused(server, config, spec):
    fields = request_fields(config, "generate")
    fields["sampling_params"] |= {"n": 1, "ignore_eos": True}
    url = f"{server.url}/inference/v1/generate"
    with httpx.stream("POST", url, json={"token_ids": [5], "stream": True} | fields, timeout=120) as answer:
        lines = list(answer.iter_lines())
    assert len(collect([lines], spec)) == 1
    with pytest.raises(r3.CaptureError, match=r"has no end for choices .*the server was lost"):
        collect([lines[: len(lines) // 2]], spec)


def test_a_server_that_dies_in_a_request_costs_that_request_alone(server, client, model, config, spec):
    """The last test of the file: it kills the server."""
    done: Future = Future()
    done.set_result(ask(server, client, model, config, "completions", prompts(1)[0]))
    long = request_fields(config) | {"max_tokens": 480, "n": 128}
    long["extra_body"] |= {"ignore_eos": True}
    with ThreadPoolExecutor() as pool:
        asked = [done, pool.submit(client.completions.create, model=model, prompt=prompts(1)[0], **long)]
        time.sleep(0.2)  # of the many seconds that it takes
        server.kill()
        wait(asked, timeout=60)
    kept = collect(asked, spec, on_error="skip")
    assert len(kept) == 4
    assert "the request failed with APIConnectionError" in kept.failed[4]
    with pytest.raises(r3.CaptureError, match=r"(?s)1 of 5 samples:.*APIConnectionError"):
        collect(asked, spec)
