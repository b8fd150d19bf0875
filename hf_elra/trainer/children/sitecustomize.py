"""Makes this package's optimizers known to the Python processes that a script under ``hf-elra run`` starts.

The launcher puts this file's folder on PYTHONPATH for as long as the script runs, so that every Python process below it
reads this file when it starts. Most of them never train, so the rest of this package is imported only together with the
arguments of Transformers. Put no other file into this folder, as all of it can be imported by name then.
"""

from __future__ import annotations

import os
import sys


def _take_flags() -> None:
    from hf_elra.trainer.launcher import take_flags_of_parent

    take_flags_of_parent()


def _wait_for_transformers() -> None:
    try:
        from hf_elra.after_import import after_import
    except ModuleNotFoundError as error:  # another environment
        if error.name != "hf_elra":
            raise
    else:
        after_import("transformers.training_args", _take_flags)


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
        _wait_for_transformers()
    _run_the_next()
