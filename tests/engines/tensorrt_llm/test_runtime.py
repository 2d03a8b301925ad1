"""The runtime and its server, talking to a stand-in for TensorRT-LLM's Python API: real processes and pipes, no GPU."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine_recipes import MachineError, RecipesError, RequestError, events
from engine_recipes.types import Sampling
from engine_recipes_engines.tensorrt_llm import link, server
from engine_recipes_engines.tensorrt_llm.runtime import TensorRTLLMRuntime

API = Path(__file__).parents[2] / "data" / "trtllm" / "api"  # what is importable there
VOCABULARY = 251
PROMPT = [3, 1, 4, 1, 5]
Load = Callable[..., TensorRTLLMRuntime]


def likeliest(ids: list[int], count: int) -> list[int]:
    """What the stand-in says, greedily."""
    said = list(ids)
    for _ in range(count):
        said.append((sum(said) * 31 + 7) % VOCABULARY)
    return said[len(ids) :]


def write_engine(folder: Path, **build: Any) -> Path:
    """An engine's folder as trtllm-build writes it, without the engine."""
    plugins = {"use_paged_context_fmha": True, "context_fmha": True, "remove_input_padding": True}
    settings = {"max_seq_len": 64, "max_batch_size": 4, "max_num_tokens": 128, "gather_context_logits": True}
    config = {
        "version": "1.2.1",
        "pretrained_config": {"architecture": "LlamaForCausalLM", "vocab_size": VOCABULARY},
        "build_config": {**settings, "plugin_config": plugins, **build},
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_engine(tmp_path / "engine")


def write_python(folder: Path) -> Path:
    """An interpreter that has TensorRT-LLM, as the user's environment does."""
    folder.mkdir()
    for name, command in (("python", f'PYTHONPATH={API} exec {sys.executable} "$@"'), ("trtllm-build", "exit 1")):
        (folder / name).write_text(f"#!/bin/sh\n{command}\n")
        (folder / name).chmod(0o755)
    return folder / "python"


@pytest.fixture
def python(tmp_path: Path) -> Path:
    return write_python(tmp_path / "bin")


@pytest.fixture
def load(folder: Path, python: Path) -> Iterator[Load]:
    """Loads engines, and closes them in the end."""
    loaded: list[TensorRTLLMRuntime] = []

    def start(**options: Any) -> TensorRTLLMRuntime:
        engine = options.pop("folder", folder)
        loaded.append(TensorRTLLMRuntime(engine, {"python": str(python), **options}))
        return loaded[-1]

    yield start
    for runtime in loaded:
        runtime.close()


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TensorRTLLMRuntime]:
    """One for all tests that leave it as it is."""
    work = tmp_path_factory.mktemp("shared")
    runtime = TensorRTLLMRuntime(write_engine(work / "engine"), {"python": str(write_python(work / "bin"))})
    yield runtime
    runtime.close()


def servers(folder: Path) -> list[int]:
    """Processes that have to do with an engine, by their command line; and who was started by them."""
    found = {}
    for place in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((place / "stat").read_text().rpartition(")")[2].split()[1])
            found[int(place.name)] = (parent, (place / "cmdline").read_bytes(), (place / "stat").read_text())
        except (OSError, ValueError, IndexError):
            continue
    own = {pid for pid, (_, line, _) in found.items() if str(folder).encode() in line}
    return sorted(own | {pid for pid, (parent, _, _) in found.items() if parent in own})


def gone(pids: list[int], seconds: float = 10.0) -> bool:
    """Whether all of them end in time; a zombie has ended."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if not any(_runs(pid) for pid in pids):
            return True
        time.sleep(0.02)
    return False


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_tokens_come_one_by_one_while_the_libraries_print(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAND_IN", "slow")
    runtime = load()
    times = []
    tokens = []
    for token in runtime.generate(PROMPT, Sampling(8)):
        times.append(time.monotonic())
        tokens.append(token)
    assert tokens == likeliest(PROMPT, 8)
    assert times[-1] - times[0] > 0.05  # seven steps of 20 ms: it did not wait for the last


def test_generation_ends_before_any_of_the_stop_ids(runtime: TensorRTLLMRuntime) -> None:
    said = likeliest(PROMPT, 12)
    for at in (2, 4):  # one is the engine's end id, the others are stop words
        end = said.index(said[at])
        stop = frozenset({said[at], said[at + 3], 9999})
        assert list(runtime.generate(PROMPT, Sampling(12), stop)) == said[: min(end, said.index(said[at + 3]))]
    assert list(runtime.generate(PROMPT, Sampling(1), frozenset({said[0]}))) == []


def test_generation_fills_the_engine_and_no_more(runtime: TensorRTLLMRuntime) -> None:
    assert len(list(runtime.generate(PROMPT, Sampling(1000)))) == 64 - len(PROMPT)
    assert len(list(runtime.generate([1] * 63, Sampling(1000)))) == 1
    assert list(runtime.generate(PROMPT, Sampling(0))) == []


def test_sampling_depends_on_the_seed_alone(runtime: TensorRTLLMRuntime) -> None:
    first, again, other = (list(runtime.generate(PROMPT, Sampling(8, 0.7, seed))) for seed in (1, 1, 2))
    assert first == again != other
    assert first != likeliest(PROMPT, 8)


def test_a_batch_says_what_each_prompt_says_alone(runtime: TensorRTLLMRuntime) -> None:
    prompts = [[1, 2, 3], [7, 8, 9], [1, 1, 1]]
    steps = list(runtime.generate_batch(prompts, Sampling(6)))
    assert [list(column) for column in zip(*steps, strict=True)] == [likeliest(prompt, 6) for prompt in prompts]


def test_requests_that_are_open_together_do_not_mix(runtime: TensorRTLLMRuntime) -> None:
    prompts = [[5, 6], [7], [8, 9, 10]]
    turns = [runtime.generate(prompt, Sampling(6)) for prompt in prompts]
    said = list(zip(*turns, strict=True))
    assert [list(column) for column in zip(*said, strict=True)] == [likeliest(prompt, 6) for prompt in prompts]


def test_logits_are_float32_for_every_token_and_without_padding(runtime: TensorRTLLMRuntime) -> None:
    logits = runtime.logits(PROMPT)
    assert logits is not None and logits.dtype == np.float32 and logits.shape == (5, VOCABULARY)
    assert logits.argmax(1).tolist() == [likeliest(PROMPT[: row + 1], 1)[0] for row in range(5)]
    assert logits.max() == 2.5


def test_an_engine_built_without_logits_gives_none(load: Load, tmp_path: Path) -> None:
    runtime = load(folder=write_engine(tmp_path / "hidden", gather_context_logits=False))
    assert runtime.logits(PROMPT) is None
    assert list(runtime.generate(PROMPT, Sampling(3))) == likeliest(PROMPT, 3)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_logits_of_torch_become_the_bytes_of_float32(dtype: str) -> None:
    import torch

    tensor = torch.arange(24.0).reshape(1, 3, 8).to(getattr(torch, dtype))
    found = np.frombuffer(server.as_float32(tensor, 6), np.float32).reshape(3, 6)
    assert found.tolist() == tensor[0, :, :6].tolist()


@pytest.mark.parametrize(
    ("ids", "said"),
    [([], "empty"), ([1] * 64, "takes 63"), ([1, VOCABULARY], "vocabulary is 251"), ([-1], "from -1 to -1")],
)
def test_prompts_that_cannot_work_are_refused(runtime: TensorRTLLMRuntime, ids: list[int], said: str) -> None:
    for refused in (lambda: runtime.generate(ids, Sampling(4)), lambda: runtime.logits(ids)):
        with pytest.raises(RequestError, match=said):
            refused()


def test_batches_that_cannot_work_are_refused(runtime: TensorRTLLMRuntime) -> None:
    for prompts, said in (([], "one length"), ([[1], [1, 2]], "one length"), ([[1]] * 5, "takes 4")):
        with pytest.raises(RequestError, match=said):
            runtime.generate_batch(prompts, Sampling(4))


def test_prompts_longer_than_a_step_are_taken_in_chunks_where_the_engine_can(load: Load, tmp_path: Path) -> None:
    chunked = load(folder=write_engine(tmp_path / "chunked", max_num_tokens=16))
    assert chunked.max_seq_len == 63
    assert list(chunked.generate([1] * 40, Sampling(3))) == likeliest([1] * 40, 3)
    plain = load(folder=write_engine(tmp_path / "plain", max_num_tokens=16, plugin_config={}))
    assert plain.max_seq_len == 16
    with pytest.raises(RequestError, match="takes 16"):
        plain.generate([1] * 17, Sampling(3))


def test_who_stops_listening_cancels_and_may_ask_again(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAND_IN", "slow")
    lines: list[str] = []
    with events.sink(lambda event: lines.append(event.get("text", ""))):
        runtime = load()
        for number, _ in enumerate(runtime.generate(PROMPT, Sampling(50))):
            if number == 2:
                break
        assert list(runtime.generate([9], Sampling(4))) == likeliest([9], 4)
        runtime.close()
    assert [line for line in lines if line.startswith("cancelled after")]


def test_a_killed_server_is_an_error_at_once_and_nothing_is_left(
    load: Load, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAND_IN", "slow")
    runtime = load()
    steps = runtime.generate(PROMPT, Sampling(50))
    next(steps)
    pids = servers(folder)
    os.kill(pids[0], signal.SIGKILL)
    with pytest.raises(MachineError, match="was killed") as caught:
        list(steps)
    assert "memory" in caught.value.hint
    with pytest.raises(MachineError, match="was killed"):
        runtime.logits(PROMPT)
    runtime.close()
    assert gone(pids)


def test_an_error_in_the_middle_says_what_tensorrt_llm_says(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAND_IN", "fails")
    runtime = load()
    steps = runtime.generate(PROMPT, Sampling(50))
    assert [next(steps), next(steps)] == likeliest(PROMPT, 2)
    with pytest.raises(RecipesError, match="memory"):
        next(steps)


@pytest.mark.parametrize(
    ("settings", "kind", "said"),
    [
        ({"STAND_IN": "other gpu"}, RecipesError, r"8\.9.*9\.0"),
        ({"STAND_IN": "no driver"}, RecipesError, "driver|libcuda"),
        ({"STAND_IN": "dies"}, MachineError, "died|exit code 134"),
        ({"STAND_IN_VERSION": "1.3.0"}, MachineError, r"1\.3\.0 runs no TensorRT engines"),
    ],
)
def test_an_engine_that_cannot_be_loaded_says_why(
    load: Load, folder: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, str], kind: type, said: str
) -> None:
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(kind, match=said):
        load()
    assert gone(servers(folder))


def test_a_python_without_tensorrt_llm_is_named(load: Load, python: Path) -> None:
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    with pytest.raises(RecipesError, match="tensorrt_llm"):
        load()


def test_releases_before_1_0_load_with_their_own_class(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAND_IN_VERSION", "0.17.0")
    assert list(load().generate(PROMPT, Sampling(3))) == likeliest(PROMPT, 3)


def test_loading_that_hangs_ends_in_time_with_its_children(
    load: Load, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAND_IN", "hang")
    seen: list[int] = []

    def listen(event: dict[str, Any]) -> None:
        if event.get("text") == "child":
            seen.extend(servers(folder))

    with events.sink(listen), pytest.raises(MachineError, match="not loaded within 2 s"):
        load(load_timeout=2)
    assert len(seen) >= 2 and gone(seen)


def test_the_kv_cache_takes_its_share_and_reuses_nothing(load: Load) -> None:
    lines: list[str] = []
    with events.sink(lambda event: lines.append(event.get("text", ""))):
        load(free_gpu_memory_fraction=0.25).close()
    assert "LLM: {'free_gpu_memory_fraction': 0.25, 'enable_block_reuse': False}, single process 1" in lines


def test_loading_shows_progress(load: Load) -> None:
    seen: list[dict[str, Any]] = []
    with events.sink(seen.append):
        load()
    assert {"label": "loading engine", "unit": "seconds"}.items() <= next(e for e in seen if "label" in e).items()


def test_closing_shuts_down_once_and_ends_what_is_open(
    load: Load, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAND_IN", "slow")
    lines: list[str] = []
    with events.sink(lambda event: lines.append(event.get("text", ""))):
        runtime = load()
        pids = servers(folder)
        steps = runtime.generate(PROMPT, Sampling(50))
        next(steps)
        runtime.close()
        runtime.close()
    assert pids and gone(pids)
    assert lines.count("shut down") == 1
    for asked in (lambda: list(steps), lambda: runtime.generate(PROMPT, Sampling(1)), lambda: runtime.logits(PROMPT)):
        with pytest.raises(ValueError, match="closed"):
            asked()


def test_a_server_that_does_not_shut_down_is_killed(load: Load, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAND_IN", "stuck")
    monkeypatch.setattr(link, "_GRACE", 0.3)
    runtime = load()
    pids = servers(folder)
    runtime.close()
    assert pids and gone(pids, 2)


def test_a_forgotten_runtime_ends_its_server(folder: Path, python: Path) -> None:
    runtime = TensorRTLLMRuntime(folder, {"python": str(python)})
    pids = servers(folder)
    del runtime
    gc.collect()
    assert pids and gone(pids)


@pytest.mark.parametrize("mode", ["", "stuck", "hang"])
def test_the_server_ends_with_its_parent_even_if_that_is_killed(folder: Path, python: Path, mode: str) -> None:
    program = f"""
from pathlib import Path
from engine_recipes import Sampling, events
from engine_recipes_engines.tensorrt_llm.runtime import TensorRTLLMRuntime
with events.sink(lambda event: print(event.get("text", ""), flush=True)):
    runtime = TensorRTLLMRuntime(Path({str(folder)!r}), {{"python": {str(python)!r}}})
    for token in runtime.generate([1], Sampling(60)):
        print("token", flush=True)
"""
    parent = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, env={**os.environ, "STAND_IN": mode or "slow"}
    )
    assert parent.stdout
    with parent:
        for line in parent.stdout:
            if line.strip() == (b"child" if mode == "hang" else b"token"):
                break
        pids = servers(folder)
        parent.kill()
    assert len(pids) >= 2 and gone(pids)


def test_the_manifest_says_where_it_was_built_and_options_go_before_it(folder: Path, python: Path) -> None:
    (folder / "manifest.json").write_text(json.dumps({"options": {"python": "/nowhere/python", "runtime": "local"}}))
    with pytest.raises(MachineError, match="/nowhere"):
        TensorRTLLMRuntime(folder, {})
    TensorRTLLMRuntime(folder, {"python": str(python)}).close()


@pytest.mark.parametrize("text", [None, "{", "[]", '{"pretrained_config": {}, "build_config": {}}'])
def test_a_folder_that_holds_no_engine_is_refused(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(RequestError, match="holds no TensorRT-LLM engine"):
        TensorRTLLMRuntime(tmp_path, {})


@pytest.mark.parametrize("options", [{"load_timeout": 0}, {"load_timeout": "soon"}, {"free_gpu_memory_fraction": 1.5}])
def test_options_out_of_range_are_refused(folder: Path, options: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=next(iter(options))):
        TensorRTLLMRuntime(folder, options)


@pytest.mark.parametrize("mode", ["", "stuck"])
def test_a_container_is_told_what_it_sees_and_is_killed_if_it_does_not_end(
    load: Load, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    """A `docker` that greets as NVIDIA's images do, runs the command here, and writes down how it was called."""
    (tmp_path / "tools").mkdir()
    docker = tmp_path / "tools" / "docker"
    docker.write_text(
        f"""#!{sys.executable}
import os, sys
with open({str(tmp_path / "calls")!r}, "a") as file:
    print(*sys.argv[1:], file=file)
if sys.argv[1] == "run":
    print("== TensorRT-LLM Release 1.2.1 ==", "{{}}", "[1]", sep=chr(10), flush=True)
    os.environ["PYTHONPATH"] = {str(API)!r}
    os.execv(sys.executable, [sys.executable, *sys.argv[sys.argv.index("python3") + 1 :]])
"""
    )
    docker.chmod(0o755)
    monkeypatch.setenv("PATH", str(docker.parent), prepend=os.pathsep)
    monkeypatch.setenv("STAND_IN", mode)
    monkeypatch.setattr(link, "_GRACE", 0.3 if mode else 10)
    (tmp_path / "plain-name").symlink_to(folder)
    runtime = load(folder=tmp_path / "plain-name", runtime="docker", image="some/image:1")
    assert list(runtime.generate(PROMPT, Sampling(2))) == likeliest(PROMPT, 2)
    runtime.close()
    calls = (tmp_path / "calls").read_text().splitlines()
    call = next(line for line in calls if line.startswith("run "))
    name = call.partition("--name ")[2].split()[0]
    assert (f"kill {name}" in calls) == (mode == "stuck")
    for part in ("--interactive", "some/image:1", f"source={folder}", f"source={Path(server.__file__).resolve()}"):
        assert part in call


def test_an_engine_of_another_release_is_refused_before_its_library_is_asked(
    load: Load, folder: Path, python: Path
) -> None:
    site = python.parent / "site" / "tensorrt-10.14.1.dist-info"
    site.mkdir(parents=True)
    (site / "METADATA").write_text("Metadata-Version: 2.1\nName: tensorrt\nVersion: 10.14.1\n")
    python.write_text(f'#!/bin/sh\nPYTHONPATH={API}:{site.parent} exec {sys.executable} "$@"\n')
    (folder / "manifest.json").write_text(json.dumps({"result": {"versions": {"tensorrt": "10.10.0"}}}))
    with pytest.raises(MachineError, match=r"was built with tensorrt 10\.10\.0, .* has 10\.14\.1"):
        load()
    (folder / "manifest.json").write_text(json.dumps({"result": {"versions": {"tensorrt": "10.14.1"}}}))
    load()
    (folder / "manifest.json").write_text(json.dumps({"result": [7]}))
    load()
