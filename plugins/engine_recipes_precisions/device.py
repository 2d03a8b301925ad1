"""Where a calibration computes, in which dtype, and how many rows fit at a time."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from engine_recipes import Decoder, MachineError, events

if TYPE_CHECKING:
    import torch

#: Tokens in a batch on a CPU: enough to keep two dozen cores busy, few enough for the activations to stay small.
CPU_TOKENS = 4096
#: Rows in a batch on a GPU, where more are not faster.
GPU_ROWS = 64
#: How much of a GPU's free memory the hidden states of all rows may take; else they stay in the host's memory.
HIDDEN_SHARE = 0.4


def choose(name: str) -> torch.device:
    """The device for the option `device`: auto, cpu or cuda.

    Raises:
        MachineError: cuda is asked for and there is none that torch can use.
    """
    import torch

    available = name != "cpu" and torch.cuda.is_available()
    if name == "cuda" and not available:
        build = "is built without CUDA" if torch.version.cuda is None else f"(CUDA {torch.version.cuda}) finds no GPU"
        raise MachineError(
            f"device = cuda, and torch {torch.__version__} {build}",
            "--set device=cpu, or install a CUDA build of torch that fits the driver",
        )
    return torch.device("cuda" if available else "cpu")


def compute_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device has units for it, else float32. Never float16: activations can overflow it, and
    on a CPU it is twenty times slower."""
    import torch

    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float32
    return torch.bfloat16 if {"avx512_bf16", "amx_bf16", "bf16"} & _cpu_flags() else torch.float32


def _cpu_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return set()
    return set(next((line for line in lines if line.startswith(("flags", "Features"))), "").split())


def describe(device: torch.device) -> str:
    """The device's name, for people."""
    import platform

    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.machine()})"


def wait(device: torch.device) -> None:
    """Wait until a GPU has done what it was given."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_bytes(device: torch.device) -> int:
    """The most GPU memory that was in use at once; 0 on a CPU."""
    import torch

    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def place_hidden(device: torch.device, nbytes: int) -> torch.device:
    """Where the hidden states of all rows stay between layers."""
    import torch

    if device.type == "cuda" and nbytes > HIDDEN_SHARE * torch.cuda.mem_get_info(device)[0]:
        events.log(f"{nbytes / 2**30:.1f} GiB of hidden states stay in the host's memory")
        return torch.device("cpu")
    return device


def batch_size(decoder: Decoder, device: torch.device, seq_len: int, taken: int, width: int) -> int:
    """How many rows to run at a time. A guess for GPUs: `Parts` halves it if it was too bold.

    Args:
        seq_len: tokens in a row.
        taken: bytes that will be in use beside the activations: weights, hidden states, sums.
        width: bytes of one number in the compute dtype.
    """
    import torch

    if device.type == "cpu":
        return max(1, CPU_TOKENS // seq_len)
    d = decoder
    attention = (2 * d.heads + 2 * d.kv_heads) * d.head_size * 2  # before and after rope
    token = (4 * d.hidden_size + attention + 4 * d.intermediate_size) * width + 4 * seq_len  # and a mask, as it is made
    free = torch.cuda.mem_get_info(device)[0] - taken
    return int(min(GPU_ROWS, max(1, 0.8 * free // (token * seq_len))))


class Parts:
    """Splits batches into parts that fit: halves them when the device runs out of memory, and stays there.

    Attributes:
        rows: how many rows a part has at most.
    """

    def __init__(self, rows: int, what: str) -> None:
        """`what` names one row in errors."""
        self.rows, self._what = rows, what

    def run(self, total: int, forward: Callable[[int, int], None], failed: Callable[[], None] = lambda: None) -> None:
        """Call `forward(start, stop)` until rows 0 to `total` went through.

        Args:
            total: how many rows there are.
            forward: after running out of memory it is called again for the first half of the same rows.
            failed: called before that, to drop what the attempt left and what belonged to the larger parts.

        Raises:
            MachineError: not even one row fits.
        """
        start = 0
        while start < total:
            stop = min(start + self.rows, total)
            refused = self._refused(forward, start, stop)
            if refused is None:
                start = stop
                continue
            if stop - start == 1:
                raise out_of_memory(refused, f"{self._what} does not fit", "--set calib.seq_len=256 or less, ")
            self.rows = (stop - start) // 2
            failed()
            free_cached()
            events.log(f"out of memory: going on with {self.rows} rows at a time")

    def _refused(self, forward: Callable[[int, int], None], start: int, stop: int) -> str | None:
        """None if it worked, else what the allocator said. Its traceback, which holds tensors, ends here."""
        import torch

        try:
            forward(start, stop)
        except torch.OutOfMemoryError as error:
            return str(error)
        return None


def free_cached() -> None:
    """Give what nothing refers to any more back to the GPU."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def out_of_memory(said: str, what: str, remedy: str = "") -> MachineError:
    """The error for a device that is too small. `said` is the allocator's message, `remedy` what else helps."""
    sentences = said.partition("Tried to allocate")[2].split(". ")
    tried = f": {sentences[0].strip()} more needed, {' '.join(sentences[1].split())}" if len(sentences) > 1 else ""
    return MachineError(
        f"the GPU has too little memory, {what}{tried}",
        f"{remedy}--set device=cpu, or a GPU with nothing else on it",
    )


@contextmanager
def memory_errors() -> Iterator[None]:
    """Running out of GPU memory anywhere inside, but in `Parts`, becomes an error with two lines."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise out_of_memory(str(error), "the weights of two layers do not fit") from None
