"""Training: tuning of exits on a frozen model, its settings, data, objective and checkpoints."""

from exitlm.train.run import RunConfig
from exitlm.train.tune import Interrupted, model_of_run, tune

__all__ = ["Interrupted", "RunConfig", "model_of_run", "tune"]
