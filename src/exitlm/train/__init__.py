"""Training: of exits on a frozen model or of all parameters, its settings, data, objective and checkpoints."""

from exitlm.train.full import train
from exitlm.train.loop import Interrupted
from exitlm.train.run import TRAINING, RunConfig
from exitlm.train.trained import model_of_run
from exitlm.train.tune import tune

__all__ = ["TRAINING", "Interrupted", "RunConfig", "model_of_run", "train", "tune"]
