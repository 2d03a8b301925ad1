"""What TensorRT-LLM, TensorRT and containers say when they fail, and what it means. Pure.

The texts are those of releases 0.17 to 1.2 and of users' reports. The first entry that is found anywhere in the output
counts, so causes stand before what follows from them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from engine_recipes import StageFailed

_SMALLER = "set build.max_num_tokens and build.max_batch_size lower, or quantise the model"
_AGAIN = "build the checkpoint again: recipes build … --force"
_TOOLKIT = "install the NVIDIA container toolkit and restart the daemon (`recipes doctor`)"
_ELSEWHERE = "build it again on this machine: an engine belongs to one kind of GPU and one release of TensorRT"
_DTYPE = "leave build.gemm_plugin and build.gpt_attention_plugin at auto"
_KEPT_LINES = 40


@dataclass(frozen=True)
class Failure:
    """A known failure. `message` may name the groups of `pattern`, `{0}`."""

    pattern: str
    message: str
    hint: str


FAILURES = (
    # containers
    Failure(r"could not select device driver.*gpu", "the container cannot have GPUs", _TOOLKIT),
    Failure(
        r"unresolvable CDI devices? (\S+)",
        "the container cannot have GPUs: {0} is not known",
        "run `nvidia-ctk cdi generate --output=/etc/cdi/nvidia.yaml`",
    ),
    Failure(
        r"(?:Unable to find image|No such image:?) '?([^\s']+)'?",
        "the image {0} is not on this machine",
        "docker pull {0}",
    ),
    # the environment
    Failure(
        r"No module named '?(tensorrt_llm|tensorrt|tensorrt_libs)\b",
        "the environment has no {0}",
        "name one that has, with --set build.python=…",
    ),
    Failure(
        r"(libcuda\.so\S*|libnvidia-ml\.so\S*): cannot open shared object file",
        "the NVIDIA driver is not there: {0} cannot be loaded",
        "install the driver; in a container, the NVIDIA container toolkit",
    ),
    Failure(
        r"(lib\S+\.so\S*): cannot open shared object file",
        "the environment is not complete: {0} cannot be loaded",
        "install TensorRT-LLM as its documentation says, or give --runtime docker",
    ),
    Failure(
        r"CUDA driver version is insufficient|driver on your system is too old|forward compatibility was attempted",
        "the NVIDIA driver is too old for this TensorRT-LLM",
        "update the driver, or set build.version to an older release",
    ),
    Failure(
        r"max_workers must be greater than 0|No CUDA GPUs are available|no CUDA-capable device|Found no NVIDIA driver",
        "TensorRT-LLM sees no GPU",
        "look at `nvidia-smi` and CUDA_VISIBLE_DEVICES; as many GPUs as build.workers are needed",
    ),
    # an engine or a plan from elsewhere
    Failure(
        r"Version tag does not match\.?(.*)",
        "the engine was made by another version of TensorRT",
        _ELSEWHERE,
    ),
    Failure(
        r"expecting compute (\S+) got compute (\S+)",
        "the engine is for GPUs of compute capability {0}, or was made on one; this is another ({1})",
        _ELSEWHERE,
    ),
    # the checkpoint
    Failure(
        r"Required but not provided tensors: ?\{?'?([\w.]*)",
        "the checkpoint lacks tensors that TensorRT-LLM wants: {0}, …",
        _AGAIN,
    ),
    Failure(
        r"The value updated is not the same shape as the original(.*)",
        "a tensor of the checkpoint has not the shape that config.json implies",
        _AGAIN,
    ),
    Failure(
        r"SafetensorError|MetadataIncompleteBuffer|HeaderTooLarge|HeaderTooSmall|InvalidHeader",
        "a file of the checkpoint is damaged",
        _AGAIN,
    ),
    Failure(
        r"Unsupported (?:rotary scaling type|rope scaling): ?(\S+)",
        "this TensorRT-LLM does not know the rope scaling {0}",
        "set build.version=1.2.1, and use that release",
    ),
    Failure(
        r"Unsupported model architecture:? ?(\S+)|(\w+ForCausalLM) is not supported",
        "this TensorRT-LLM does not know the architecture {0}",
        "set build.version=1.2.1, and use that release",
    ),
    # combinations
    Failure(
        r"FP8 Paged Context FMHA only works with fp8 quantization workflow",
        "an FP8 KV cache needs FP8 weights while paged context FMHA is on",
        "set kv_cache=none, or build.use_paged_context_fmha=disable",
    ),
    Failure(
        r"(?i)paged context fmha (?:doesn't work|does not work|is not supported) with int8 kv",
        "an INT8 KV cache cannot be used while paged context FMHA is on",
        "set kv_cache=none, or build.use_paged_context_fmha=disable",
    ),
    Failure(
        r"FP8 FMHA cannot be enabled except on",
        "this TensorRT-LLM has no FP8 attention for this GPU",
        "set build.use_fp8_context_fmha=disable, or use a newer release",
    ),
    Failure(
        r"could not find any supported formats consistent with input/output data types",
        "a plugin's dtype is not the checkpoint's",
        _DTYPE,
    ),
    Failure(
        r"Head size (\d+) is not supported by MMHA|unsupported head_size (\d+)",
        "TensorRT-LLM has no attention kernel for heads of {0}",
        "use another engine for this model",
    ),
    Failure(
        r"No valid weight only groupwise GEMM tactic|Can't free tmp workspace for GEMM tactics profiling",
        "no int4 kernel fits this checkpoint on this GPU",
        "use group_size=128 or 64, or a newer TensorRT-LLM; else another precision",
    ),
    Failure(
        r"Unsupported [Aa]rch(?:itecture)?\b|no kernel image is available|Unsupported SM",
        "this TensorRT-LLM has no kernels for this GPU",
        "use a newer release (RTX 50 needs 0.20), or another GPU",
    ),
    Failure(
        r"(--\w+): invalid choice: (\S+)|argument (--\w+): invalid",
        "this trtllm-build does not take that value of {0}",
        "set build.version to the release that is installed, so that its options are known",
    ),
    Failure(
        r"unrecognized arguments: (--\w+)",
        "this trtllm-build has no option {0}",
        "set build.version to the release that is installed, so that its options are known",
    ),
    # memory and disk
    Failure(
        r"No space left on device|Disk quota exceeded",
        "no space left on the device",
        "free some: an engine is about as large as its checkpoint; or choose another place with --workspace",
    ),
    Failure(
        r"Requested amount of GPU memory \((\d+) bytes\)",
        "the GPU's memory is too small: {0} bytes could not be had",
        _SMALLER,
    ),
    Failure(
        r"Error Code 2: OutOfMemory|Cuda Runtime \(out of memory\)|CUDA out of memory|cudaErrorMemoryAllocation"
        r"|torch\.OutOfMemoryError|CUDA error: out of memory",
        "the GPU's memory is too small",
        _SMALLER,
    ),
    Failure(
        r"(?m)^MemoryError|std::bad_alloc|Cannot allocate memory|DefaultCPUAllocator: can't allocate memory",
        "this machine's memory is too small",
        "set build.workers=1, or build where there is more: TensorRT holds the weights about twice",
    ),
)
#: Said of a timing cache that cannot be used. TensorRT starts with an empty one, or dies of it.
_TIMING_CACHE = re.compile(
    r"[Ii]nvalid timing cache|timing cache will not be used|magicTagRead == kMAGIC_TAG"
    r"|(?:[Ff]ailed|[Cc]annot|[Cc]ould not).{0,40}timing cache|timing cache.{0,40}(?:corrupt|failed)"
)
_QUOTED = ("    ", '  File "')
_NOISE = re.compile(
    r"^(\s|Traceback|\^|~|\*{3}|[-=]{3}|$)|^AssertionError: Engine building failed, please check error log"
)
_WHAT_FOLLOWS = ("AssertionError: Engine building failed", "assert engine is not None")


def explain(lines: Iterable[str]) -> StageFailed | None:
    """The known failure in a tool's output; None if there is none. Its `output` are the last lines."""
    lines = list(lines)
    # a traceback quotes the program: what it would have said in every case
    text = "\n".join(line for line in lines if not line.startswith(_QUOTED))
    for failure in FAILURES:
        found = re.search(failure.pattern, text)
        if found:
            groups = [group.strip(".,'\"") for group in found.groups() if group]
            names = [*groups, "?", "?"]
            return StageFailed(failure.message.format(*names), failure.hint.format(*names), tail(lines))
    return None


def last_words(lines: Iterable[str]) -> str:
    """The last line that says something: of a traceback the error, and not what only follows from it."""
    said = [line.strip() for line in lines if not _NOISE.match(line)]
    return said[-1] if said else "it said nothing"


def blames_timing_cache(lines: Iterable[str]) -> bool:
    """Whether the timing cache was found unusable."""
    return any(_TIMING_CACHE.search(line) for line in lines)


def tail(lines: Iterable[str]) -> str:
    """The last lines, for an error."""
    return "\n".join(list(lines)[-_KEPT_LINES:])
