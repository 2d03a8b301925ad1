"""Two classes of it, each with the fields of which a server may need one."""

from dataclasses import dataclass, field


class KvCacheConfig:
    def __init__(self, *, free_gpu_memory_fraction: float | None = None, enable_block_reuse: bool = True) -> None:
        self.free_gpu_memory_fraction = free_gpu_memory_fraction
        self.enable_block_reuse = enable_block_reuse


@dataclass(kw_only=True)
class SamplingParams:
    end_id: int | None = None
    pad_id: int | None = None
    max_tokens: int = 32
    stop_token_ids: list[int] | None = None
    n: int = 1
    best_of: int | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    temperature: float | None = None
    return_context_logits: bool = False
    ignore_eos: bool = False
    _stream_interval: int | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.pad_id is None:
            self.pad_id = self.end_id
        if self.temperature is not None and not self.temperature > 0:
            raise ValueError(f"Requires temperature > 0, got {self.temperature}")
