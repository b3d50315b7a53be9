"""Methods that somebody has put on a module itself: they win over its class, which is what replay extends.

accelerate's hooks (`device_map`, offload) do so, and keep the method that was there as `_old_forward`; so do kernel
patches and timers. Replay goes below accelerate's hooks and above everything else: what was on the module is moved
aside, and the extended class runs it. So hooks may come and go while replay is attached.
"""

from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from types import FunctionType, MethodType
from typing import Any

from torch import nn

_BELOW_HOOK = "_old_forward"
_OF_FORWARD = ("_hf_hook", _BELOW_HOOK, "forward")
_ASIDE = "_r3_own_"


def _slot(module: nn.Module, method: str) -> str | None:
    """The attribute of `module` that its own `method` is in, below accelerate's hooks; None if it has none."""
    for name in (_BELOW_HOOK, method) if method == "forward" else (method,):
        if name in module.__dict__:
            return name
    return None


class Moved:
    """What was moved aside of one module, so that its class, extended since, runs.

    Args:
        module: of class `extended`.
        method: which of its methods was extended.
        before: its class before.
    """

    def __init__(self, module: nn.Module, method: str, before: type, extended: type) -> None:
        self._method = method
        self._before = getattr(before, method)
        self._extended = getattr(extended, method)
        self._slot = _slot(module, method)
        self._value = module.__dict__.get(self._slot) if self._slot else None
        if self._slot is None:
            return
        if getattr(self._value, "__func__", None) is not self._before:
            module.__dict__[_ASIDE + method] = self._value
        if self._slot == method:
            del module.__dict__[method]
        else:
            module.__dict__[self._slot] = MethodType(self._extended, module)

    def put_back(self, module: nn.Module) -> None:
        """Leave `module` with the attributes that it had, under hooks that came or without those that went since."""
        own = module.__dict__
        restored = self._slot is None
        for name in (_BELOW_HOOK, self._method):
            if getattr(own.get(name), "__func__", None) is not self._extended:
                continue
            if self._slot is not None:
                own[name], restored = self._value, True
            elif name == _BELOW_HOOK:
                own[name] = MethodType(self._before, module)
            else:
                del own[name]
        if not restored and self._method not in own:
            own[self._method], restored = self._value, True
        if restored:  # else something new holds on to the extended method, which then only passes on
            own.pop(_ASIDE + self._method, None)


def method_of(original: Callable, method: str, module: nn.Module) -> Callable:
    """`original`, a method of the class of `module`, or a function that runs what was moved aside, in its place."""
    if _ASIDE + method not in module.__dict__:
        return original
    return partial(_run_aside, _ASIDE + method)


def _run_aside(name: str, module: nn.Module, *args, **kwargs):
    return module.__dict__[name](*args, **kwargs)


def code_of(module: nn.Module, method: str) -> Callable | None:
    """The function that does the work of `module`'s `method`, to be run with another `self`.

    That is the class's, or one that is bound to the module in its place; what only wraps either is looked through.

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
            return value.__func__
        if id(value) not in seen:
            seen.add(id(value))
            inner.extend(_wrapped(value))
    return None


def _wrapped(value: Any) -> list[Any]:
    """What a callable may call."""
    found = [getattr(value, "__wrapped__", None)]
    if isinstance(value, FunctionType):
        for cell in value.__closure__ or ():
            with suppress(ValueError):  # not filled yet
                found.append(cell.cell_contents)
        found += [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
    elif isinstance(value, partial):
        found += [value.func, *value.args, *value.keywords.values()]
    elif isinstance(value, MethodType):
        found.append(value.__func__)
    return [item for item in found if callable(item) and not isinstance(item, nn.Module)]


def set_aside(module: nn.Module) -> list[Any]:
    """What `on_copy` drops, and had better not be copied: it may hold on to all weights, or to the whole model."""
    return [module.__dict__[name] for name in _OF_FORWARD if name in module.__dict__]


def on_copy(copied: nn.Module, method: str, code: Callable) -> None:
    """Have a copy of a module run `code` as its `method`, without hooks and wrappers."""
    for name in (*_OF_FORWARD, method):
        copied.__dict__.pop(name, None)
    if code is not getattr(type(copied), method):
        copied.__dict__[method] = MethodType(code, copied)
