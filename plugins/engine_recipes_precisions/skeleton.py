"""transformers' model for a source, without weights, and whether it is the model that the weights belong to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from engine_recipes import MachineError, RequestError, StageFailed, checkpoint

if TYPE_CHECKING:
    import torch


def without_weights(source: checkpoint.SourceCheckpoint, dtype: torch.dtype) -> Any:
    """transformers' model for a source's config.json: parameters on the meta device, buffers real.

    Raises:
        RequestError: transformers makes nothing of config.json, or another class than the weights belong to.
        MachineError: this version of transformers misreads it.
    """
    kind, wanted = source.config.get("model_type"), source.decoder.architecture
    if not isinstance(kind, str) or not kind:
        raise RequestError(
            "config.json has no model_type, by which transformers chooses its class",
            f"give it the model_type that belongs to {wanted}, or fetch config.json again",
        )
    config, model = _construct(source, kind, dtype)
    made = type(model).__name__
    if made != wanted:  # transformers looks at model_type alone; the recipe, the plan and the engine at architectures
        raise RequestError(
            f"config.json's model_type says {kind}, which is {made}, and its architectures {wanted}",
            "one of the two is wrong: fetch config.json again, or another checkpoint",
        )
    _check_rope(config, source)
    return model.eval()


def _construct(source: checkpoint.SourceCheckpoint, kind: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """transformers' configuration and model."""
    import accelerate
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(source.folder, local_files_only=True, trust_remote_code=False)
        with accelerate.init_empty_weights(include_buffers=False):
            return config, transformers.AutoModelForCausalLM.from_config(
                config, attn_implementation="sdpa", dtype=dtype, trust_remote_code=False
            )
    except Exception as error:  # the classes check their settings each in its own way, with errors of all kinds
        said = (str(error).strip() or "no reason given").splitlines()[0]
        raise RequestError(
            f"transformers {transformers.__version__} makes no model of this config.json, model_type {kind}: "
            f"{type(error).__name__}: {said}",
            "fetch config.json again, or pip install --upgrade transformers if the model is newer than it",
        ) from None


def _check_rope(config: Any, source: checkpoint.SourceCheckpoint) -> None:
    """transformers 4 reading a config.json of transformers 5 takes a rope base of 10000, without a word."""
    import transformers

    parameters: Mapping[str, Any] = getattr(config, "rope_parameters", None) or {}
    theta = parameters.get("rope_theta", getattr(config, "rope_theta", None))
    scaling = {**(getattr(config, "rope_scaling", None) or {}), **parameters}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    wanted = (source.decoder.rope_theta, (source.decoder.rope_scaling or {}).get("rope_type", "default"))
    if (theta, kind) != wanted:
        raise MachineError(
            f"transformers {transformers.__version__} reads this config.json as rope base {theta}, scaling {kind}; "
            f"it says {wanted[0]:g}, {wanted[1]}",
            "pip install --upgrade transformers",
        )


def layers_of(model: Any, prefix: str) -> Sequence[torch.nn.Module]:
    """The decoder layers, which the weights' names put at `prefix`."""
    try:
        return list(model.get_submodule(prefix))
    except (AttributeError, TypeError):
        raise StageFailed(
            f"{type(model).__name__} of transformers {_version()} has no layers named {prefix}",
            "the family's tensor names do not fit this version of transformers; try another",
        ) from None


def check_parameters(
    model: Any, layers: Sequence[torch.nn.Module], prefix: str, source: checkpoint.SourceCheckpoint
) -> None:
    """Demand that the layers have exactly the parameters that the source has, in the same shapes."""
    for index, layer in enumerate(layers):
        start = f"{prefix}.{index}."
        wanted = {start + name: tuple(parameter.shape) for name, parameter in layer.named_parameters()}
        given = {
            name: tuple(info.shape)
            for name, (_, info) in source.tensors.items()
            if name.startswith(start) and "inv_freq" not in name
        }
        if wanted != given:
            name = min(name for name in wanted.keys() | given.keys() if wanted.get(name) != given.get(name))
            ours, theirs = (list(shapes[name]) if name in shapes else "absent" for shapes in (wanted, given))
            raise StageFailed(
                f"{type(model).__name__} of transformers {_version()} and the source disagree about {name}: "
                f"{ours} and {theirs}",
                "config.json does not describe these weights, or another version of transformers is needed",
            )


def _version() -> str:
    import transformers

    return str(transformers.__version__)
