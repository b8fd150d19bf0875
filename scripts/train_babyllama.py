"""Train a BabyLlama from scratch; ``hf-elra babyllama`` is the same.

    python scripts/train_babyllama.py                                   # tiny, on the documentation in every Python
    python scripts/train_babyllama.py --preset 15m                      # stories15M on TinyStories from the hub
    python scripts/train_babyllama.py --optim elra                      # the paper's optimizer
    python scripts/train_babyllama.py --train_file my.txt.gz --optim adamw_torch

--help lists all flags. Ctrl-C saves a checkpoint; the same command with --resume goes on from there.
"""

import sys

from hf_elra.recipes.train_babyllama import main
from hf_elra.recipes.training_run import run_script

if __name__ == "__main__":
    run_script(main, sys.argv[1:])
