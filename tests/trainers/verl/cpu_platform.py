"""A CPU as one of verl's platforms: what its FSDP2 engine asks of a device."""

import contextlib
import types
from typing import Any

import torch
from verl.plugin.platform import PlatformRegistry
from verl.plugin.platform.platform_base import PlatformBase

device = types.SimpleNamespace(**{name: getattr(torch.cpu, name) for name in dir(torch.cpu) if name[0] != "_"})
device.is_available = lambda: True
device.current_device = lambda: "cpu"
device.empty_cache = lambda: None
device.mem_get_info = lambda *_: (0, 0)
device.memory_allocated = device.memory_reserved = lambda *_: 0
device.max_memory_allocated = device.max_memory_reserved = lambda *_: 0
device.get_device_name = lambda *_: "cpu"
device.get_rng_state, device.set_rng_state = torch.get_rng_state, torch.set_rng_state
device.manual_seed = device.manual_seed_all = torch.manual_seed


@PlatformRegistry.register(platform="r3cpu")
class CpuPlatform(PlatformBase):
    device_name = "cpu"
    vendor_name = "tests"
    device_module = device

    def is_available(self) -> bool:
        return True

    def current_device(self) -> Any:
        return "cpu"

    def device_count(self) -> int:
        return 1

    def set_device(self, index: int) -> None: ...

    def synchronize(self, index: int | None = None) -> None: ...

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    manual_seed_all = manual_seed

    def set_allocator_settings(self, settings: str) -> None: ...

    def empty_cache(self) -> None: ...

    def get_device_capability(self, index: int = 0) -> tuple:
        return (None, None)

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "CUDA_VISIBLE_DEVICES"

    def nvtx_range(self, message: str) -> Any:
        return contextlib.nullcontext()

    def profiler_start(self) -> None: ...

    def profiler_stop(self) -> None: ...

    def ray_resource_name(self) -> str:
        return "CPU"

    def ray_noset_envvars(self) -> list[str]:
        return []

    def is_ipc_supported(self) -> bool:
        return False

    def cudart(self) -> None: ...
