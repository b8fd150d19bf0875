"""Makes this package's optimizers known to the Python processes that a script under ``hf-elra run`` starts.

The launcher puts this file's folder on PYTHONPATH for as long as the script runs, so that every Python process below it
reads this file when it starts. Most of them never train: this package is imported only where Transformers' arguments
are. No other file belongs into this folder, as all of it can be imported by name then.
"""

from __future__ import annotations

import os
import sys
from importlib.machinery import ModuleSpec, PathFinder
from typing import Any


class _ImportsUsToo:
    """Imports this package after Transformers' arguments, as soon as no module of Transformers is half imported."""

    depth = 0

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if not name.startswith("transformers."):
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            self._watch(spec.loader)
        return spec

    def _watch(self, loader: Any) -> None:
        execute = loader.exec_module

        def exec_module(module: Any) -> None:
            self.depth += 1
            try:
                execute(module)
            finally:
                self.depth -= 1
            if self.depth == 0 and "transformers.training_args" in sys.modules and self in sys.meta_path:
                sys.meta_path.remove(self)
                try:
                    from hf_elra.trainer.launcher import take_flags_of_parent
                except ModuleNotFoundError as error:  # another environment
                    if error.name != "hf_elra":
                        raise
                else:
                    take_flags_of_parent()

        loader.exec_module = exec_module


def _run_the_next() -> None:
    """Import the ``sitecustomize`` that this one hides, if there is one."""
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [folder for folder in sys.path if os.path.abspath(folder) != here]
    this = sys.modules.pop(__name__)
    try:
        import sitecustomize  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != __name__:
            raise
        sys.modules[__name__] = this


if __name__ == "sitecustomize":
    if "HF_ELRA_FLAGS" in os.environ:
        sys.meta_path.insert(0, _ImportsUsToo())  # type: ignore[arg-type]
    _run_the_next()
