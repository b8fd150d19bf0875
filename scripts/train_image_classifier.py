"""Train an image classifier; ``hf-elra classify-images`` is the same.

    python scripts/train_image_classifier.py                                    # digits: seconds, no network
    python scripts/train_image_classifier.py --preset mnist                     # from the hub
    python scripts/train_image_classifier.py --preset cifar10 --weight_decay 3e-4 --num_train_epochs 200
    python scripts/train_image_classifier.py --dataset my_images/ --image_size 64 --model resnet18

--help lists all flags. Ctrl-C saves a checkpoint; the same command with --resume goes on from there.
"""

import sys

from hf_elra.recipes.train_image_classifier import main
from hf_elra.recipes.training_run import run_script

if __name__ == "__main__":
    run_script(main, sys.argv[1:])
