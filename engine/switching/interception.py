"""Functions around the forward of single modules: reversible, for any number of users, without a trace in copies.

The module's own attribute `forward` is what accelerate's hooks use, too, so both can be there, in any order.
"""

import copy
import functools
import inspect
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

from torch import nn

# around(module, forward, /, **kwargs) calls forward(**kwargs), or not, and returns the output.
Around = Callable[..., Any]

_HOME = "_longshadow_interception"
_ABSENT = object()
# A cache that is collected gives its model back in the middle of anything, so the lock is reentrant.
_lock = threading.RLock()


class Interception:
    """Stands in for a module's forward; positional arguments reach what is around it by name."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._own: Callable[..., Any] | None = vars(module).get("forward")
        self.__signature__ = inspect.signature(module.forward)
        self.__name__ = "forward"
        positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        self._names = [name for name, made in self.__signature__.parameters.items() if made.kind in positional]
        self._counts: Counter[Around] = Counter()
        self._around: tuple[Around, ...] = ()
        self._replaced: dict[str, tuple[Any, Any]] = {}
        self._replace("forward", self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward, within everything that is around it."""
        names = self._names[: len(args)]
        if len(args) > len(names) or any(name in kwargs for name in names):
            return self._innermost(*args, **kwargs)
        forward: Callable[..., Any] = self._innermost
        for around in self._around:
            forward = functools.partial(around, self._module, forward)
        return forward(**dict(zip(names, args, strict=True)), **kwargs)

    def _innermost(self, *args: Any, **kwargs: Any) -> Any:
        if self._own is not None:
            return self._own(*args, **kwargs)
        return type(self._module).forward(self._module, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Gives a copy of the module its plain forward, where a later hook kept this one."""
        return copy.deepcopy(self._plain, memo)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return _itself, (self._plain,)

    @property
    def _plain(self) -> Callable[..., Any]:
        return self._own or type(self._module).forward.__get__(self._module)

    @property
    def around(self) -> tuple[Around, ...]:
        """Functions around the forward, innermost first."""
        return self._around

    def add(self, around: Around, replaced: dict[str, Callable[[Any], Any]]) -> None:
        """One more time `around`; `replaced`: how attributes of the module are made over from their values."""
        self._counts[around] += 1
        for name, make in replaced.items():
            if name not in self._replaced and hasattr(self._module, name):
                self._replace(name, make(getattr(self._module, name)))
        self._around = tuple(self._counts)

    def remove(self, around: Around) -> None:
        """Takes one `add` back; the last one gives the module its own attributes back."""
        self._counts[around] -= 1
        self._counts = +self._counts
        self._around = tuple(self._counts)
        if not self._counts:
            self._restore(vars(self._module))

    def _replace(self, name: str, value: Any) -> None:
        attributes = vars(self._module)
        self._replaced[name] = value, attributes.get(name, _ABSENT)
        attributes[name] = value

    def _restore(self, attributes: dict[str, Any]) -> None:
        """Undoes what was replaced here, and nothing that others did since."""
        for name, (ours, before) in self._replaced.items():
            if attributes.get(name) is not ours:
                continue
            if before is _ABSENT:
                del attributes[name]
            else:
                attributes[name] = before
        attributes.pop(_HOME, None)
        attributes.pop("__getstate__", None)

    def state(self) -> dict[str, Any]:
        """The module's state for copies and pickles, as it is without this."""
        state: dict[str, Any] = dict(type(self._module).__getstate__(self._module))
        self._restore(state)
        return state


def _itself(plain: Any) -> Any:
    return plain


def intercept(
    module: nn.Module, around: Around, *, replaced: dict[str, Callable[[Any], Any]] | None = None
) -> Callable[[], None]:
    """Puts `around` around the module's forward, once for all who ask for it, until the returned function is called.

    replaced: attributes of the module that are something else meanwhile, by functions of their values.
    """
    with _lock:
        attributes = vars(module)
        interception: Interception | None = attributes.get(_HOME)
        if interception is None:
            interception = attributes[_HOME] = Interception(module)
            attributes["__getstate__"] = interception.state
        interception.add(around, replaced or {})

    def undo() -> None:
        with _lock:
            interception.remove(around)

    return undo


def around(module: nn.Module) -> tuple[Around, ...]:
    """Functions around the module's forward now."""
    interception: Interception | None = vars(module).get(_HOME)
    return () if interception is None else interception.around
