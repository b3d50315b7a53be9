"""What hooks refuse, and what they rely on: all of it at once, with the reason and the cure."""

from types import SimpleNamespace

import pytest

from r3 import ConfigError, SyncError
from r3.capture import capture_kwargs
from r3.entry_points import joined_extension
from r3.weight_sync.worker import WeightSyncWorker
from trainer_hooks.support import Refusal, Seam, require_seams, require_supported

REFUSALS = [
    Refusal(setting="a", why="a is wrong", cure="Set b", found=lambda it: it.a),
    Refusal(setting="b", why="b is wrong", cure="Set a", found=lambda it: it.b),
]


class Trainer:
    def step(self, model, inputs, more=None): ...


class Extension:
    """Another project's worker extension."""

    def update_weights_from_ipc(self): ...


class Clashing:
    def r3_status(self): ...


def test_everything_that_is_refused_is_named_with_its_cure():
    require_supported("T", REFUSALS, SimpleNamespace(a=False, b=False))
    with pytest.raises(ConfigError) as raised:
        require_supported("T", REFUSALS, SimpleNamespace(a=True, b=True))
    assert "a: a is wrong. Set b" in str(raised.value)
    assert "b: b is wrong. Set a" in str(raised.value)


def test_a_seam_is_there_with_its_first_parameters():
    require_seams("pytest", "9", [Seam(where="Trainer.step", target=Trainer.step, parameters=("model", "inputs"))])
    with pytest.raises(ConfigError) as raised:
        require_seams(
            "pytest",
            "9",
            [
                Seam(where="Trainer.step", target=Trainer.step, parameters=("inputs",)),
                Seam(where="Trainer.gone", target=getattr(Trainer, "gone", None)),
            ],
        )
    assert "Trainer.step: expected parameters inputs, got model, inputs, more" in str(raised.value)
    assert "Trainer.gone: not there" in str(raised.value)
    assert f"pytest {pytest.__version__}: it has moved" in str(raised.value)


def test_worker_extensions_are_joined_as_vllm_asks_for_them():
    from vllm.utils.import_utils import resolve_obj_by_qualname

    name = joined_extension(f"{__name__}.Extension")
    assert capture_kwargs(worker_extension_cls=f"{__name__}.Extension")["worker_extension_cls"] == name
    joined = resolve_obj_by_qualname(name)
    assert issubclass(joined, WeightSyncWorker)
    assert joined.update_weights_from_ipc is Extension.update_weights_from_ipc
    with pytest.raises(SyncError, match=r"Clashing: .*r3_status in both"):
        resolve_obj_by_qualname(joined_extension(f"{__name__}.Clashing"))


def test_capture_can_be_left_out():
    kwargs = capture_kwargs(capture=False)
    assert kwargs["enable_return_routed_experts"] is False
    assert "scheduler_cls" not in kwargs
    assert "model" not in capture_kwargs()
