"""Training: tuning of exits on a frozen model, its settings, data, objective and checkpoints."""

from exitlm.train.run import RunConfig
from exitlm.train.tune import Interrupted, tune

__all__ = ["Interrupted", "RunConfig", "tune"]
