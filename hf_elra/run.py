"""``python -m hf_elra.run script.py ARGS…``: the launcher, for ``accelerate launch -m`` and ``torchrun -m``."""

import sys

from hf_elra.trainer.launcher import run

if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
