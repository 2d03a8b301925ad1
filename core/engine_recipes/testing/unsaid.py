"""Which keys of a config a family passes over: what it neither describes nor refuses, engines leave out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..decoder import Decoder
from ..entries import Family
from .faults import Skip, expect
from .lab import Lab
from .numbers import sample
from .processes import ask

Config = Mapping[str, Any]
#: Of the models that keys are changed in: some families do another thing in each fourth layer.
_LAYERS = 4
_LITTLE = "only rope_scaling, activation and sliding_window were tried"
_ACTIVATIONS = ("hidden_act", "hidden_activation", "activation_function")
_ROPE = {
    "rope_type": "llama3",
    "factor": 7.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def leaves_out_no_key_of_its_configs(lab: Lab, name: str) -> None:
    """A key that is neither described nor refused is left out by every engine; no number of a plain model shows it."""
    family, configs = lab.family(name)
    deep = [_deeper(lab, family, config) for config in configs]
    faults = []
    for config in deep:
        faults += [
            f"with {what} in its config the model is described as without: describe it, or refuse it"
            for what, changed in _usual_changes(config).items()
            if _is_passed_over(lab, family, config, changed)
        ]
    expect(not faults, "\n".join(dict.fromkeys(faults)))
    if not (find_spec("transformers") and find_spec("torch")):
        raise Skip(f"transformers is not installed: {_LITTLE}")
    folders = [_written(lab, config) for config in deep]
    ids = {folder.name: sample(int(config["vocab_size"])) for folder, config in zip(folders, deep, strict=True)}
    told = ask(lab, "keys_that_matter", {"folders": [str(folder) for folder in folders], "ids": ids})
    for folder, config in zip(folders, deep, strict=True):
        for key, values in told[folder.name].items():
            left = [value for value in values if _is_passed_over(lab, family, config, {**config, key: value})]
            default = "" if key in config else " (its config class has a default for it)"
            faults += [
                f"with {key} = {value} in its config{default} transformers computes another model, and the description"
                f" is the same: describe what {key} means, or refuse values that change something"
                for value in left[:1]
            ]
    expect(not faults, "\n".join(dict.fromkeys(faults)))
    if not any(told.values()):
        raise Skip(f"transformers does not know these models: {_LITTLE}")


def _deeper(lab: Lab, family: Family, config: Config) -> dict[str, Any]:
    """The config with more layers, if the family takes it so."""
    layers = config.get("num_hidden_layers")
    if not isinstance(layers, int) or layers >= _LAYERS:
        return dict(config)
    more = {
        key: (value * _LAYERS)[:_LAYERS]
        for key, value in config.items()
        if isinstance(value, list) and len(value) == layers and key != "architectures"
    }
    deep = {**config, **more, "num_hidden_layers": _LAYERS}
    return dict(config) if _description(lab, family, deep) is None else deep


def _usual_changes(config: Config) -> dict[str, dict[str, Any]]:
    """What models of many families say: what it is called, and the config that says it."""
    rope = "rope_scaling" if config.get("rope_parameters") is None else "rope_parameters"
    theta = {"rope_theta": config[rope]["rope_theta"]} if rope == "rope_parameters" else {}
    other = "relu" if "gelu_pytorch_tanh" in [config.get(key) for key in _ACTIVATIONS] else "gelu_pytorch_tanh"
    acts = {key: other for key in _ACTIVATIONS if config.get(key)}
    window = {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 0}
    found = {
        f"{rope} of the type llama3": {**config, rope: {**theta, **_ROPE}},
        "sliding_window = 8": {**config, **window},
    }
    return {**found, **({f"{' and '.join(acts)} = {other}": {**config, **acts}} if acts else {})}


def _is_passed_over(lab: Lab, family: Family, config: Config, changed: Config) -> bool:
    described = _description(lab, family, config)
    return described is not None and described == _description(lab, family, changed)


def _description(lab: Lab, family: Family, config: Config) -> Decoder | None:
    """None if it is refused."""
    try:
        return lab.describe(family, config)
    except Exception:  # errors that are none of ours are a case of their own
        return None


def _written(lab: Lab, config: Config) -> Path:
    text = json.dumps(dict(config), sort_keys=True)
    folder = lab.place(f"deep/{len(list(lab.place('deep').iterdir()))}")
    (folder / "config.json").write_text(text, encoding="utf-8")
    return folder
