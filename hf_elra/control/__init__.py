"""Control cycles and loss statistics: plain Python, knows neither torch nor Hugging Face."""

from hf_elra.control.cycle import ControlCycle
from hf_elra.control.statistics import LossStatistics

__all__ = ["ControlCycle", "LossStatistics"]
