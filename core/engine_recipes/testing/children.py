"""What is done in a fresh process. Each action takes plain data and gives plain data."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..errors import RecipesError

#: Libraries that take long to import: listing and planning must not wait for them.
HEAVY = [
    "accelerate",
    "aotinductor",
    "cuda",
    "gguf",
    "huggingface_hub",
    "jax",
    "jinja2",
    "ml_dtypes",
    "modelopt",
    "numpy",
    "onnx",
    "onnxruntime",
    "openvino",
    "pandas",
    "PIL",
    "pyarrow",
    "requests",
    "safetensors",
    "scipy",
    "tensorflow",
    "tensorrt",
    "tensorrt_llm",
    "tensorrt_rtx",
    "tokenizers",
    "torch",
    "transformers",
    "triton",
]
Say = Callable[[str], None]


def main(answer: str) -> None:
    """Do what stdin says; write lines of JSON: what it is `at`, and in the end the `value`."""
    request = json.loads(sys.stdin.buffer.read())
    with open(answer, "a", encoding="utf-8", buffering=1) as file:

        def say(text: str) -> None:
            file.write(json.dumps({"at": text}) + "\n")

        value = ACTIONS[request.pop("action")](say, **request)
        file.write(json.dumps({"value": value}) + "\n")
    sys.stderr.flush()
    os._exit(0)  # threads of libraries must not keep it


def import_modules(say: Say, providers: list[dict[str, str]]) -> list[dict[str, Any]]:
    """For each provider: why it cannot be loaded, the hooks it has, heavy libraries that its import loaded."""
    from ..hookspecs import NAME
    from ..host import Host
    from ..types import Provider

    found = []
    for data in providers:
        say(f"importing {data['module']}")
        provider, before = Provider(**data), set(sys.modules)  # type: ignore[arg-type]
        error = ""
        try:
            Host([provider])
        except RecipesError as reason:
            error = reason.message
        heavy = sorted({name.partition(".")[0] for name in set(sys.modules) - before} & set(HEAVY))
        module = sys.modules.get(provider.module)
        hooks = [name for name in dir(module) if getattr(getattr(module, name), f"{NAME}_impl", None)]
        found.append({"error": error, "heavy": heavy, "hooks": hooks})
    return found


def list_names(say: Say, folders: list[str], roots: list[str]) -> dict[str, Any]:
    """What `recipes list` imports of these packages, and which files of theirs it opens."""
    opened: list[str] = []

    def watch(event: str, arguments: Any) -> None:
        if event == "open" and isinstance(arguments[0], (str, bytes)):
            path = os.path.realpath(os.fsdecode(arguments[0]))
            if any(path.startswith(folder + os.sep) for folder in folders):
                opened.append(path)

    from ..cli import main as recipes

    say("recipes list")
    sys.addaudithook(watch)
    sys.argv = ["recipes", "list"]
    code: Any = 0
    try:
        recipes()
    except SystemExit as end:
        code = end.code
    imported = sorted(name for name in sys.modules if name.partition(".")[0] in roots)
    return {"code": code or 0, "imported": imported, "opened": opened}


def strange_configs(say: Say, provider: dict[str, str], config: dict[str, Any], out: str) -> list[str]:
    """How a family takes configs that are wrong in one place: what it raises that is no RecipesError."""
    from ..host import Host
    from ..types import Provider, StageContext

    who = Provider(**provider)  # type: ignore[arg-type]
    host, found = Host([who]), []
    for what, changed in _changes(config):
        say(what)
        context = StageContext("./model", "resolve", {}, (), Path(out))
        try:
            host.resolve_checkpoint(who, context, changed)
        except RecipesError as error:
            if not (error.message and error.hint):
                found.append(f"{what}: the error {error.message!r} has no hint what to do")
            elif "\n" in error.message + error.hint:
                found.append(f"{what}: message and hint have one line each, this is {str(error)!r}")
        except Exception as error:
            found.append(f"{what}: {type(error).__name__}: {error}")
    return found


def _changes(config: Mapping[str, Any], path: str = "") -> list[tuple[str, dict[str, Any]]]:
    """What was changed, and the config: each key removed, empty, of other types and far too large."""
    found: list[tuple[str, dict[str, Any]]] = []
    for key, value in config.items():
        rest = {k: v for k, v in config.items() if k != key}
        found.append((f"without {path}{key}", rest))
        for strange in (None, "nonsense", -1, 0, 10**12, 0.5, True, [1], {"a": 1}):
            found.append((f"{path}{key} = {strange!r}", {**config, key: strange}))
        if isinstance(value, Mapping):
            found += [(what, {**config, key: inner}) for what, inner in _changes(value, f"{key}.")]
    return found


def transformers_says(say: Say, folders: list[str], ids: dict[str, list[int]], out: str) -> dict[str, Any]:
    """What transformers holds of each folder: tensors of its own class, and logits of these weights in float32.

    Returns:
        By the folder's name `unknown`: why it does not know the model; or `shapes`, and `out/NAME.npy` gets the logits
        of `ids[NAME]`, float32 [ids, vocabulary], or `unlike` says why it does not load these weights.
    """
    say("importing transformers")
    import numpy as np
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from ..checkpoint.source import source_tensors

    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for folder in folders:
        name = Path(folder).name
        say(f"loading {folder} with transformers")
        try:
            config = AutoConfig.from_pretrained(folder, local_files_only=True)
            AutoModelForCausalLM.from_config(config).save_pretrained(f"{out}/{name}-fresh")
        except (ValueError, KeyError) as error:
            found[name] = {"unknown": str(error).strip().splitlines()[0]}
            continue
        except Exception as error:  # libraries of others: no list says what they raise
            said = f"{type(error).__name__}: {error}".strip().splitlines()[0]
            raise ValueError(
                f"transformers does not make a model of this config.json: {said}. A key that it lacks has a default"
                " for large models (pad_token_id, rope, heads): put the key into your config"
            ) from None
        tensors = source_tensors(Path(out, f"{name}-fresh"))
        found[name] = {"shapes": {tensor: list(info.shape) for tensor, (_, info) in tensors.items()}}
        try:
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
        except RuntimeError as error:  # shapes that do not fit
            found[name]["unlike"] = str(error).strip().splitlines()[0]
            continue
        with torch.no_grad():
            np.save(f"{out}/{name}.npy", model.eval()(torch.tensor([ids[name]])).logits[0].float().numpy())
    return found


def keys_that_matter(say: Say, folders: list[str], ids: dict[str, list[int]]) -> dict[str, dict[str, list[Any]]]:
    """By folder with a config.json: key -> values with which transformers computes another model of random weights.

    Tried are numbers and booleans of the config and of its class's defaults, one at a time; what cannot be loaded is
    left out, and so are all of a model that transformers does not know.
    """
    say("importing transformers")
    from transformers import AutoConfig, PretrainedConfig

    found: dict[str, dict[str, list[Any]]] = {}
    for folder in map(Path, folders):
        said = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        matter = found[folder.name] = {}
        try:
            known = AutoConfig.from_pretrained(folder, local_files_only=True).to_dict()
            base, weights = _computed(folder, said, ids[folder.name], None)
        except Exception:  # libraries of others: no list says what they raise
            continue
        defaults = {key: value for key, value in known.items() if key not in PretrainedConfig().to_dict()}
        for key, value in {**defaults, **said}.items():
            say(f"changing {key} of {said['architectures']}")
            for other in _other_values(value):
                try:
                    logits, _ = _computed(folder, {**said, key: other}, ids[folder.name], weights)
                except Exception:
                    continue
                if logits is None or abs(logits - base).max() > 1e-5 * base.std():
                    matter.setdefault(key, []).append(other)
    return found


def _other_values(value: Any) -> list[Any]:
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [2 * value, value // 2, 2] if value else [2]
    if isinstance(value, float):
        return [2 * value, value / 2] if value else [0.5]
    return [2] if value is None else []


def _computed(folder: Path, config: Mapping[str, Any], ids: list[int], weights: Any) -> tuple[Any, Any]:
    """Logits of transformers, and the weights; None for both if the model has other tensors than `weights`."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    changed = folder / "changed"
    changed.mkdir(exist_ok=True)
    (changed / "config.json").write_text(json.dumps(config), encoding="utf-8")
    read = AutoConfig.from_pretrained(changed, local_files_only=True)
    model = AutoModelForCausalLM.from_config(read, dtype=torch.float32).eval()
    if weights is None:
        torch.manual_seed(0)
        for tensor in model.parameters():
            torch.nn.init.normal_(tensor, 1.0 if tensor.dim() == 1 else 0.0, 0.05)
        weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if {name: tensor.shape for name, tensor in model.state_dict().items()} != {n: t.shape for n, t in weights.items()}:
        return None, None
    model.load_state_dict(weights)
    with torch.no_grad():
        logits = model(torch.tensor([ids]))[0].float()
    if not logits.isfinite().all():
        raise ValueError("no numbers come out")
    return logits, weights


def keys(say: Say, recipe: dict[str, Any], workspace: str) -> dict[str, str]:
    """Stage -> key, as this process makes them."""
    from ..api import Setup
    from . import stand_in
    from .building import Recipe, plan

    return {stage.name: stage.key for stage in plan(Recipe(**recipe), stand_in.add(Setup(Path(workspace)))).stages}


def build(say: Say, recipe: dict[str, Any], workspace: str, until: Any, pids: str) -> dict[str, str]:
    """Build; write the id of every process that is started for it to the file `pids`. What came of it."""
    from ..api import Setup
    from . import building, stand_in

    real = subprocess.Popen

    def recorded(*arguments: Any, **options: Any) -> Any:
        process = real(*arguments, **options)
        with open(pids, "a", encoding="ascii") as file:
            file.write(f"{process.pid}\n")
        return process

    subprocess.Popen = recorded  # type: ignore[assignment,misc]
    say("building")
    try:
        building.build(building.Recipe(**recipe), stand_in.add(Setup(Path(workspace))), until)
    except RecipesError as error:
        return {"error": type(error).__name__, "message": error.message, "hint": error.hint}
    return {}


def load_damaged(
    say: Say, provider: dict[str, str], options: dict[str, Any], folders: dict[str, str]
) -> dict[str, Any]:
    """What loading each folder, and a few tokens of it, comes to: `refused` in two lines, a `fault`, or `tokens`."""
    from .. import api
    from ..types import Provider, Sampling

    found: dict[str, Any] = {}
    for what, folder in folders.items():
        say(what)
        try:
            loaded = api.load_folder(Path(folder), Provider(**provider), options)  # type: ignore[arg-type]
            tokens = list(loaded.runtime.generate([1, 5, 9], Sampling(max_tokens=4)))
            loaded.runtime.close()
            found[what] = {"tokens": [int(token) for token in tokens]}
        except RecipesError as error:
            two = bool(error.hint) and "\n" not in error.message + error.hint
            found[what] = {"refused": two, "text": str(error)}
        except Exception as error:
            found[what] = {"fault": f"{type(error).__name__}: {error}"}
    return found


ACTIONS: Mapping[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        import_modules,
        list_names,
        strange_configs,
        transformers_says,
        keys_that_matter,
        keys,
        build,
        load_damaged,
    )
}
