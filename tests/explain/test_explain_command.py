"""`r3 explain` and `r3 compare` as commands: outcome in words and JSON, exit status, errors."""

import json
from dataclasses import replace

import pytest
import torch
from faulty_rollouts import demo_model, demo_prompts, rollouts_of, sample, with_rows_moved
from places import DEMO_MODEL

from r3.capture import Rollouts, SamplingSettings, save_rollouts
from r3.cli import main
from r3.diagnostics import RunFolder, compare_logprobs, compare_routing


@pytest.fixture(scope="module")
def model():
    return demo_model()


@pytest.fixture(scope="module")
def sequences(model):
    return sample(model, demo_prompts(24, 5), seed=5, length=40)


@pytest.fixture(scope="module")
def rollouts(model, sequences):
    return rollouts_of(model, sequences, version=3)


def run(capsys, *args) -> tuple[int, str]:
    """Exit status and what was printed."""
    try:
        main([str(arg) for arg in args])
        status = 0
    except SystemExit as stopped:
        status = stopped.code if isinstance(stopped.code, int) else 1
        if not isinstance(stopped.code, int):
            return status, str(stopped.code)
    return status, capsys.readouterr().out


def test_a_sound_file_ends_with_status_0(capsys, tmp_path, rollouts):
    file = save_rollouts(rollouts, tmp_path / "a", settings=SamplingSettings(temperature=1.0))
    status, out = run(capsys, "explain", "--model", DEMO_MODEL, "--rollout", file)
    assert status == 0
    assert out.startswith("nothing is wrong: ")
    assert "precision (nothing to do): what remains, k3 " in out
    assert "sampled tokens of 24 rollouts" in out


def test_a_fault_ends_with_status_1_and_json_has_everything(capsys, tmp_path, rollouts):
    file = save_rollouts(with_rows_moved(rollouts, 1), tmp_path / "a")
    status, out = run(capsys, "explain", "--model", DEMO_MODEL, "--rollout", file, "--json")
    outcome = json.loads(out)
    assert status == 1
    assert outcome["wrong"] is True
    assert outcome["verdict"] == "something is wrong: shifted rows"
    assert [cause["name"] for cause in outcome["causes"] if cause["name"] not in ("routing", "precision")] == [
        "shifted_rows"
    ]
    assert outcome["causes"][0]["figures"]["places"] == 1
    assert set(outcome["k3"]) == {"live", "replayed", "remaining", "precision"}
    assert outcome["tried"][0]["k3"] <= outcome["tried"][-1]["k3"]


def test_a_file_with_too_few_tokens_ends_with_status_1(capsys, tmp_path, rollouts):
    file = save_rollouts(replace(rollouts, items=rollouts.items[:2]), tmp_path / "a")
    status, out = run(capsys, "explain", "--model", DEMO_MODEL, "--rollout", file)
    assert status == 1
    assert out.startswith("cannot be told: ")


def test_the_same_tokens_are_compared_one_by_one_in_any_order(capsys, tmp_path, rollouts):
    other = Rollouts(
        [
            replace(item, logprobs=item.logprobs + 0.01 * torch.randn(len(item.logprobs)), routing=moved)
            for item, moved in zip(rollouts, with_rows_moved(rollouts, 1), strict=True)
            for moved in [moved.routing]
        ][::-1],
        rollouts.spec,
    )
    a, b = save_rollouts(rollouts, tmp_path / "a"), save_rollouts(other, tmp_path / "b")
    status, out = run(capsys, "compare", a, b, "--json")
    outcome = json.loads(out)
    assert status == 0
    assert outcome["verdict"] == "the same tokens in all 24 rollouts"
    pairs = list(zip(rollouts.items, other.items[::-1], strict=True))
    expected = compare_logprobs(
        torch.cat([x.logprobs for x, _ in pairs]),
        torch.cat([y.logprobs for _, y in pairs]),
        torch.cat([x.response_mask for x, _ in pairs]),
    )
    assert outcome["logprobs"]["tokens"] == expected["tokens"]
    assert outcome["logprobs"]["k3"] == pytest.approx(expected["k3"], rel=1e-9)
    routing = compare_routing(
        torch.cat([x.routing.expert_ids[0] for x, _ in pairs]),
        torch.cat([y.routing.expert_ids[0] for _, y in pairs]),
        torch.cat([(x.routing.valid & y.routing.valid)[0] for x, y in pairs]),
        layer_ids=rollouts.spec.layer_ids,
    )
    assert outcome["routing"]["differing_rows"] == pytest.approx(routing["differing_rows"], rel=1e-12)
    assert outcome["routing"]["differing_rows"] > 0.9
    assert outcome["a"]["versions"] == [3]
    status, out = run(capsys, "compare", a, b)
    assert out.startswith("the same tokens in all 24 rollouts\n")
    assert "differing_rows/layer_00" in out


def test_other_tokens_are_compared_by_averages(capsys, tmp_path, rollouts, model):
    other = rollouts_of(model, sample(model, demo_prompts(8, 6), seed=6, length=20), routed=False)
    a, b = save_rollouts(rollouts, tmp_path / "a"), save_rollouts(other, tmp_path / "b")
    status, out = run(capsys, "compare", a, b, "--json")
    outcome = json.loads(out)
    assert status == 0
    assert outcome["verdict"].startswith("other tokens")
    assert (outcome["logprobs"], outcome["routing"]) == ({}, {})
    assert (outcome["a"]["rollouts"], outcome["b"]["rollouts"]) == (24, 8)
    assert outcome["a"]["coverage"] == 1.0
    assert outcome["b"]["coverage"] is None
    total = sum(float(r.logprobs.double().sum()) for r in other)
    assert outcome["b"]["logprob_mean"] == pytest.approx(total / sum(len(r.token_ids) for r in other), rel=1e-9)
    assert outcome["notes"] == ["only one of the files has routing"]
    mixed = save_rollouts(Rollouts([*rollouts.items[:5], *other.items], rollouts.spec), tmp_path / "c")
    assert json.loads(run(capsys, "compare", a, mixed, "--json")[1])["verdict"].startswith(
        "the same tokens in 5 of 24 rollouts"
    )


def test_two_run_folders_are_given_to_the_report(capsys, tmp_path):
    for name in "ab":
        folder = RunFolder(tmp_path / name, {"seed": 1})
        folder.log(1, {"reward/mean": 0.5, "logprob_diff/live/k3": 1e-4})
    status, out = run(capsys, "compare", tmp_path / "a", tmp_path / "b")
    assert status == 0
    assert out.strip().endswith(".html")
    assert (tmp_path / "b" / out.strip().rpartition("/")[2]).is_file()


def test_what_does_not_go_together_is_refused(capsys, tmp_path, rollouts):
    file = save_rollouts(rollouts, tmp_path / "a")
    (tmp_path / "text").write_text("no rollouts")
    for args, message in (
        (["compare", file, tmp_path], "got a folder and a file"),
        (["compare", file, tmp_path / "gone"], "no such file or folder"),
        (["compare", file, tmp_path / "text"], "text: truncated, or no safetensors file"),
        (
            ["explain", "--model", DEMO_MODEL, "--rollout", tmp_path / "gone"],
            "expected a file of rollouts, found none",
        ),
        (["explain", "--model", tmp_path / "gone", "--rollout", file], "expected a checkpoint"),
    ):
        status, out = run(capsys, *args)
        assert status == 1
        assert out.startswith("r3: ")
        assert message in out, (args, out)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["compare"], "the following arguments are required: PATH"),
        (["compare", "a"], "the following arguments are required: PATH"),
        (["compare", "a", "b", "c"], "unrecognized arguments: c"),
        (["compare", "--model", "m", "--rollout", "f"], "the following arguments are required: PATH"),
        (["explain", "--model", "m"], "the following arguments are required: --rollout"),
        (["explain", "a", "--model", "m", "--rollout", "f"], "unrecognized arguments: a"),
    ],
)
def test_arguments_of_another_command_are_refused(capsys, args, message):
    with pytest.raises(SystemExit) as stopped:
        main(args)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
