"""Control cycles, loss statistics and the batch size: plain Python without torch or Hugging Face."""

from hf_elra.control.batch_size import BatchDecision, BatchSchedule, BatchSizeController
from hf_elra.control.cycle import ControlCycle
from hf_elra.control.noise_scale import NoiseScale
from hf_elra.control.statistics import CycleLosses, LossLevels, LossStatistics

__all__ = [
    "BatchDecision",
    "BatchSchedule",
    "BatchSizeController",
    "ControlCycle",
    "CycleLosses",
    "LossLevels",
    "LossStatistics",
    "NoiseScale",
]
