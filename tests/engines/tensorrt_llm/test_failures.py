"""Known failures, each by a line that was recorded: from TensorRT-LLM's source, from Python, or from users' reports."""

from __future__ import annotations

import pytest

from engine_recipes_engines.tensorrt_llm.failures import FAILURES, blames_timing_cache, explain, last_words

RECORDED = {
    'docker: Error response from daemon: could not select device driver "" with capabilities: [[gpu]].': "have GPUs",
    "Error: setting up CDI devices: unresolvable CDI devices nvidia.com/gpu=all": "nvidia.com/gpu=all is not known",
    "Unable to find image 'nvcr.io/nvidia/tensorrt-llm/release:1.2.1' locally": "the image nvcr.io/nvidia/tensorrt-llm",
    "ModuleNotFoundError: No module named 'tensorrt_llm'": "the environment has no tensorrt_llm",
    "ImportError: libcuda.so.1: cannot open shared object file: No such file or directory": "the NVIDIA driver",
    "ImportError: libmpi.so.12: cannot open shared object file: No such file or directory": "libmpi.so.12",
    "RuntimeError: CUDA driver version is insufficient for CUDA runtime version": "driver is too old",
    "ValueError: max_workers must be greater than 0": "TensorRT-LLM sees no GPU",
    "RuntimeError: No CUDA GPUs are available": "TensorRT-LLM sees no GPU",
    "[TRT] [E] Version tag does not match. Current Version: 0, Serialized Engine Version: 237": "another version",
    "Error: Platform (Cuda): expecting compute 9.0 got compute 8.9, please rebuild.": "compute capability 9.0",
    "OSError: [Errno 28] No space left on device": "no space left on the device",
    "[TRT] [W] Requested amount of GPU memory (24793579520 bytes) could not be allocated. There may not be enough free "
    "memory for allocation to succeed.": "24793579520 bytes could not be had",
    "[TRT] [E] 2: [virtualMemoryBuffer.cpp::resizePhysical::140] Error Code 2: OutOfMemory (no further information)": (
        "the GPU's memory is too small"
    ),
    "[E] Error[1]: [defaultAllocator.cpp::allocate::31] Error Code 1: Cuda Runtime (out of memory)": "GPU's memory",
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.": "the GPU's memory is too small",
    "MemoryError": "this machine's memory is too small",
    "terminate called after throwing an instance of 'std::bad_alloc'": "this machine's memory is too small",
    "RuntimeError: Required but not provided tensors: {'transformer.layers.0.attention.qkv.per_channel_scale'}": (
        "transformer.layers.0.attention.qkv.per_channel_scale"
    ),
    "AssertionError: The value updated is not the same shape as the original. Updated: (32064, 64)": "not the shape",
    "safetensors_rust.SafetensorError: Error while deserializing header: MetadataIncompleteBuffer": "is damaged",
    "ValueError: Unsupported rotary scaling type: default": "the rope scaling default",
    "RuntimeError: Unsupported model architecture: LlamaForCausalLM": "the architecture LlamaForCausalLM",
    "RuntimeError: FP8 Paged Context FMHA only works with fp8 quantization workflow currently.": "needs FP8 weights",
    "RuntimeError: Paged Context FMHA doesn't work with int8 kv cache currently.": "an INT8 KV cache",
    "  what():  [TensorRT-LLM][ERROR] Assertion failed: FP8 FMHA cannot be enabled except on Ada or Hopper Arch.": (
        "no FP8 attention for this GPU"
    ),
    "Error Code 9: Internal Error (LLaMAForCausalLM/transformer/layers/0/attention/qkv/PLUGIN_V2_Gemm_0: could not "
    "find any supported formats consistent with input/output data types)": "dtype is not the checkpoint's",
    "[TensorRT-LLM][ERROR] Assertion failed: Head size 100 is not supported by MMHA.": "heads of 100",
    "  what():  [TensorRT-LLM][ERROR] Assertion failed: No valid weight only groupwise GEMM tactic(It is usually "
    "caused by the failure to execute all candidate configurations of the CUTLASS kernel": "no int4 kernel",
    "[TensorRT-LLM][ERROR] Assertion failed: Can't free tmp workspace for GEMM tactics profiling.": "no int4 kernel",
    "Assertion failed: Unsupported architecture (/src/tensorrt_llm/cpp/fmhaRunner.cpp:87)": "no kernels for this GPU",
    "trtllm-build: error: argument --gemm_plugin: invalid choice: 'nvfp4'": "does not take that value of --gemm_plugin",
    "trtllm-build: error: unrecognized arguments: --dora_plugin enable": "no option --dora_plugin",
}


@pytest.mark.parametrize("line", RECORDED)
def test_recorded_lines_are_explained(line: str) -> None:
    around = ["[TRT-LLM] [I] Build TensorRT engine Unnamed Network 0", line, "AssertionError: Engine building failed"]
    error = explain(around)
    assert error is not None
    assert RECORDED[line] in error.message
    assert error.hint
    assert "{" not in error.message + error.hint
    assert line in error.output


def test_every_known_failure_has_a_recorded_line() -> None:
    found = {error.message for line in RECORDED if (error := explain([line]))}
    assert len(found) >= len(FAILURES)


def test_a_traceback_that_quotes_the_program_is_not_what_it_said() -> None:
    lines = ["Traceback (most recent call last):", '  File "x.py", line 1, in load']
    lines += ['    raise RuntimeError(f"Required but not provided tensors: {missing}")', "KeyError: 'architecture'"]
    assert explain(lines) is None
    assert last_words(lines) == "KeyError: 'architecture'"


def test_what_follows_from_a_failure_is_not_its_last_word() -> None:
    lines = ["KeyError: 'architecture'", "Traceback (most recent call last):", "    assert len(exceptions) == 0"]
    assert last_words([*lines, "AssertionError: Engine building failed, please check error log."]) == lines[0]
    assert last_words([]) == "it said nothing"


@pytest.mark.parametrize(
    "line",
    [
        "[TRT-LLM] [W] Invalid timing cache, using freshly created one",
        "[TRT] [E] 4: The timing cache will not be used!",
        "Error Code 1: Serialization (assertion magicTagRead == kMAGIC_TAG failed.Magic tag does not match)",
    ],
)
def test_a_timing_cache_that_cannot_be_used_is_recognised(line: str) -> None:
    assert blames_timing_cache([line])
    assert not blames_timing_cache(["[TRT] [I] Global timing cache in use. Profiling results will be stored."])
