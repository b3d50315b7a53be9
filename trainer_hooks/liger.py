"""Liger's kernels for the norms of a stock model: one pass each way instead of six."""

import sys

from torch import nn

from r3.errors import ConfigError, UnsupportedModelError

_OTHERS = ("rope", "swiglu", "geglu", "layer_norm", "cross_entropy", "fused_linear_cross_entropy")


def use_liger_norms(model: nn.Module) -> int:
    """Have the RMS norms of `model`, a transformers model on a GPU, computed by Liger; returns how many there are.

    They round as the model's own do. Nothing else of Liger's is used, and other models of this process keep their own.
    After `r3.attach`, `fused_head` and `ulysses`, which try small copies of the model on the CPU; before sharding.

    Raises:
        ConfigError: the package liger-kernel is not here, or the model is on a CPU.
        UnsupportedModelError: Liger does not know the model.
    """
    from transformers.integrations.liger import apply_liger_kernel
    from transformers.utils import is_liger_kernel_available

    setting = "trainer.policy.model.use_liger_kernel=true"
    if not is_liger_kernel_available():
        raise ConfigError(f"{setting} needs the package liger-kernel: pip install liger-kernel")
    if next(model.parameters()).device.type == "cpu":
        raise ConfigError(f"{setting}: Liger's kernels are Triton's and need a GPU, got a model on the CPU")
    namespace = vars(sys.modules[type(model).__module__])
    own = dict(namespace)
    apply_liger_kernel(model, {"rms_norm": True, **dict.fromkeys(_OTHERS, False)})
    # Liger puts its class in place of the model's in transformers too.
    namespace.update(own)
    count = sum(_forward_module(module).startswith("liger_kernel.") for module in model.modules())
    if not count:
        raise UnsupportedModelError(
            f"{setting}: Liger has no norms for {type(model).__name__} (model type "
            f"{model.config.model_type}); set it to false"  # pyrefly: ignore
        )
    return count


def _forward_module(module: nn.Module) -> str:
    return getattr(module.forward, "__module__", "")
