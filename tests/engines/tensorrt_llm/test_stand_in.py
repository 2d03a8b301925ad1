"""The stand-in itself: it must demand what NVIDIA's converter writes, and refuse what TensorRT-LLM refuses."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from engines.tensorrt_llm.conftest import DATA, Make

GOLDEN = sorted((DATA.parent / "golden").glob("*.json"))
CODES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}


@pytest.fixture(scope="module")
def stand_in() -> Any:
    spec = importlib.util.spec_from_file_location("stand_in", DATA / "trtllm_build.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_it_demands_the_tensors_that_nvidias_converter_wrote(stand_in: Any, path: Path) -> None:
    golden = json.loads(path.read_text())
    config = stand_in.Config(golden["config_json"])
    assert config.world == len(golden["ranks"])
    for rank, written in enumerate(golden["ranks"]):
        shapes = {name: (CODES[dtype], tuple(shape)) for name, (dtype, shape, _) in written.items()}
        assert stand_in.demanded(config, rank) == {
            n: s for n, s in shapes.items() if "rotary" not in n and "embed_pos" not in n
        }


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"architecture": None}, "KeyError: 'architecture'"),
        ({"num_attention_heads": None}, "TypeError"),
        ({"num_key_value_heads": None}, "not the same shape"),
        ({"intermediate_size": None}, "not the same shape"),
        ({"mapping": None}, "not the same shape"),
        ({"mapping": {"tp_size": 2, "world_size": 2, "new_key": 1}}, "unexpected keyword argument 'new_key'"),
        ({"attn_bias": True}, "Required but not provided tensors"),
        ({"rotary_scaling": {"rope_type": "default"}}, "Unsupported rotary scaling type: default"),
        ({"architecture": "GPT2LMHeadModel"}, "Unsupported model architecture"),
    ],
)
def test_a_config_that_lacks_something_fails_as_it_does_there(
    changes: dict[str, Any], said: str, make: Make, tmp_path: Path
) -> None:
    folder = make(tp_size=2)
    config = {**json.loads((folder / "config.json").read_text()), **changes}
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    words = ["--checkpoint_dir", str(folder), "--output_dir", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, str(DATA / "trtllm_build.py"), *words], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 1
    assert said in done.stderr.splitlines()[-1]
