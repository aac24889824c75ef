"""Checkpoints as ranges of bytes: read any, write in any order, never hold more than a range, never import torch unless asked."""

from lmcore.checkpoint.reader import DTYPES, Checkpoint, TensorInfo
from lmcore.checkpoint.writer import CheckpointWriter, shards_like

__all__ = ["DTYPES", "Checkpoint", "CheckpointWriter", "TensorInfo", "shards_like"]
