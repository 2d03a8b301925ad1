"""Stage 2: the decoder is exported, compiled without its weights, and these are written beside it, once."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine_recipes import Decoder, RequestError, StageFailed, events, require_room, rope
from engine_recipes.checkpoint import Checkpoint

from .machine import ARCHITECTURE, compiler, compiler_version

if TYPE_CHECKING:
    from torch import Tensor, nn

MODEL, WEIGHTS, SETTINGS = "model.pt2", "weights.safetensors", "engine.json"
EMBEDDING, HEAD = "transformer.vocab_embedding.weight", "lm_head.weight"
KNOWN_ACTIVATIONS = ("silu", "gelu_pytorch_tanh")

#: Fields of Decoder that change weights and tables, or nothing at all.
_WEIGHTS = {"architecture", "dtype", "names", "config", "max_positions", "norm_offset", "rope_theta", "rope_scaling"}
#: Of `torch._inductor.config`.
_COMPILE: Mapping[str, Any] = {
    "cpp.march": ARCHITECTURE,
    "cpp.simdlen": 256,  # bits of a vector: AVX2
    "cpp.vec_isa_ok": True,  # otherwise the compiler is tried with most instruction sets of this CPU: 10 s
    "cpp.dynamic_threads": True,  # otherwise the number of this machine's cores is compiled in
    "compile_threads": 1,  # in this process: no workers that outlive the stage
    "aot_inductor.package_constants_in_so": False,  # weights are no business of the compiler and linker
    "aot_inductor.precompile_headers": False,  # it keeps them outside of its cache
    "aot_inductor.enable_line_tables": False,  # which name this machine's folders
}


def check_model(decoder: Decoder, max_seq_len: int) -> int:
    """The longest sequence, in tokens.

    Args:
        max_seq_len: wanted; 0 is what the model is meant for.

    Raises:
        RequestError: an activation, a rope scaling or a length that this engine does not know.
    """
    if decoder.activation not in KNOWN_ACTIVATIONS:
        raise RequestError(
            f"the aotinductor engine does not know the activation {decoder.activation!r}",
            f"known: {', '.join(KNOWN_ACTIVATIONS)}; choose another engine for this model",
        )
    rope.inverse_frequencies(decoder)
    most = decoder.max_positions
    if not 0 <= max_seq_len <= most:
        raise RequestError(
            f"max_seq_len = {max_seq_len}, but the model is meant for sequences of up to {most:,} tokens",
            f"choose 1 to {most}, or 0 for {most}",
        )
    return max_seq_len or most


def build(weights: Checkpoint, folder: Path, cache: Path, max_seq_len: int) -> None:
    """Write `model.pt2`, `weights.safetensors` and `engine.json`.

    Args:
        weights: not quantised.
        folder: has none of these files yet.
        cache: where Inductor keeps what it made.
        max_seq_len: as for `check_model`.

    Raises:
        RequestError: this engine does not know the model, or its checkpoint contradicts itself.
        MachineError: the disk is too small.
        StageFailed: the compiler did not do it.
    """
    from safetensors.torch import save_file

    check_plain(weights)
    d = weights.decoder
    positions = check_model(d, max_seq_len)
    stored = read_weights(weights)
    tied = HEAD not in stored or (EMBEDDING in stored and same(stored[HEAD], stored[EMBEDDING]))
    if tied:
        stored.pop(HEAD, None)
    require_room("the engine", sum(tensor.nbytes for tensor in stored.values()) + (64 << 20), folder)
    tables = write_code(d, positions, tied, stored, folder, cache)
    events.progress("writing weights", 2, 3, "steps")
    save_file({**stored, **tables}, folder / WEIGHTS)
    settings = {
        "max_seq_len": positions,
        "vocab_size": d.vocab_size,
        "layers": d.layers,
        "kv_heads": d.kv_heads,
        "head_size": d.head_size,
    }
    (folder / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def write_code(
    d: Decoder, positions: int, tied: bool, stored: Mapping[str, Tensor], folder: Path, cache: Path
) -> dict[str, Tensor]:
    """Write `model.pt2`, compiled now or before; returns the tables that go with the weights.

    The code does not depend on the weights: models of one shape share it, and so do fp16 and bf16.

    Raises:
        RequestError: the tensors are not of this shape.
        StageFailed: see `build`.
    """
    from .model import Model

    model = Model(d, positions, tied).eval().requires_grad_(False)
    check_shapes(stored, model)
    code = cache / f"{code_key(d, positions, tied)}.pt2"
    if not code.is_file():
        part = folder / f"part-{MODEL}"
        with inductor_in(cache / "inductor"):
            compile_model(model, d, part)
        os.replace(part, code)  # others may be doing the same
    shutil.copyfile(code, folder / MODEL)
    return dict(model.named_buffers())


def code_key(decoder: Decoder, positions: int, tied: bool) -> str:
    """What the compiled code depends on, as 64 hex digits."""
    import torch

    about = {name: value for name, value in asdict(decoder).items() if name not in _WEIGHTS}
    made = [torch.__version__, compiler_version(compiler()), version("engine-recipes-aotinductor")]
    return hashlib.sha256(json.dumps([about, positions, tied, *made], sort_keys=True).encode()).hexdigest()


def check_plain(weights: Checkpoint) -> None:
    """Refuse a quantised checkpoint. Raises RequestError."""
    for key in ("quant_algo", "kv_cache_quant_algo"):
        algorithm = weights.quantization.get(key)
        if algorithm:
            raise RequestError(
                f"the aotinductor engine cannot compile {key} {algorithm}",
                "choose fp16 or bf16, or another engine for this checkpoint",
            )


def read_weights(weights: Checkpoint) -> dict[str, Tensor]:
    """All tensors as they are stored, mapped where they are not split. Rows of padding are left away."""
    import torch

    found = {}
    for name in weights.names():
        dtype, _ = weights.info(name)
        array = weights.array(name)
        if name in (EMBEDDING, HEAD):
            array = array[: weights.decoder.vocab_size]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch wants to be able to write; nobody does
            raw = torch.from_numpy(array.view("uint8"))  # it knows no arrays of ml_dtypes
        found[name] = raw.view(getattr(torch, dtype))
    return found


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two weights are equal bit for bit."""
    import torch

    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def check_shapes(stored: Mapping[str, Tensor], model: nn.Module) -> None:
    """Refuse a checkpoint whose tensors and config.json disagree. Raises RequestError."""
    for name, wanted in model.named_parameters():
        shape = list(stored[name].shape) if name in stored else "missing"
        if shape != list(wanted.shape):
            raise RequestError(
                f"{name} is {shape}, config.json says {list(wanted.shape)}", "copy or build the checkpoint again"
            )


def compile_model(model: nn.Module, d: Decoder, path: Path) -> None:
    """Export and compile. The numbers of sequences, of new tokens, of tokens in the cache and of logits stay open."""
    import torch
    from torch._inductor import aoti_compile_and_package, exc
    from torch.export import Dim, export

    events.progress("exporting", 0, 3, "steps")
    b, s, t, last = 2, 3, 5, 4  # any numbers that differ: export takes what is equal for one dimension
    cache = [tuple(torch.zeros(t, b, d.kv_heads, d.head_size) for _ in "kv") for _ in range(d.layers)]
    inputs = (torch.zeros(b, s, dtype=torch.int64), torch.arange(s), torch.zeros(last, dtype=torch.int64), cache)
    batch, new, used, wanted = (Dim(n, min=1) for n in ("batch", "new", "used", "wanted"))
    entry = {0: used, 1: batch}
    shapes = ({0: batch, 1: new}, {0: new}, {0: wanted}, [(entry, entry)] * d.layers)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch is told by torch what it will not do for long
            exported = export(model, inputs, dynamic_shapes=shapes)
            events.progress("compiling", 1, 3, "steps")
            aoti_compile_and_package(exported, package_path=str(path), inductor_configs=dict(_COMPILE))
    except exc.InductorError as error:
        if not isinstance(error.inner_exception, exc.CppCompileError):
            raise
        raise StageFailed(
            "the C++ compiler failed on what Inductor wrote",
            "mend what it complains of, or name another compiler in the environment variable CXX",
            str(error.inner_exception),
        ) from error


@contextmanager
def inductor_in(cache: Path) -> Iterator[None]:
    """Have Inductor keep its files there while the block runs."""
    cache.mkdir(parents=True, exist_ok=True)
    key = "TORCHINDUCTOR_CACHE_DIR"
    before = os.environ.get(key)
    os.environ[key] = str(cache)
    try:
        yield
    finally:
        if before is None:
            del os.environ[key]
        else:
            os.environ[key] = before
