from hf_elra.optim import ELRA
