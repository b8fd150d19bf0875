"""``python -m hf_elra.run script.py ARGS…``: the launcher, for ``accelerate launch -m`` and ``torchrun -m``."""

import sys

from hf_elra.trainer.launcher import run_and_leave

if __name__ == "__main__":
    run_and_leave(sys.argv[1:])
