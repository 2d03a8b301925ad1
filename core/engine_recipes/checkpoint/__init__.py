"""The TensorRT-LLM checkpoint: read, write, verify, convert. Importing this loads no numpy."""

from __future__ import annotations

from .config import config_json, decoder_from_config
from .convert import ConvertStats, Dtype, checkpoint_bytes, convert
from .layout import Piece, TensorSpec, check_split, layout, source_shapes, stage_layers
from .reader import Checkpoint, open_checkpoint
from .source import SourceCheckpoint, expect_tensors, open_source, source_tensors
from .verify import verify

__all__ = [
    "Checkpoint",
    "ConvertStats",
    "Dtype",
    "Piece",
    "SourceCheckpoint",
    "TensorSpec",
    "check_split",
    "checkpoint_bytes",
    "config_json",
    "convert",
    "decoder_from_config",
    "expect_tensors",
    "layout",
    "open_checkpoint",
    "open_source",
    "source_shapes",
    "source_tensors",
    "stage_layers",
    "verify",
]
