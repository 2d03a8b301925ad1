from __future__ import annotations

import ctypes
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest

import lowered
from engine_recipes import MachineError, RecipesError, StageFailed
from engine_recipes.types import Sampling
from engine_recipes_engines.tensorrt_rtx.cuda import Device
from engine_recipes_engines.tensorrt_rtx.logging import logger
from engine_recipes_engines.tensorrt_rtx.runtime import RtxRuntime, simulated
from engine_recipes_engines.tensorrt_rtx.session import GraphSession, RtxSession, deserialise
from engine_recipes_engines.tensorrt_rtx.settings import Tensor, read_settings
from engines.tensorrt_rtx import standin

IDS = np.random.default_rng(2).integers(0, 250, 30).tolist()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama, lowered once for this file, with an engine file that the stand-in takes."""
    work = tmp_path_factory.mktemp("rtx")
    lowered.build(lowered.write_lively(work / "hf"), work)
    return standin.lower(work / "checkpoint", work / "rtx", longest=63)  # caches of 31.5 × 256 bytes


@pytest.fixture
def trt(monkeypatch: pytest.MonkeyPatch) -> standin.Trt:
    return standin.install(monkeypatch)


def two_lines(error: RecipesError) -> bool:
    return bool(error.hint) and "\n" not in error.message and "\n" not in error.hint


@pytest.mark.parametrize("index", ["INT64", "INT32"])
def test_a_gpu_session_feeds_an_engine_what_the_graph_is_fed(
    folder: Path, tmp_path: Path, trt: standin.Trt, index: str
) -> None:
    folder = standin.lower(folder.parent / "checkpoint", tmp_path / "rtx", longest=63, index=index)
    there, here = RtxRuntime(folder, {}), simulated(folder, {})
    for length in (30, 1, 63):  # the last in two pieces, with a buffer that grows
        ids = (IDS * 3)[:length]
        np.testing.assert_allclose(there.logits(ids), here.logits(ids), atol=1e-5)
    assert list(there.generate(IDS, Sampling(9))) == list(here.generate(IDS, Sampling(9)))
    prompts = [IDS, IDS[::-1]]
    assert [*there.generate_batch(prompts, Sampling(9))] == [*here.generate_batch(prompts, Sampling(9))]


def test_generations_on_a_gpu_have_caches_of_their_own(folder: Path, trt: standin.Trt) -> None:
    runtime = RtxRuntime(folder, {})
    alone = list(runtime.generate(IDS, Sampling(6))), list(runtime.generate(IDS[::-1], Sampling(6)))
    pairs = list(zip(runtime.generate(IDS, Sampling(6)), runtime.generate(IDS[::-1], Sampling(6)), strict=True))
    assert alone == ([a for a, _ in pairs], [b for _, b in pairs])


def test_gpu_memory_is_given_back(folder: Path, trt: standin.Trt) -> None:
    runtime = RtxRuntime(folder, {})
    list(runtime.generate(IDS[:1], Sampling(1)))
    held = len(trt.cuda.held)
    runtime.logits(IDS)  # in larger buffers
    assert len(trt.cuda.held) == held
    for stop in (frozenset({-1}), frozenset(list(runtime.generate(IDS, Sampling(1))))):
        list(runtime.generate(IDS, Sampling(3), stop))
    left = runtime.generate(IDS, Sampling(9))
    next(left)
    assert len(trt.cuda.held) == held + 1
    del left  # nobody asks for the rest
    assert len(trt.cuda.held) == held
    going = runtime.generate(IDS, Sampling(9))
    next(going)
    runtime.close()
    runtime.close()
    assert not trt.cuda.held
    assert not trt.cuda.streams
    with pytest.raises(ValueError, match="closed"):
        next(going)


def test_a_cache_that_does_not_fit_says_what_is_needed(folder: Path, trt: standin.Trt) -> None:
    runtime = RtxRuntime(folder, {})
    trt.cuda.room = 20_000
    with pytest.raises(
        MachineError, match=r"the KV cache of 2 sequences takes .* GB of GPU memory, Stand-in 40 has"
    ) as e:
        list(runtime.generate_batch([IDS, IDS], Sampling(3)))
    assert two_lines(e.value)
    assert "--set build.max_seq_len or build.max_batch_size" in e.value.hint
    trt.cuda.room = 1 << 26
    assert len(list(runtime.generate_batch([IDS, IDS], Sampling(3)))) == 3


def test_a_buffer_that_cannot_grow_is_forgotten_and_taken_again_later(
    folder: Path, trt: standin.Trt, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = RtxRuntime(folder, {})
    good = list(runtime.generate(IDS, Sampling(4)))
    with monkeypatch.context() as patch:
        malloc = standin.Cuda.cudaMalloc
        none = (standin.Error.cudaErrorMemoryAllocation, None)
        wanted = 20 * 256 * 4  # logits of 20 tokens
        patch.setattr(standin.Cuda, "cudaMalloc", lambda cuda, size: none if size == wanted else malloc(cuda, size))
        with pytest.raises(MachineError, match=r"logits takes .* GB of GPU memory"):
            runtime.logits(IDS[:20])
    assert list(runtime.generate(IDS, Sampling(4))) == good


def renamed(tensors: list[Tensor]) -> list[Tensor]:
    return [replace(tensors[0], name="tokens"), *tensors[1:]]


def retyped(tensors: list[Tensor]) -> list[Tensor]:
    return [replace(tensors[0], dtype="INT32"), *tensors[1:]]


def reshaped(tensors: list[Tensor]) -> list[Tensor]:
    return [*tensors[:-1], replace(tensors[-1], shape=[*tensors[-1].shape[:-1], 99])]


@pytest.mark.parametrize(
    ("described", "message"),
    [
        (lambda s: {"inputs": renamed(s.inputs)}, "input_ids is in one of them"),
        (lambda s: {"inputs": s.inputs[1:]}, "input_ids is in one of them"),
        (lambda s: {"inputs": retyped(s.inputs)}, r"input_ids is INT32 \[-1, -1\], not INT64"),
        (lambda s: {"inputs": reshaped(s.inputs)}, r"past_key_values.2.value is FLOAT \[-1, 2, 63, 99\], not FLOAT"),
        (lambda s: {"outputs": reshaped(s.outputs)}, r"logits is FLOAT \[-1, -1, 99\], not FLOAT \[-1, -1, 256\]"),
        (lambda s: {"chunk": 47}, r"takes input_ids up to \[4, 47\], not \[4, 48\]"),
        (lambda s: {"chunk": 49}, r"takes input_ids up to \[4, 49\], not \[4, 48\]"),
        (lambda s: {"max_batch_size": 3}, r"takes input_ids up to \[3, 48\], not \[4, 48\]"),
    ],
)
def test_an_engine_that_its_notes_do_not_describe_is_refused(
    folder: Path, trt: standin.Trt, described: Any, message: str
) -> None:
    trt.described = described(read_settings(folder))
    with pytest.raises(StageFailed, match=f"is not the engine that rtx.json describes: .*{message}") as caught:
        RtxRuntime(folder, {})
    assert two_lines(caught.value)
    assert not trt.cuda.streams


def test_an_engine_that_updates_another_cache_is_refused(folder: Path, trt: standin.Trt) -> None:
    trt.aliases = {"present.1.value": "past_key_values.0.value"}
    with pytest.raises(StageFailed, match=r"updates past_key_values\.0\.value in place of present\.1\.value"):
        RtxRuntime(folder, {})
    trt.aliases = {"present.1.value": None}  # the library need not tell
    RtxRuntime(folder, {}).close()


def test_sizes_that_an_engine_fixed_are_no_difference(folder: Path, trt: standin.Trt) -> None:
    settings = read_settings(folder)
    inputs = [replace(one, shape=[4, *one.shape[1:]]) for one in settings.inputs]  # of as many sequences always
    trt.described = {"inputs": inputs}
    RtxRuntime(folder, {}).close()


@pytest.mark.parametrize(
    ("refusal", "kind", "message", "hint"),
    [
        (("it does not support this compute capability", 2), MachineError, "Stand-in 40 .sm89.: it does not", "sm89"),
        (("Serialization: no compute capability", 0), MachineError, "no compute", "--target sm89"),
        (("Serialization: size", 2), StageFailed, "is damaged: Serialization: size", "again"),
        (("old", 4), MachineError, "refuses model.engine", "update the NVIDIA driver"),
        (("Out of memory", 0), MachineError, "Out of memory", "build.max_seq_len"),
        (("needs more", 16), MachineError, "needs more", "build.max_seq_len"),
        (("Serialization version 3", 1), MachineError, "version 3", "tensorrt-rtx-cu13"),
        (("Serialization assertion\nfailed", 0), StageFailed, "is damaged: Serialization assertion failed", "again"),
        (("magic", 32), StageFailed, "is damaged: magic", "again"),
        (("what nobody foresaw", 0), MachineError, "what nobody foresaw", "nvidia-smi"),
    ],
)
def test_a_refused_engine_is_two_lines_with_the_librarys_words(
    folder: Path, trt: standin.Trt, refusal: tuple[str, int], kind: type[RecipesError], message: str, hint: str
) -> None:
    trt.refusal = refusal
    with pytest.raises(kind, match=message) as caught:
        RtxSession(folder / "model.engine", read_settings(folder))
    assert hint in caught.value.hint
    assert two_lines(caught.value)
    assert not trt.cuda.streams


@pytest.mark.parametrize("content", [None, b"", b"nonsense" * 9])
def test_a_damaged_engine_is_two_lines(folder: Path, tmp_path: Path, trt: standin.Trt, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "model.engine").write_bytes(content)
    with pytest.raises(StageFailed) as caught:
        RtxSession(tmp_path / "model.engine", read_settings(folder))
    assert two_lines(caught.value)
    assert caught.value.hint == "build the engine again"


def test_an_engine_without_room_or_with_a_failing_step_says_why(folder: Path, trt: standin.Trt) -> None:
    trt.no_context = "Requested 9000\nbytes"
    with pytest.raises(MachineError, match="no room for the engine's activations: Requested 9000 bytes"):
        RtxRuntime(folder, {})
    trt.no_context, trt.no_step = "", "no such tactic"
    runtime = RtxRuntime(folder, {})
    with pytest.raises(MachineError, match="could not run a step: no such tactic") as caught:
        runtime.logits(IDS)
    assert two_lines(caught.value)
    trt.no_step = "the next reason"
    with pytest.raises(MachineError, match="the next reason"):
        runtime.logits(IDS)


@pytest.mark.parametrize(
    ("function", "code", "message", "hint"),
    [
        ("cudaSetDevice", standin.Error.cudaErrorNoDevice, "cudaErrorNoDevice", "CUDA_VISIBLE_DEVICES"),
        ("cudaSetDevice", standin.Error.cudaErrorInsufficientDriver, "Insufficient", "update the NVIDIA driver"),
        ("cudaStreamCreate", standin.Error.cudaErrorInvalidValue, "cudaStreamCreate: it said", "nvidia-smi"),
    ],
)
def test_a_device_that_cuda_refuses_is_two_lines(
    trt: standin.Trt, function: str, code: standin.Error, message: str, hint: str
) -> None:
    trt.cuda.fail[function] = code
    with pytest.raises(MachineError, match=message) as caught:
        Device()
    assert hint in caught.value.hint
    assert two_lines(caught.value)


def test_what_cuda_reports_later_is_two_lines(folder: Path, trt: standin.Trt) -> None:
    runtime = RtxRuntime(folder, {})
    trt.cuda.fail["cudaStreamSynchronize"] = standin.Error.cudaErrorIllegalAddress
    with pytest.raises(MachineError, match="CUDA failed in cudaStreamSynchronize: it said cudaErrorIllegal") as caught:
        runtime.logits(IDS)
    assert two_lines(caught.value)


def test_without_a_driver_the_real_libraries_refuse_in_two_lines(folder: Path) -> None:
    program = "import sys; from pathlib import Path; from engine_recipes import MachineError\n"
    program += "from engine_recipes_engines.tensorrt_rtx.runtime import RtxRuntime\n"
    program += "try: RtxRuntime(Path(sys.argv[1]), {})\n"
    program += "except MachineError as error: print(error.message, error.hint, sep='\\n')"
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder)],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": ":".join(sys.path), "PATH": "", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr
    message, hint = done.stdout.splitlines()
    assert "NVIDIA" in message or "CUDA" in message
    assert hint


def test_the_real_library_tells_a_damaged_engine_from_a_machine_that_cannot_run_it(tmp_path: Path) -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    log = logger(trt)
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    network.mark_output(network.add_identity(network.add_input("x", trt.float16, (1, 8))).get_output(0))
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM75, 0)
    engine = bytes(builder.build_serialized_network(network, config))
    device: Any = SimpleNamespace(name="no GPU", target="sm0")  # it is only named in the message
    for content, kind in ((engine, MachineError), (engine[: len(engine) // 2], StageFailed), (b"no" * 99, StageFailed)):
        (tmp_path / "model.engine").write_bytes(content)
        log.errors.clear()
        with pytest.raises(kind) as caught:
            deserialise(trt.Runtime(log), tmp_path / "model.engine", log.errors, device)
        assert two_lines(caught.value)


def test_the_bits_of_a_refusal_are_those_of_the_library() -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    bits = {name: int(value) for name, value in trt.EngineInvalidityDiagnostics.__members__.items()}
    assert bits == {
        "VERSION_MISMATCH": 1,
        "UNSUPPORTED_CC": 2,
        "OLD_CUDA_DRIVER": 4,
        "OLD_CUDA_RUNTIME": 8,
        "INSUFFICIENT_GPU_MEMORY": 16,
        "MALFORMED_ENGINE": 32,
        "CUDA_ERROR": 64,
    }


@pytest.mark.parametrize("dtype", ["FLOAT", "FLOAT16", "BFLOAT16"])
def test_the_graph_updates_a_cache_of_any_type_in_place(tmp_path: Path, dtype: str) -> None:
    code = getattr(onnx.TensorProto, dtype)
    helper = onnx.helper
    inputs = [
        helper.make_tensor_value_info("past_key_values.0.key", code, ["B", 2, 4, 8]),
        helper.make_tensor_value_info("input_ids", onnx.TensorProto.INT64, ["B", "S"]),
    ]
    outputs = [
        helper.make_tensor_value_info("present.0.key", code, ["B", 2, 4, 8]),
        helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, ["B", "S"]),
    ]
    one = helper.make_tensor("one", onnx.TensorProto.FLOAT, [], [1.0])
    nodes = [
        helper.make_node("Cast", ["past_key_values.0.key"], ["wide"], to=onnx.TensorProto.FLOAT),
        helper.make_node("Add", ["wide", "one"], ["more"]),
        helper.make_node("Cast", ["more"], ["present.0.key"], to=code),
        helper.make_node("Cast", ["input_ids"], ["logits"], to=onnx.TensorProto.FLOAT),
    ]
    graph = helper.make_graph(nodes, "counts", inputs, outputs, [one])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    onnx.save(model, tmp_path / "model.onnx")
    session = GraphSession(tmp_path / "model.onnx", {})
    cache, out = session.cache(3), np.zeros((3, 1), np.float32)
    size = 3 * 2 * 4 * 8 * (4 if dtype == "FLOAT" else 2)

    def content() -> bytes:
        return ctypes.string_at(cache.addresses["0.key"], size)

    assert content() == bytes(size)
    for number in (1.0, 2.0):
        session.run({"input_ids": np.full((3, 1), 7)}, cache, out)
        array = onnx.numpy_helper.to_array(helper.make_tensor("x", code, [1], [number]))
        assert content() == array.tobytes() * (size // array.itemsize)
    assert out.tolist() == [[7]] * 3
