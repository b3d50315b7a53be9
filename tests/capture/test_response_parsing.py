"""The command line and the request's fields that capture over HTTP needs stay in step with the offline engine's."""

import asyncio
import base64
import dataclasses
import importlib
import inspect
import io
import json
from concurrent.futures import Future
from dataclasses import fields
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from places import DEMO_MODEL
from test_collect import FIELDS, SPEC, WRONG, is_good, output, rows

import r3
from r3.capture import collect, engine_kwargs, request_fields, sampling_kwargs, server_args, server_command
from r3.capture.handshake import _require
from r3.vllm_compat.capture import routing_survives_merging
from r3.vllm_compat.server import ARGUMENTS, first_module

CERTAIN = [{token: SimpleNamespace(logprob=0.0)} for token in (5, 6, 7)]


@pytest.fixture(scope="module")
def parsed():
    """vLLM's engine arguments as its own parser makes them of a command line."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    make_arg_parser = importlib.import_module(first_module(ARGUMENTS)).make_arg_parser

    def parse(args: list[str]):
        found = make_arg_parser(FlexibleArgumentParser()).parse_args(args)
        found.model = found.model_tag or found.model  # as `vllm serve` does
        return AsyncEngineArgs.from_cli_args(found), found

    return parse


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["generator.inference_engine.max_model_len=256", "trainer.seed=7"],
        [
            "generator.inference_engine.enable_return_routed_experts=false",
            "trainer.policy.fsdp_config.moe_enable_routing_replay=false",
            "generator.inference_engine.enforce_eager=false",
        ],
    ],
)
def test_the_server_gets_what_the_offline_engine_gets(parsed, overrides):
    from vllm.engine.arg_utils import EngineArgs

    config = r3.R3Config.from_overrides(overrides, {"trainer.policy.model.path": str(DEMO_MODEL)})
    args = server_args(config)
    server, of_server = parsed(args)
    offline = EngineArgs(**engine_kwargs(config))
    names = {field.name for field in fields(EngineArgs)} - {"generation_config"}

    def set_apart(args, plain) -> dict:
        return {name: getattr(args, name) for name in names if getattr(args, name) != getattr(plain, name)}

    asked = set_apart(offline, EngineArgs(model=str(DEMO_MODEL)))
    assert len(asked) > 5
    assert set_apart(server, parsed([str(DEMO_MODEL)])[0]) == asked
    assert server.model == offline.model
    # A model's own top_k, top_p or temperature fill nothing in.
    assert server.generation_config == "vllm"
    assert of_server.enable_scale_out
    # Also where the command `vllm` cannot run.
    _, _, module, *rest = server_command(config)
    found = parsed(rest[1:] if module.endswith("cli.main") else rest)[1]  # the command's "serve"
    assert found.model == str(DEMO_MODEL)


def test_requests_ask_for_what_the_offline_engine_is_asked(demo_config):
    asked = sampling_kwargs(demo_config)
    completions = request_fields(demo_config)
    extra = completions.pop("extra_body")
    # These routes answer with text, and with an object a token, whatever is asked.
    assert (
        completions | {name: extra[name] for name in ("top_k", "min_p")} | {"flat_logprobs": True, "detokenize": False}
        == asked
    )
    assert extra == {"top_k": -1, "min_p": 0.0, "return_token_ids": True, "return_tokens_as_token_ids": True}
    chat = request_fields(demo_config, "chat", 5)
    assert (chat["logprobs"], chat["top_logprobs"]) == (True, asked["logprobs"])
    assert chat["extra_body"]["routed_experts_prompt_start"] == 5
    assert request_fields(demo_config, "generate", 5) == {
        "sampling_params": asked | {"routed_experts_prompt_start": 5},
        "return_token_ids": True,
    }


def test_every_field_is_one_that_vllm_and_the_client_know(demo_config):
    from openai.resources import Completions
    from openai.resources.chat import Completions as ChatCompletions
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.entrypoints.scale_out.token_in_token_out.protocol import GenerateRequest

    for route, client, request in (
        ("completions", Completions, CompletionRequest),
        ("chat", ChatCompletions, ChatCompletionRequest),
    ):
        asked = request_fields(demo_config, route, 3)
        assert set(asked) <= set(inspect.signature(client.create).parameters)
        assert set(asked["extra_body"]) <= set(request.model_fields)
    made = GenerateRequest(token_ids=[1], **json.loads(json.dumps(request_fields(demo_config, "generate", 3))))
    assert made.sampling_params.logprobs == 0


def test_a_route_that_is_none_is_refused(demo_config):
    with pytest.raises(r3.ConfigError, match="expected one of completions, chat, generate, got 'responses'"):
        request_fields(demo_config, "responses")
    with pytest.raises(r3.ConfigError, match="prompt_start: expected 0 or more, got -1"):
        request_fields(demo_config, prompt_start=-1)


def test_failed_requests_are_listed_and_the_rest_is_kept():
    async def fail():
        raise TimeoutError("no answer in 5 s")

    async def answer():
        return output(rows())

    async def both():
        return await asyncio.gather(fail(), answer(), return_exceptions=True)

    kept = collect(asyncio.run(both()), SPEC, on_error="skip", weight_version=[1, 2])
    assert [rollout.prompt_index for rollout in kept] == [1]
    assert [rollout.weight_version for rollout in kept] == [2]
    assert kept.failed == {0: "sample 0 (prompt 0): the request failed with TimeoutError: no answer in 5 s"}
    running, cancelled, done = Future(), Future(), Future()
    cancelled.cancel()
    done.set_result(output(rows()))
    kept = collect([running, cancelled, done], SPEC, on_error="skip")
    assert len(kept) == 1
    assert "still running" in kept.failed[0]
    assert "was cancelled" in kept.failed[1]
    with pytest.raises(r3.CaptureError, match="expected one for each of 2 responses, got 1"):
        collect([output(rows())] * 2, SPEC, weight_version=[1])


def choice(array: np.ndarray | None, **changes) -> dict:
    """A choice of `/v1/completions`."""
    file = io.BytesIO()
    if array is not None:
        np.save(file, array)
    return {
        "token_ids": [5, 6, 7],
        "prompt_token_ids": [1, 2, 3, 4],
        "logprobs": {"tokens": ["a", "b", "c"], "token_logprobs": [-0.5, -0.6, -0.7]},
        "routed_experts": base64.b64encode(file.getvalue()).decode() if array is not None else None,
        "finish_reason": "length",
    } | changes


def test_log_probabilities_that_name_tokens_by_number_are_compared():
    """As `/inference/v1/generate` of vLLM 0.32 does, which this environment's version does not."""
    content = [{"token_id": token, "logprob": -0.1 * token} for token in (5, 6, 7)]
    found = collect([{"choices": [choice(rows(), logprobs={"content": content})]}], SPEC).items[0]
    torch.testing.assert_close(found.logprobs, torch.tensor([-0.5, -0.6, -0.7]))
    content[1]["token_id"] = 8
    with pytest.raises(r3.CaptureError, match="sampled token 1 is 6, but its log-probability is of token 8"):
        collect([{"choices": [choice(rows(), logprobs={"content": content})]}], SPEC)


def test_a_prompt_that_the_server_does_not_return_may_be_put_into_the_response():
    response = {"request_id": "a", "choices": [choice(rows(), prompt_token_ids=None)]}
    with pytest.raises(r3.CaptureError, match=r"no prompt_token_ids.*put the ids that were sent into the response"):
        collect([response], SPEC)
    assert collect([response | {"prompt_token_ids": [1, 2, 3, 4]}], SPEC).items[0].prompt_ids == [1, 2, 3, 4]


def one(rollout):
    """Its first token, and as if that had been token 1."""
    return dataclasses.replace(rollout.truncate(max_response_length=1), token_ids=[1])


def test_a_handshake_refuses_log_probabilities_of_another_distribution():
    """Seen with a server of logprobs_mode=raw_logprobs: -11.7 where one token alone was allowed."""
    greedy, forced = collect([output(rows()), output(rows(), logprobs=CERTAIN)], SPEC)
    _require(greedy, one(forced), [1, 2, 3, 4], 3, SPEC)
    with pytest.raises(r3.CaptureError, match=r"expected 0, got -0.5000. .*logprobs_mode=processed_logprobs"):
        _require(greedy, one(greedy), [1, 2, 3, 4], 3, SPEC)
    with pytest.raises(r3.CaptureError, match=r"expected those that were sent, \[9\], got \[1, 2, 3, 4\]"):
        _require(greedy, forced, [9], 3, SPEC)


def test_a_handshake_refuses_rows_of_one_slot_that_are_all_zero():
    spec = dataclasses.replace(SPEC, top_k=1)
    (greedy,) = collect([output(rows()[..., :1] * 0, logprobs=CERTAIN)], spec)
    with pytest.raises(r3.CaptureError, match=r"expert 0 in all 3 layers for all 6 tokens: nothing was captured"):
        _require(greedy, one(greedy), [1, 2, 3, 4], 3, spec)


def test_an_aborted_choice_keeps_the_rows_that_came():
    choices = [choice(array, finish_reason="abort") for array in (rows()[:5], None)]
    some, none = collect([{"choices": choices}], SPEC)
    assert some.routing.valid.tolist() == [[True] * 5 + [False] * 2]
    assert np.array_equal(some.routing.expert_ids[0, :5].numpy(), rows()[:5])
    assert not none.routing.valid.any()
    assert none.token_ids == [5, 6, 7]


def test_versions_that_the_server_tells_are_those_of_the_rows():
    """As `/inference/v1/generate` of vLLM 0.32 does."""
    spans = [{"version": "3", "start": 0, "end": 1}, {"version": "4", "start": 1, "end": 3}]
    (spanning,) = collect([{"choices": [choice(rows(), weight_versions=spans)]}], SPEC)
    assert spanning.row_versions.tolist() == [3, 3, 3, 3, 4, 4, -1]
    with pytest.raises(r3.CaptureError, match="weight_versions: expected spans"):
        collect([{"choices": [choice(rows(), weight_versions=[{"version": 3}])]}], SPEC)


def test_a_part_of_a_stream_that_nobody_read_keeps_the_routing_of_the_last():
    """As vLLM's server hands out a stream's parts: what comes while one is not read yet is added to it."""
    from vllm.outputs import CompletionOutput, RequestOutput
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.output_processor import RequestOutputCollector

    def merged() -> RequestOutput:
        collector = RequestOutputCollector(RequestOutputKind.DELTA, "request")
        for token, routing in ((1, None), (2, rows())):
            part = CompletionOutput(0, str(token), [token], 0.0, None, routing, "stop" if token == 2 else None)
            collector.put(RequestOutput("request", None, [7, 8], None, [part], finished=token == 2))
        return asyncio.run(collector.get())

    add = RequestOutput.add
    with routing_survives_merging():
        (part,) = merged().outputs
        assert part.token_ids == [1, 2]
        assert np.array_equal(part.routed_experts, rows())
    assert RequestOutput.add is add


def test_the_server_keeps_the_routing_of_streams_while_it_runs(parsed):
    from starlette.applications import Starlette
    from starlette.testclient import TestClient
    from vllm.outputs import RequestOutput

    config = r3.R3Config.from_overrides([], {"trainer.policy.model.path": str(DEMO_MODEL)})
    _, front = parsed(server_args(config))
    (path,) = front.middleware
    module, name = path.rsplit(".", 1)
    app, add = Starlette(), RequestOutput.add
    app.add_middleware(getattr(importlib.import_module(module), name))
    with TestClient(app) as client:
        assert RequestOutput.add is not add
        assert client.get("/").status_code == 404
    assert RequestOutput.add is add


def test_choices_come_in_the_order_of_their_index():
    arrays = [rows(seed) for seed in range(3)]
    prompts = [[1, 2, 3, 4], [1, 2, 3, 4], [4, 3, 2, 1]]
    choices = [choice(a, index=i, prompt_token_ids=p) for i, (a, p) in enumerate(zip(arrays, prompts, strict=True))]
    stream = [
        {"prompt_token_ids": [1, 2, 3, 4], "choices": [part]}
        for i in (2, 0, 1)
        for part in (
            {"index": i, "token_ids": [5], "logprobs": {"content": [{"logprob": -0.5, "token": "a"}]}},
            {
                "index": i,
                "token_ids": [6, 7],
                "logprobs": {"content": [{"logprob": -0.6, "token": "b"}, {"logprob": -0.7, "token": "c"}]},
                "finish_reason": "stop",
                "routed_experts": choices[i]["routed_experts"],
            },
        )
    ]
    for response in ({"choices": [choices[2], choices[0], choices[1]]}, stream):
        found = collect([response], SPEC)
        for rollout, array in zip(found, arrays, strict=True):
            assert np.array_equal(rollout.routing.expert_ids[0, :-1].numpy(), array)
    assert [rollout.prompt_index for rollout in collect([{"choices": choices[::-1]}], SPEC)] == [0, 0, 1]
    kept = collect([{"choices": [choices[0], choices[1] | {"index": 2}, choices[2]]}], SPEC, on_error="skip")
    assert len(kept) == 1
    assert all("2 choices have the index 2" in problem for problem in kept.failed.values())
    assert sorted(kept.failed) == [1, 2]


@pytest.mark.parametrize("field", [*FIELDS, "prompt_token_ids", "index", "choice", "choices", "response"])
def test_what_is_wrong_with_one_choice_costs_no_other(field):
    for value in WRONG:
        choices = [choice(rows(), index=3 * i) for i in range(3)]
        bad: object = {"choices": choices}
        if field == "choice":
            choices[1] = value
        elif field == "choices":
            bad = {"choices": value}
        elif field == "response":
            bad = value
        else:
            choices[1][field] = value
        kept = collect([{"choices": [choice(rows())]}, bad, output(rows())], SPEC, on_error="skip")
        good = [rollout for rollout in kept if is_good(rollout)]
        assert len(good) >= (2 if field in ("choices", "response") else 4), value
        assert kept.batch(0).routing.shape[0] == len(kept), value


def test_one_choice_of_a_stream_without_its_end_costs_no_other():
    def part(index: int, **changes) -> dict:
        return {"prompt_token_ids": [1, 2, 3, 4], "choices": [choice(rows(), index=index) | changes]}

    content = {"content": [{"token": name, "logprob": -0.5} for name in "abc"]}
    chunks = [part(i, logprobs=content, **({"finish_reason": None} if i == 1 else {})) for i in range(3)]
    kept = collect([chunks], SPEC, on_error="skip")
    assert len(kept) == 2
    assert "has no end for choices [1]: the connection or the server was lost" in kept.failed[1]


def test_routing_may_come_as_lists_and_a_prompt_as_an_array():
    response = {"prompt_token_ids": np.array([1, 2, 3, 4]), "choices": [choice(None, prompt_token_ids=None)]}
    response["choices"][0]["routed_experts"] = rows().tolist()
    assert is_good(collect([response], SPEC).items[0])
