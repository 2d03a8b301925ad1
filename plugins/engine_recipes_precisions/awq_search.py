"""What AWQ multiplies a linear layer's inputs by, found from the inputs' Gram matrix instead of the inputs.

The search is ModelOpt's `awq_lite`: eleven candidates between "scale by the weights" and "scale by the activations",
each judged by what 4-bit weights do to the layer's outputs. ModelOpt sends all tokens through the layer once per
candidate. The same sum needs no tokens: with D = W - Q(W s) / s and G = XᵀX over all tokens,

    sum over tokens |x Dᵀ|² = trace(D G Dᵀ)

so a candidate costs out·in·in instead of tokens·in·out, and the calibration keeps G instead of X.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, dtype

#: How much the activations count against the weights; ModelOpt's `alpha_step` of 0.1.
ALPHAS = tuple(step / 10 for step in range(11))

_LEVELS = 7.0  # a group's largest |weight| becomes ±7 of 4 bits; nothing becomes -8
_SMALLEST = 1e-30  # of a group's largest |weight|, so that a group of zeros stays zeros
_CPU_CACHE = 72 * 1024  # elements that a core quantizes at a time: two float32 copies stay in its cache
_CPU_ROWS = 96  # that a core judges at a time: times 11 candidates, enough for each read of G to be worth it
_CPU_COLUMNS = 384  # of G per product
_GPU_ELEMENTS = 2**25  # rows · candidates · in of a part: 0.3 GB of temporaries
_GPU_COLUMNS = 4096


def search(weight: Tensor, gram: Tensor, act_mean: Tensor, group_size: int, alphas: Sequence[float] = ALPHAS) -> Tensor:
    """The best `pre_quant_scale` of a linear layer: its inputs are multiplied by it, its weights divided.

    Args:
        weight: [out, in], float32, bfloat16 or float16. All tensors on one device.
        gram: G = XᵀX over all calibration tokens, float32 [in, in].
        act_mean: mean of |x| over all calibration tokens, float32 [in].
        group_size: weights in one row that share a scale; divides `in`.
        alphas: the candidates.

    Returns:
        float32 [in], positive. On a GPU nothing waits for it.
    """
    import torch

    with torch.no_grad():
        scales = candidates(act_mean, weight_scale(weight, group_size), alphas)
        best = losses(weight, gram, scales, group_size).argmin().view(1)
        return scales.index_select(0, best)[0].reciprocal()


def weight_scale(weight: Tensor, group_size: int) -> Tensor:
    """How large an input's weights are within their groups: mean over rows of |w| / the group's largest |w|.

    ModelOpt's `get_weight_scale`. Returns float32 [in], 0 … 1.
    """
    import torch

    rows, columns = weight.shape
    total = torch.zeros(columns, device=weight.device)
    for part in _parts(weight.detach(), _part_rows(weight, 1, 1)):
        groups = part.float().abs().view(-1, columns // group_size, group_size)
        groups /= groups.amax(-1, keepdim=True).clamp_(min=_SMALLEST)
        total += groups.view(-1, columns).sum(0)
    return total / rows


def candidates(act_mean: Tensor, weight_scale: Tensor, alphas: Sequence[float] = ALPHAS) -> Tensor:
    """What weights are multiplied by, for each alpha: act_mean^alpha / weight_scale^(1 - alpha), around 1.

    ModelOpt's `get_scale`: kept within 1e-4 … 1e4, then divided by the geometric mean of smallest and largest.
    Returns float32 [alphas, in].
    """
    import torch

    tiny = torch.finfo(act_mean.dtype).tiny
    # A tensor of the alphas would have to be copied to the GPU, and that waits for what runs there.
    ratios = [act_mean.pow(alpha) / (weight_scale.pow(1 - alpha) + tiny) for alpha in alphas]
    scales = torch.stack(ratios).clamp_(1e-4, 1e4)
    return scales / (scales.amax(1, keepdim=True) * scales.amin(1, keepdim=True)).sqrt()


def losses(weight: Tensor, gram: Tensor, scales: Tensor, group_size: int) -> Tensor:
    """Squared error that 4-bit weights cause, summed over tokens and outputs, for each candidate.

    ModelOpt's loss is the mean: this / (tokens · out). D and G are multiplied in bfloat16 where that is fast, in
    float64 for a float64 `gram`; sums are never bfloat16.

    Args:
        weight: [out, in].
        gram: XᵀX, float32 or float64 [in, in].
        scales: what the weights are multiplied by, as `candidates` returns them, [candidates, in].
        group_size: divides `in`.

    Returns:
        [candidates], of `gram`'s dtype.
    """
    import torch

    weight, scales = weight.detach(), scales.to(gram.dtype)
    workers = torch.get_num_threads() if _on_cpu(weight) else 1
    parts = _parts(weight, _part_rows(weight, len(scales), workers))
    columns = _upper_columns(gram, _product_dtype(gram))

    def judge(part: Tensor) -> Tensor:
        return _part_losses(part.to(gram.dtype), columns, scales, group_size)

    if workers == 1 or len(parts) == 1:
        return torch.stack([judge(part) for part in parts]).sum(0)
    # torch's own threads would meet after each of many short operations; one thread per part does not wait.
    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return torch.stack(list(pool.map(judge, parts))).sum(0)
    finally:
        torch.set_num_threads(workers)  # what a worker sets is also the default of threads that start later


def _parts(tensor: Tensor, rows: int) -> list[Tensor]:
    """Views of so many rows each; the last may have fewer."""
    return [tensor[start : start + rows] for start in range(0, len(tensor), rows)]


def _on_cpu(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"


def _product_dtype(gram: Tensor) -> dtype:
    """The dtype of D and G when they are multiplied: bfloat16 on GPUs, and on CPUs with instructions for it."""
    import torch

    if gram.dtype != torch.float32:
        return gram.dtype
    supported = [getattr(torch.cpu, f"_is_{name}_supported", bool) for name in ("amx_tile", "avx512_bf16")]
    return torch.bfloat16 if not _on_cpu(gram) or any(ask() for ask in supported) else gram.dtype


def _part_rows(weight: Tensor, candidates: int, workers: int) -> int:
    """Rows of the weight that are judged at a time: on CPUs each worker gets as many parts, of one size."""
    rows, columns = weight.shape
    if not _on_cpu(weight):
        return max(1, _GPU_ELEMENTS // (candidates * columns))
    parts = -(-rows // (_CPU_ROWS * workers)) * workers
    return -(-rows // parts)


def _upper_columns(gram: Tensor, product: dtype) -> list[Tensor]:
    """G's columns, some at a time, down to the diagonal; counted twice where the mirrored half is left out."""
    found = []
    step = _CPU_COLUMNS if _on_cpu(gram) else _GPU_COLUMNS
    for start in range(0, len(gram), step):
        columns = gram[: start + step, start : start + step].to(product, copy=True)
        columns[:start] *= 2
        found.append(columns)
    return found


def _part_losses(weight: Tensor, columns: Sequence[Tensor], scales: Tensor, group_size: int) -> Tensor:
    """`losses` of some rows.

    Args:
        weight: [rows, in], of the dtype to quantize in.
        columns: `_upper_columns`.
        scales: [candidates, in].
        group_size: divides `in`.
    """
    import torch

    rows, width = weight.shape
    step = max(1, _CPU_CACHE // width) if _on_cpu(weight) else rows
    errors = torch.empty(len(scales), rows, width, dtype=columns[0].dtype, device=weight.device)
    scratch = torch.empty(2, min(step, rows), width, dtype=weight.dtype, device=weight.device)
    for scale, error in zip(scales, errors, strict=True):
        for part, out in zip(_parts(weight, step), _parts(error, step), strict=True):
            _quantization_error(part, scale, group_size, scratch[:, : len(part)], out)
    # All candidates in one product, so that G is read once for them.
    errors = errors.view(-1, width)
    found = torch.zeros(len(scales), dtype=scales.dtype, device=weight.device)
    start = 0
    for part in columns:
        end = len(part)
        product = torch.mm(errors[:, :end], part).mul_(errors[:, start:end])
        found += product.view(len(scales), -1).sum(1, dtype=scales.dtype)
        start = end
    return found


def _quantization_error(weight: Tensor, scale: Tensor, group_size: int, scratch: Tensor, out: Tensor) -> None:
    """D = W - Q(W s) / s into `out`, with Q rounding to 4 bits in groups that share a step.

    Args:
        weight: [rows, in].
        scale: s, [in].
        group_size: divides `in`.
        scratch: [2, rows, in], overwritten; it stays in the cache, so every pass over it is cheap.
        out: [rows, in].
    """
    import torch

    value, other = scratch
    groups = value.view(len(value), -1, group_size)
    torch.mul(weight, scale, out=value)
    steps = torch.abs(value, out=other).view(groups.shape).amax(-1, keepdim=True).clamp_(min=_SMALLEST).div_(_LEVELS)
    groups.mul_(steps.reciprocal())
    value.sub_(torch.round(value, out=other))  # no clamp: the largest is 7
    groups.mul_(steps)
    out.copy_(value.mul_(scale.reciprocal()))
