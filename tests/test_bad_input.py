"""What people really feed it. Each: two lines, the right exit code, no traceback, no folder that looks whole."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import tiny
from conftest import Ran, Recipes, command, install, package
from engine_recipes import testing

FIRST = "model-00001-of-00002.safetensors"
SECOND = "model-00002-of-00002.safetensors"


@pytest.fixture
def model(own_world: Path) -> Path:
    """A good tiny Llama in two shards."""
    return testing.write_tokenizer(tiny.write(own_world / "here" / "model", "llama", shards=2))


def edit(path: Path, **changes: object) -> None:
    """Change keys of a JSON file; None removes one."""
    data = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not None}))


def truncate(model: Path) -> None:
    data = (model / FIRST).read_bytes()
    (model / FIRST).write_bytes(data[: len(data) // 2])


def lfs_pointer(model: Path) -> None:
    (model / FIRST).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3000000000\n")


def pickled(model: Path) -> None:
    (model / FIRST).write_bytes(pickle.dumps({"model.norm.weight": [1.0]}))


def only_pickles(model: Path) -> None:
    for file in model.glob("model*"):
        file.unlink()
    (model / "pytorch_model.bin").write_bytes(pickle.dumps({}))


def escape(model: Path) -> None:
    index = json.loads((model / "model.safetensors.index.json").read_text())
    index["weight_map"]["lm_head.weight"] = "../../etc/passwd"
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def link_out(model: Path) -> None:
    (model / FIRST).rename(model.parent / "elsewhere.safetensors")
    (model / FIRST).symlink_to(model.parent / "elsewhere.safetensors")


def nan(model: Path) -> None:
    arrays = tiny.tensors(tiny.config("llama"))
    arrays["model.layers.1.mlp.up_proj.weight"][3, 4] = np.nan
    tiny.write_tensors(model, tiny.config("llama"), arrays, shards=2)


def broken_json(model: Path) -> None:
    (model / "config.json").write_text('{"architectures": ["LlamaForCausalLM"')


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "a truncated shard": (truncate, f"{FIRST} "),
    "a git-LFS pointer": (lfs_pointer, f"{FIRST} is a git-LFS pointer"),
    "a missing shard": (lambda model: (model / SECOND).unlink(), f"{SECOND} "),
    "a shard that is a pickle": (pickled, f"{FIRST} is a pickle"),
    "nothing but pickles": (only_pickles, "pickle"),
    "an index that leaves the folder": (escape, "../../etc/passwd"),
    "a link that leaves the folder": (link_out, "elsewhere.safetensors"),
    "NaN weights": (nan, "model.layers.1.mlp.up_proj.weight"),
    "a config that is no JSON": (broken_json, "config.json"),
    "no config": (lambda model: (model / "config.json").unlink(), "config.json"),
    "no rope base": (lambda model: edit(model / "config.json", rope_theta=None), "rope"),
    "heads that do not fit": (lambda model: edit(model / "config.json", num_key_value_heads=3), "3 key/value heads"),
    "another architecture": (lambda model: edit(model / "config.json", architectures=["PhiForCausalLM"]), "Phi"),
    "code of its own": (lambda model: edit(model / "config.json", auto_map={"AutoModel": "m.M"}), "code"),
    "a wrong width": (lambda model: edit(model / "config.json", intermediate_size=99), "model.layers.0.mlp"),
    "more layers than weights": (lambda model: edit(model / "config.json", num_hidden_layers=4), "model.layers.3"),
    "fewer layers than weights": (lambda model: edit(model / "config.json", num_hidden_layers=2), "model.layers.2"),
    "no tokenizer": (lambda model: (model / "tokenizer.json").unlink(), "tokenizer.json"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_checkpoint_is_refused_in_two_lines(model: Path, recipes: Recipes, workspace: Path, case: str) -> None:
    spoil, text = BAD[case]
    spoil(model)
    ran = recipes("build", "./model:fp16", "--until", "stage1")
    assert ran.code == 2
    assert text in ran.error[0]
    assert ran.error[1]
    assert leftovers(workspace) == []


def leftovers(workspace: Path) -> list[str]:
    """Folders of checkpoints and engines; none may be left by a failed build."""
    return [
        str(f)
        for place in ("checkpoints", "engines")
        if (workspace / place).is_dir()
        for f in (workspace / place).iterdir()
    ]


def test_the_good_one_builds(model: Path, recipes: Recipes) -> None:
    assert recipes("build", "./model:fp16").code == 0


@pytest.mark.parametrize("layout", ["transformers 4", "transformers 5"])
def test_both_layouts_of_rope_settings_give_the_same_checkpoint(
    model: Path, recipes: Recipes, workspace: Path, layout: str
) -> None:
    if layout == "transformers 5":
        edit(model / "config.json", rope_theta=None, rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    else:
        edit(model / "config.json", rope_theta=5e5)
    built = recipes("build", "./model:fp16", "--until", "stage1", "--json").json["builds"][0]
    config = json.loads(Path(built["checkpoint_dir"], "config.json").read_text())
    assert (config["rotary_base"], config["rotary_scaling"]) == (5e5, None)


def test_an_architecture_that_disagrees_with_the_registry_is_refused(model: Path, recipes: Recipes) -> None:
    Path("registry.toml").write_text('[models.mine]\nfamily = "qwen"\nsource = "./model"\n')
    ran = recipes("build", "mine:fp16")
    assert ran.code == 2
    assert ran.error[0] == "config.json says LlamaForCausalLM; family qwen knows Qwen2ForCausalLM, Qwen3ForCausalLM"


def test_a_split_that_cannot_be_is_refused_with_what_would_work(model: Path, recipes: Recipes) -> None:
    ran = recipes("build", "./model:fp16", "--set", "tp_size=3")
    assert ran.code == 2
    assert ran.error == ["num_attention_heads 4 cannot be split over tp_size 3", "tp_size 1, 2 or 4 would work"]


def test_values_that_do_not_fit_float16_are_counted_and_said(model: Path, recipes: Recipes) -> None:
    arrays = tiny.tensors(tiny.config("llama"))
    arrays["model.layers.1.mlp.up_proj.weight"][3, :2] = 1e6
    tiny.write_tensors(model, tiny.config("llama"), arrays, shards=2)
    ran = recipes("build", "./model:fp16", "--until", "stage1")
    assert ran.code == 0
    (line,) = (line for line in ran.err.splitlines() if line.startswith("warning: "))
    assert "2 values" in line
    assert "float16" in line
    assert "warning" not in recipes("build", "./model:bf16", "--until", "stage1").err


def small_disk(folder: Path, megabytes: int, *arguments: str) -> Ran:
    """Run `recipes` with a workspace on a file system of that size."""
    folder.mkdir()
    script = f'mount -t tmpfs -o size={megabytes}m none "$0" && exec "$@"'
    line = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, str(folder)]
    done = subprocess.run(
        [*line, *command(*arguments, "--workspace", folder)], capture_output=True, text=True, check=False
    )
    return Ran(done.returncode, done.stdout, done.stderr)


@pytest.mark.skipif(
    shutil.which("unshare") is None or subprocess.run(["unshare", "-Urm", "true"], capture_output=True).returncode != 0,
    reason="no file system can be mounted here; test_runner has the stand-in",
)
@pytest.mark.parametrize("megabytes", [1, 2, 4])
def test_a_full_disk_is_said_before_or_while_writing(own_world: Path, tmp_path: Path, megabytes: int) -> None:
    wide = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
    testing.write_tokenizer(tiny.write(own_world / "here" / "wide", "llama", **wide))  # 3.3 MB in float16
    ran = small_disk(tmp_path / "disk", megabytes, "build", "./wide:fp16")
    assert ran.code == 3
    assert "MB" in ran.error[0] or "no space left" in ran.error[0]
    assert "--workspace" in ran.error[1] or "free" in ran.error[1]


PRECISION = '[precisions.odd]\nmodule = "acme_odd.mod"\ngives = "trtllm-checkpoint"\n'
MISSPELT = "from engine_recipes import hookimpl\n@hookimpl\ndef stage_one(context):\n    pass\n"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("import not_there\n", "ModuleNotFoundError: No module named 'not_there'"),
        (MISSPELT, "unknown hook 'stage_one'"),
        ("raise SystemExit(3)\n", "SystemExit: 3"),
    ],
)
def test_a_broken_plugin_hurts_only_builds_that_name_it(
    model: Path, recipes: Recipes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, reason: str
) -> None:
    install(monkeypatch, package(tmp_path / "p", "acme-odd", PRECISION, mod=text))
    ran = recipes("build", "./model:odd")
    assert ran.code == 3
    assert ran.error[0].startswith("precision odd (acme-odd 0.3) cannot be used: ")
    assert reason in ran.error[0]
    assert "acme-odd" in ran.error[1]
    assert recipes("build", "./model:fp16", "--until", "stage1").code == 0
    assert recipes("list").code == 0


def test_two_packages_that_claim_one_name_stop_only_its_use(
    model: Path, recipes: Recipes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("acme-one", "acme-two"):
        install(monkeypatch, package(tmp_path / name, name, PRECISION))
    ran = recipes("build", "./model:odd")
    assert ran.code == 2
    assert ran.error[0] == "precision 'odd' is claimed by acme-one 0.3 and acme-two 0.3"
    assert "uninstall one" in ran.error[1]
    assert recipes("build", "./model:fp16", "--until", "stage1").code == 0


def test_a_checkpoint_made_elsewhere_whose_config_is_nonsense_is_rejected(
    model: Path, recipes: Recipes, tmp_path: Path
) -> None:
    (built,) = recipes("build", "./model:fp16", "--until", "stage1", "--json").json["builds"]
    theirs = Path(shutil.copytree(built["checkpoint_dir"], tmp_path / "theirs"))
    (theirs / "manifest.json").unlink()
    good = (theirs / "config.json").read_text()
    nonsense: list[tuple[str, object]] = [
        ("mapping", "x"),
        ("quantization", "x"),
        ("num_hidden_layers", 10**9),
        ("rotary_base", float("nan")),
    ]
    for key, value in nonsense:
        edit(theirs / "config.json", **{key: value})
        ran = recipes("validate", theirs, "--source", "./model", "--json")
        assert (ran.code, ran.out) == (5, "")
        assert key in ran.error[0]
        assert ran.error[1]
        (theirs / "config.json").write_text(good)
