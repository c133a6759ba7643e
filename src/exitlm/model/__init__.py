"""The maths of the model: configuration, decoder, exit heads. It knows nothing of files, parallelism or HTTP."""

from exitlm.model.config import ModelConfig
from exitlm.model.decoder import EarlyExitModel, Past
from exitlm.model.exits import ExitConfig, ExitHead
from exitlm.model.layers import AttentionContext, Tap
from exitlm.model.record import Calibration, ExitRecord
from exitlm.model.rope import RopeConfig

__all__ = [
    "AttentionContext",
    "Calibration",
    "EarlyExitModel",
    "ExitConfig",
    "ExitHead",
    "ExitRecord",
    "ModelConfig",
    "Past",
    "RopeConfig",
    "Tap",
]
