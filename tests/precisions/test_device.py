from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import tiny
from converted import FAMILIES
from engine_recipes import MachineError, events
from engine_recipes_precisions import device

CUDA_SAYS = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.64 GiB of which 1.20 GiB is "
    "free. Including non-PyTorch memory, this process has 22.44 GiB memory in use."
)


def fails(times: int, seen: list[int]) -> Callable[[int, int], None]:
    """Takes rows, but runs out of memory the first so many times."""
    left = times

    def forward(start: int, stop: int) -> None:
        nonlocal left
        if left:
            left -= 1
            raise torch.OutOfMemoryError(CUDA_SAYS)
        seen.extend(range(start, stop))

    return forward


def test_halves_until_it_fits_and_stays_there() -> None:
    freed: list[int] = []
    parts = device.Parts(8, "a row")
    seen: list[int] = []
    said: list[events.Event] = []
    with events.sink(said.append):
        parts.run(8, fails(2, seen), lambda: freed.append(1))
    assert (parts.rows, seen, len(freed)) == (2, list(range(8)), 2)
    assert said[-1]["text"] == "out of memory: going on with 2 rows at a time"
    sizes: list[int] = []
    parts.run(5, lambda start, stop: sizes.append(stop - start))
    assert sizes == [2, 2, 1]


def test_when_not_even_one_row_fits() -> None:
    with pytest.raises(MachineError) as caught:
        device.Parts(8, "a row of 512 tokens").run(8, fails(99, []))
    assert str(caught.value).splitlines() == [
        "the GPU has too little memory, a row of 512 tokens does not fit: 2.00 GiB more needed, "
        "GPU 0 has a total capacity of 23.64 GiB of which 1.20 GiB is free",
        "--set calib.seq_len=256 or less, --set device=cpu, or a GPU with nothing else on it",
    ]


def test_other_errors_are_not_memory() -> None:
    def forward(start: int, stop: int) -> None:
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        device.Parts(8, "a row").run(8, forward)


def test_memory_errors_elsewhere_have_two_lines() -> None:
    with pytest.raises(MachineError, match="weights of two layers") as caught, device.memory_errors():
        raise torch.OutOfMemoryError("short")
    assert len(str(caught.value).splitlines()) == 2
    assert "seq_len" not in caught.value.hint  # weights do not become smaller with shorter rows


def test_choosing_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device.choose("auto") == device.choose("cpu") == torch.device("cpu")
    with pytest.raises(MachineError, match="device = cuda") as caught:
        device.choose("cuda")
    assert "--set device=cpu" in caught.value.hint
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert device.choose("auto") == device.choose("cuda") == torch.device("cuda")
    assert device.choose("cpu") == torch.device("cpu")


@pytest.mark.parametrize(("flags", "dtype"), [({"avx512_bf16"}, "bfloat16"), ({"avx2"}, "float32")])
def test_the_dtype_that_a_cpu_is_fast_in(monkeypatch: pytest.MonkeyPatch, flags: set[str], dtype: str) -> None:
    monkeypatch.setattr(device, "_cpu_flags", lambda: flags)
    assert device.compute_dtype(torch.device("cpu")) is getattr(torch, dtype)


@pytest.mark.parametrize(("capability", "dtype"), [((7, 5), "float32"), ((8, 0), "bfloat16"), ((9, 0), "bfloat16")])
def test_the_dtype_that_a_gpu_is_fast_in(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], dtype: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert device.compute_dtype(torch.device("cuda")) is getattr(torch, dtype)


def test_batch_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = FAMILIES["LlamaForCausalLM"].resolve_checkpoint(tiny.config())

    def rows(where: str, free: int, seq_len: int) -> int:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, 1 << 40))
        return device.batch_size(decoder, torch.device(where), seq_len, taken=1 << 20, width=2)

    assert [rows("cpu", 0, length) for length in (128, 512, 9999)] == [32, 8, 1]
    assert rows("cuda", 1 << 40, 512) == device.GPU_ROWS
    assert rows("cuda", 0, 512) == 1
    assert 1 < rows("cuda", 30 << 20, 512) < device.GPU_ROWS


def test_hidden_states_that_do_not_fit_stay_with_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (1000, 2000))
    assert device.place_hidden(torch.device("cuda"), 300) == torch.device("cuda")
    assert device.place_hidden(torch.device("cuda"), 500) == torch.device("cpu")
    assert device.place_hidden(torch.device("cpu"), 500) == torch.device("cpu")
