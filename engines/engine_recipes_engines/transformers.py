"""The unquantised source in Hugging Face transformers: what builds are compared with. Not an engine: it only reads.

float32 where it fits, else 16 bits; on a GPU if the weights fit there. No code of a checkpoint
is run, and only safetensors are opened.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine_recipes import MachineError, RequestError, Sampling, StageContext, checkpoint, events, hookimpl

if TYPE_CHECKING:
    import numpy as np

#: Share of the memory that weights may take: the rest is for activations, logits and everybody else.
_SHARE = 0.7


@hookimpl
def load_source(context: StageContext) -> SourceRuntime:
    """Load the source with transformers."""
    with checkpoint.open_source(context.input("hf-checkpoint")) as source:
        parameters = source.decoder.parameters
        return SourceRuntime(source.folder, parameters, source.decoder.max_positions, source.decoder.dtype)


class SourceRuntime:
    """A model in transformers (see `engine_recipes.Runtime`). Greedy only.

    Args:
        folder: in the Hugging Face layout.
        parameters: of the model, to know where it fits.
        max_seq_len: most tokens of a prompt and its answer.
        dtype: of the weights as they are stored.

    Attributes:
        about: `dtype` and `device` that it is run in and on; kept with the baseline.

    Raises:
        RequestError: transformers does not know this model.
        MachineError: it does not fit in memory.
    """

    def __init__(self, folder: Path, parameters: int, max_seq_len: int, dtype: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()  # it would be drawn over ours
        self.max_seq_len = max_seq_len
        self._device, running = place(parameters, dtype)
        self.about = {"dtype": running, "device": self._device}
        events.log(f"the source is run in {running} on {self._device}")
        try:
            self._model: Any = AutoModelForCausalLM.from_pretrained(
                folder, dtype=getattr(torch, running), local_files_only=True, use_safetensors=True
            )
        except (ValueError, KeyError, OSError) as error:  # an architecture it has not heard of, a config it refuses
            reason = str(error).strip().splitlines()[0]
            raise RequestError(
                f"transformers cannot load {folder}: {reason}",
                "--set gate.reference=NAME takes another reference, none compares with nothing",
            ) from error
        self._model.to(self._device).eval()

    def logits(self, ids: Sequence[int]) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Next-token logits for every position, float32 [len(ids), vocabulary]."""
        import torch

        with torch.inference_mode():
            found = self._model(torch.tensor([list(ids)], device=self._device), use_cache=False).logits[0]
        array: np.ndarray[Any, np.dtype[np.float32]] = found.float().cpu().numpy()
        return array

    def generate(self, prompt: Sequence[int], sampling: Sampling, stop: frozenset[int] = frozenset()) -> Iterator[int]:
        """Yield the likeliest token, again and again. Ends after `max_tokens`, or before the first id in `stop`."""
        import torch

        ids, past = list(prompt), None
        for _ in range(sampling.max_tokens):
            with torch.inference_mode():
                out = self._model(torch.tensor([ids], device=self._device), past_key_values=past, use_cache=True)
            past = out.past_key_values
            token = int(out.logits[0, -1].argmax())
            if token in stop:
                return
            yield token
            ids = [token]

    def close(self) -> None:
        """Give back memory and devices. Safe to call twice."""
        self._model = None


def place(parameters: int, dtype: str) -> tuple[str, str]:
    """Device and dtype: as exact as fits, on a GPU if there is one.

    What is stored as float32 and does not fit so becomes bfloat16, which has its range.

    Raises:
        MachineError: nothing fits.
    """
    import torch

    memory = {"cpu": _free_memory()}
    if torch.cuda.is_available():
        memory = {"cuda": torch.cuda.mem_get_info()[0], **memory}
    for wanted, size in (("float32", 4), ("bfloat16" if dtype == "float32" else dtype, 2)):
        for device, free in memory.items():
            if parameters * size <= _SHARE * free:
                return device, wanted
    needed = parameters * 2 / _SHARE / 1e9
    raise MachineError(
        f"the source has {parameters / 1e9:.1f} billion parameters: to run it takes {needed:.0f} GB of memory",
        "validate on a larger machine, or --set gate.reference=none compares with nothing",
    )


def _free_memory() -> int:
    """Bytes that can be had without swapping."""
    import os

    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
