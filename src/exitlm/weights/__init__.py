"""Reading and writing weights: Hugging Face directories, GGUF files, exit adapters, export. It knows no training."""

from exitlm.weights.adapter import Adapter, attach, read_adapter, save_adapter
from exitlm.weights.checkpoint import Checkpoint, open_checkpoint
from exitlm.weights.export import export
from exitlm.weights.inspect import describe
from exitlm.weights.load import load_model
from exitlm.weights.source import resolve

__all__ = [
    "Adapter",
    "Checkpoint",
    "attach",
    "describe",
    "export",
    "load_model",
    "open_checkpoint",
    "read_adapter",
    "resolve",
    "save_adapter",
]
