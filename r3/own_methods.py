"""Methods that were set on a module instance: they take precedence over its class, which is what replay extends.

accelerate's hooks (`device_map`, offload) do so, and keep the method that was there as `_old_forward`; so do kernel
patches and timers. Replay goes below accelerate's hooks and above everything else: the instance's method is moved
aside, and the extended class calls it. So hooks may come and go while replay is attached.
"""

from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from types import FunctionType, MethodType
from typing import Any

from torch import nn

BELOW_HOOK = "_old_forward"
_OF_FORWARD = ("_hf_hook", BELOW_HOOK, "forward")
ASIDE = "_r3_own"


def _slot(module: nn.Module, method: str) -> str | None:
    """The attribute of `module` that holds its own `method`, below accelerate's hooks; None if it has none."""
    for name in (BELOW_HOOK, method) if method == "forward" else (method,):
        if name in module.__dict__:
            return name
    return None


class Moved:
    """The methods of one module that were moved aside, so that its extended class runs.

    The extended class keeps it on the module: a reference to the method that was taken while replay was attached still
    works after replay is detached, or attached again.

    Args:
        module: of class `extended`.
        method: the method that was extended.
        before: its class before.
    """

    def __init__(self, module: nn.Module, method: str, before: type, extended: type) -> None:
        self._method = method
        self._before = getattr(before, method)
        self._extended = extended
        self._slot = _slot(module, method)
        self._value = module.__dict__.get(self._slot) if self._slot else None
        if self._slot is None:
            return
        if getattr(self._value, "__func__", None) is not self._before:
            module.__dict__.setdefault(ASIDE, {})[extended] = self._value
        if self._slot == method:
            del module.__dict__[method]
        else:
            module.__dict__[self._slot] = MethodType(getattr(extended, method), module)

    def put_back(self, module: nn.Module) -> None:
        """Restore the attributes of `module`. Hooks that were added or removed in the meantime stay so."""
        own = module.__dict__
        extended = getattr(self._extended, self._method)
        restored = self._slot is None
        for name in (BELOW_HOOK, self._method):
            if getattr(own.get(name), "__func__", None) is not extended:
                continue
            if self._slot is not None:
                own[name], restored = self._value, True
            elif name == BELOW_HOOK:
                own[name] = MethodType(self._before, module)
            else:
                del own[name]
        if not restored and self._method not in own:
            own[self._method], restored = self._value, True
        aside = own.get(ASIDE, {})
        if restored:  # else something new holds on to the extended method
            aside.pop(self._extended, None)
        if not aside:
            own.pop(ASIDE, None)


def method_of(original: Callable, extended: type, module: nn.Module) -> Callable:
    """`original`, or a function that calls the method of `module` that was moved aside for its class `extended`."""
    aside = module.__dict__.get(ASIDE)
    if aside is None or extended not in aside:
        return original
    return partial(_run_aside, extended)


def _run_aside(extended: type, module: nn.Module, *args, **kwargs):
    return module.__dict__[ASIDE][extended](*args, **kwargs)


def code_of(module: nn.Module, method: str) -> Callable | None:
    """The function behind `module`'s `method`, to be called with another `self`.

    That is the class's function, or one bound to the module instead; wrappers around either are skipped.

    Returns:
        None if the module's own method is not bound to it and wraps nothing that is.
    """
    slot = _slot(module, method)
    if slot is None:
        return getattr(type(module), method)
    inner, seen = deque([module.__dict__[slot]]), set()
    while inner:
        value = inner.popleft()
        if isinstance(value, MethodType) and value.__self__ is module:
            extended = getattr(value.__func__, "extended", None)  # taken from the module under an earlier attach
            if extended is None:
                return value.__func__
            aside = module.__dict__.get(ASIDE, {}).get(extended)
            value = aside or MethodType(getattr(extended.__base__, method), module)
            inner.append(value)
            continue
        if id(value) not in seen:
            seen.add(id(value))
            inner.extend(_wrapped(value))
    return None


def _wrapped(value: Any) -> list[Any]:
    """The callables that a wrapper may call."""
    held = [getattr(value, "__wrapped__", None)]
    if isinstance(value, FunctionType):
        for cell in value.__closure__ or ():
            with suppress(ValueError):  # not filled yet
                held.append(cell.cell_contents)
        held += [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
    elif isinstance(value, partial):
        held += [value.func, *value.args, *value.keywords.values()]
    elif isinstance(value, MethodType):
        held.append(value.__func__)
    elif not isinstance(value, type):
        held += vars(value).values() if hasattr(value, "__dict__") else ()  # transformers' expert parallelism
    return [item for item in held if callable(item) and not isinstance(item, nn.Module)]


def set_aside(module: nn.Module) -> list[Any]:
    """Attributes that `on_copy` drops, so that they are not copied: they may reference all weights, or the model."""
    return [module.__dict__[name] for name in (*_OF_FORWARD, ASIDE) if name in module.__dict__]


def on_copy(copied: nn.Module, method: str, code: Callable) -> None:
    """Have a copy of a module run `code` as its `method`, without hooks and wrappers."""
    for name in (*_OF_FORWARD, ASIDE, method):
        copied.__dict__.pop(name, None)
    if code is not getattr(type(copied), method):
        copied.__dict__[method] = MethodType(code, copied)
