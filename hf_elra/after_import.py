"""Calls a function as soon as a module of another package is imported, or at once if it is imported already.

``import hf_elra`` thereby changes Transformers only in processes that use Transformers, and loads nothing in others.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def after_import(name: str, action: Callable[[], object]) -> None:
    """Call ``action`` once ``name`` is imported and no module of its package is half imported.

    Args:
        name: a module in a package, as ``transformers.training_args``.
        action: may import any module of the package. An exception that it raises comes out of the ``import``.
    """
    if _is_imported(name):
        action()
    else:
        sys.meta_path.insert(0, _Finder(name, action))


def _is_imported(name: str) -> bool:
    module = sys.modules.get(name)
    return module is not None and not getattr(getattr(module, "__spec__", None), "_initializing", False)


class _Finder:
    """Finds modules by the finders after it, and notes when those of one package have been executed."""

    def __init__(self, name: str, action: Callable[[], object]) -> None:
        self.name, self.action = name, action
        self.package = name.partition(".")[0]
        self.half_imported: set[str] = set()

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name.partition(".")[0] != self.package or self not in sys.meta_path:
            return None
        for finder in sys.meta_path[sys.meta_path.index(self) + 1 :]:
            find = getattr(finder, "find_spec", None)
            spec = find(name, path, target) if find is not None else None
            if spec is not None:
                if hasattr(spec.loader, "exec_module"):
                    spec.loader = _Loader(spec.loader, self)  # type: ignore[assignment]
                return spec
        return None

    def executed(self) -> None:
        """Run the action if the module is executed by now, and then remove this finder."""
        if not self.half_imported and self.name in sys.modules and self in sys.meta_path:
            sys.meta_path.remove(self)
            self.action()


class _Loader:
    """A module's own loader, which tells the finder when it begins and ends; the module never sees this one."""

    def __init__(self, loader: Any, finder: _Finder) -> None:
        self._loader, self._finder = loader, finder

    def __getattr__(self, name: str) -> Any:
        if name in ("_loader", "_finder"):  # the loader is not there yet, as in a copy that is being made
            raise AttributeError(name)
        return getattr(self._loader, name)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        name = module.__name__
        self._finder.half_imported.add(name)
        try:
            self._loader.exec_module(module)
        finally:
            self._finder.half_imported.discard(name)
        self._finder.executed()
