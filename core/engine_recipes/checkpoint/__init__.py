"""The TensorRT-LLM checkpoint: read, write, verify, convert. Importing this loads no numpy."""

from __future__ import annotations

from .blocks import largest
from .config import LLAMA_CONFIG, config_json, decoder_from_config
from .convert import ConvertStats, Dtype, Edit, WeightOnly, checkpoint_bytes, convert
from .exclude import excluded_linears, linear_sizes
from .formats import LinearPart, Scheme, Stored, choose_group_size, stored
from .layout import Piece, Range, TensorSpec, check_split, layout, source_shapes, stage_layers
from .linears import Linear, Quantise, quantize_linears
from .quantize import Algorithm, CacheDtype, quantize, unquantised_dtype
from .reader import Checkpoint, open_checkpoint
from .safetensors import Array, TensorInfo
from .source import SourceCheckpoint, expect_tensors, not_finite, open_source, source_tensors
from .statistics import Statistics, read_statistics, write_statistics
from .verify import verify

__all__ = [
    "LLAMA_CONFIG",
    "Algorithm",
    "Array",
    "CacheDtype",
    "Checkpoint",
    "ConvertStats",
    "Dtype",
    "Edit",
    "Linear",
    "LinearPart",
    "Piece",
    "Quantise",
    "Range",
    "Scheme",
    "SourceCheckpoint",
    "Statistics",
    "Stored",
    "TensorInfo",
    "TensorSpec",
    "WeightOnly",
    "check_split",
    "checkpoint_bytes",
    "choose_group_size",
    "config_json",
    "convert",
    "decoder_from_config",
    "excluded_linears",
    "expect_tensors",
    "largest",
    "layout",
    "linear_sizes",
    "not_finite",
    "open_checkpoint",
    "open_source",
    "quantize",
    "quantize_linears",
    "read_statistics",
    "source_shapes",
    "source_tensors",
    "stage_layers",
    "stored",
    "unquantised_dtype",
    "verify",
    "write_statistics",
]
