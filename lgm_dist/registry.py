"""Parts that are chosen by name: the built-in ones, and those that a user's own module registers."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any, Generic, TypeVar

T = TypeVar("T")
Registered = TypeVar("Registered")


class Registry(Generic[T]):
    """Classes or functions of one kind by name.

    Args:
        kind: What they are, such as "source". `@register_source("mine")` is how messages tell users to add one.
        setting: Setting that holds the name, for messages.
        place: Module that registers the built-in ones, or package of such modules. It is imported at the first look-up.
    """

    def __init__(self, kind: str, setting: str, place: str) -> None:
        self._kind, self._setting, self._place = kind, setting, place
        self._known: dict[str, T] = {}
        self._imported = False

    def register(self, name: str) -> Callable[[Registered], Registered]:
        """A decorator that registers a class or function as `name`. Raises ValueError if another one has the name."""

        def add(thing: Registered) -> Registered:
            known = self._known.get(name)
            if known is not None and _origin(known) != _origin(thing):
                raise ValueError(f"{self._kind} {name!r} is registered already; choose another name")
            self._known[name] = thing  # type: ignore[assignment]
            return thing

        return add

    def find(self, name: str) -> T | None:
        """The class or function registered as `name`, or None. One registered as `x:NAME` is found as x:anything."""
        if name not in self._known:
            self._import_built_in()
        family, colon, _ = name.partition(":")
        return self._known.get(name) or (self._known.get(f"{family}:NAME") if colon else None)

    def get(self, name: str) -> T:
        """The class or function registered as `name`. Raises ValueError if there is none."""
        found = self.find(name)
        if found is None:
            raise ValueError(
                f"{self._setting} ({name!r}) must be one of {', '.join(self.names())}; to use your own, import its module, "
                f"which registers it with @register_{self._kind}({name!r})"
            )
        return found

    def names(self) -> list[str]:
        """All registered names, sorted."""
        self._import_built_in()
        return sorted(self._known)

    def _import_built_in(self) -> None:
        if not self._imported:
            self._imported = True  # before the imports, which may look names up themselves
            place = importlib.import_module(self._place)
            for module in pkgutil.iter_modules(getattr(place, "__path__", []), f"{self._place}."):
                importlib.import_module(module.name)


def _origin(thing: Any) -> tuple[str, str]:
    """Where a class or function is defined. It is the same if a notebook's cell or a module runs twice."""
    return getattr(thing, "__module__", ""), getattr(thing, "__qualname__", repr(thing))
