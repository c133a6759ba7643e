"""Training: of exits on a frozen model or of all parameters, its settings, data, objective and checkpoints.

The package and its main function share a name, and importing a package sets that name in its parent: so the package
can be called, and ``exitlm.train(...)`` is :func:`exitlm.train.train`.
"""

import sys
from types import ModuleType

from exitlm.train.full import train
from exitlm.train.loop import Interrupted
from exitlm.train.run import TRAINING, RunConfig
from exitlm.train.trained import model_of_run
from exitlm.train.tune import tune

__all__ = ["TRAINING", "Interrupted", "RunConfig", "model_of_run", "train", "tune"]


class _CallablePackage(ModuleType):
    """This package as a function."""

    __call__ = staticmethod(train)


sys.modules[__name__].__class__ = _CallablePackage
