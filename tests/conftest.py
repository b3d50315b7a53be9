"""Settings that must stand before torch and transformers are imported, and the one real engine of the tests."""

import contextlib
import os
from pathlib import Path

import hypothesis
import pytest
from places import DEMO_MODEL, IMPORTED

from trainer_hooks.support import installed_version

# No test may depend on a model hub: all models are made in the test or shipped with the examples.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
# pytest has touched CUDA by the time that an engine starts, where there is a GPU: a fork of it could not use it.
os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
# Test tensors are small: more threads gain nothing, and those that wait for each other keep the cores from other tests.
SIDE_BY_SIDE = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
THREADS = min(4, max(1, (os.cpu_count() or 1) // SIDE_BY_SIDE))

# A trainer's tests run where that trainer is installed (`make test-trl`). Asked by distribution, since folders of these
# names could be imported too.
_TRAINERS = {"trl": "trl", "verl": "verl", "skyrl": "skyrl", "swift": "ms-swift"}
collect_ignore = [f"trainers/{folder}" for folder, package in _TRAINERS.items() if installed_version(package) is None]

# vLLM binds every engine's worker to the first core, also where another process of tests has an engine there.
if SIDE_BY_SIDE > 1 and hasattr(os, "sched_getaffinity"):
    _CORES = sorted(os.sched_getaffinity(0))
    _WORKER = int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw"))
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", str(_CORES[_WORKER % len(_CORES)]))

# The same examples in every run, so that a run fails for what it changed; --hypothesis-profile=default draws new ones.
hypothesis.settings.register_profile("same", derandomize=True, deadline=None)
hypothesis.settings.load_profile("same")

# Processes that tests start import as the tests do: engines find worker extensions by name.
os.environ["PYTHONPATH"] = os.pathsep.join([*map(str, IMPORTED), *filter(None, [os.environ.get("PYTHONPATH")])])


def pytest_configure(config):
    # Not in the process that only hands tests out: those that it starts would have its number, and not their own.
    if not config.getoption("numprocesses", None):
        os.environ.setdefault("OMP_NUM_THREADS", str(THREADS))


@pytest.fixture(scope="module", autouse=True)
def threads():
    """An engine in this process leaves it with a thread for each core, whatever OMP_NUM_THREADS says: beside another
    test process, small operations were up to thirty times slower after it."""
    import torch

    torch.set_num_threads(THREADS)


@pytest.fixture(scope="session")
def demo_config():
    from r3 import R3Config

    return R3Config.from_overrides(
        [
            "trainer.train_batch_size=8",
            "generator.inference_engine.weight_sync.chunk_mib=1",
            "trainer.policy.optimizer_config.lr=3e-4",
        ],
        {"trainer.policy.model.path": str(DEMO_MODEL)},
    )


@pytest.fixture(scope="session")
def engine(demo_config):
    """A real vLLM engine with the demo's model. Tests leave it with committed weights."""
    from vllm import LLM

    from r3.capture import engine_kwargs

    # As many log-probabilities as sets of 50 ids need: tests set top_k for themselves.
    more = {"worker_extension_cls": "engine_worker.BreakableWorker", "max_logprobs": 54}
    llm = LLM(**engine_kwargs(demo_config) | more)
    yield llm
    llm.llm_engine.engine_core.shutdown()


@pytest.fixture(scope="session")
def weights(demo_config):
    """The weights that the engine starts with, by the names of transformers (experts fused) where vLLM knows them."""
    import torch
    import vllm
    from packaging.version import Version
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    path = demo_config.trainer.policy.model.path
    if Version(vllm.__version__) < Version("0.25"):
        return load_file(Path(path) / "model.safetensors")
    return dict(AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).state_dict())


@pytest.fixture(scope="session")
def reference(engine):
    """Greedy output under the weights that the engine loaded itself."""
    from sync_helpers import greedy

    first = greedy(engine)
    assert greedy(engine) == first, "the engine does not repeat itself: nothing can be compared"
    return first


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Skip what `@pytest.mark.gpu(count=...)` wants more GPUs for than there are, before fixtures start anything."""
    marker = item.get_closest_marker("gpu")
    if marker is None:
        return
    import torch

    needed, found = marker.kwargs.get("count", 1), torch.cuda.device_count()
    if found >= needed:
        return
    if not found and any(Path("/dev").glob("nvidia[0-9]*")):
        pytest.fail("this machine has a GPU that torch cannot use: is its driver older than torch's CUDA build?")
    pytest.skip(f"needs {needed} GPU{'s' * (needed > 1)}, torch sees {found}: run it where there are as many")


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="where tests of model families run their models")
    parser.addoption("--support-table", action="store_true", help="write docs/reference/models.md")


@pytest.fixture(scope="session")
def device(request):
    return request.config.getoption("--device")


def pytest_sessionfinish(session):
    if session.config.getoption("--support-table"):
        from zoo import table

        stats = session.config.pluginmanager.get_plugin("terminalreporter").stats
        table.add(*([report.nodeid for report in stats.get(outcome, ())] for outcome in ("passed", "failed")))


@pytest.fixture(scope="module")
def vllm_config():
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(model=str(DEMO_MODEL), enforce_eager=True).create_engine_config()


@pytest.fixture
def sync(engine, reference):
    """`reference` is taken before anything is synced, whichever test comes first."""
    from r3.weight_sync import WeightSync

    with contextlib.closing(WeightSync(engine, chunk_bytes=1 << 20, timeout_s=120)) as made:
        yield made
