"""The network that the library's parser made of the graph: mended, described, and given its sizes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from engine_recipes import StageFailed, events

_REPORT = "use another version of tensorrt-rtx-cu13, or another engine, and report this"


def profile(builder: Any, network: Any, most: Mapping[str, int]) -> Any:
    """An `IOptimizationProfile`: each dynamic dimension from 1 up to `most`, by its name in the model."""
    made = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        shape = tuple(tensor.shape)
        if -1 in shape:
            least = tuple(1 if size < 0 else size for size in shape)
            largest = tuple(
                most[tensor.get_dimension_name(axis)] if size < 0 else size for axis, size in enumerate(shape)
            )
            made.set_shape(tensor.name, least, least, largest)  # most steps are of one token
    return made


def inputs_and_outputs(network: Any) -> dict[str, list[dict[str, Any]]]:
    """`inputs` and `outputs`, each with name, dtype and shape (-1 where it is dynamic)."""

    def describe(tensor: Any) -> dict[str, Any]:
        return {"name": tensor.name, "dtype": tensor.dtype.name, "shape": list(tensor.shape)}

    inputs = [describe(network.get_input(i)) for i in range(network.num_inputs)]
    return {"inputs": inputs, "outputs": [describe(network.get_output(i)) for i in range(network.num_outputs)]}


def attentions(trt: Any, network: Any) -> Iterator[Any]:
    """Every `IAttention`, in the order of the layers. Inputs: queries, keys, values."""
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = trt.IAttentionInputLayer  # how the bindings cast
            yield layer.attention


def feed_from_cache(trt: Any, network: Any, layers: int) -> None:
    """Feed attention with the cache itself.

    The parser multiplies keys and queries by √scale, even by 1: then the engine copies all keys for every token. (What
    scales queries is a node of our own.) Only what is a multiplication by 1 is taken out; the rest stays, slow but
    right.

    Raises:
        StageFailed: the parser did not understand an attention as it was meant.
    """
    makers = _makers(network)
    found = list(attentions(trt, network))
    if len(found) != layers:
        raise StageFailed(f"TensorRT-RTX found {len(found)} attentions in a model of {layers} layers", _REPORT)
    for number, attention in enumerate(found):
        if attention.mask is None:
            raise StageFailed(f"TensorRT-RTX lost the mask of attention {number}", _REPORT)
        attention.decomposable = True  # where there is no kernel for all of it
        for index in (0, 1):
            tensor = _unscaled(trt, makers, attention.get_input(index))
            if tensor is not None:
                attention.set_input(index, tensor)
    copied = sum(attention.get_input(1).name != f"present.{number}.key" for number, attention in enumerate(found))
    if copied:
        events.warn(f"{copied} of {layers} layers will copy all their keys for every token: slow, but right")


def _makers(network: Any) -> dict[str, Any]:
    """Name of a tensor -> the layer it comes from."""
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    return {layer.get_output(i).name: layer for layer in layers for i in range(layer.num_outputs)}


def _unscaled(trt: Any, makers: Mapping[str, Any], tensor: Any) -> Any:
    """What `tensor` is the product of with the constant 1; None if it is no such product."""
    layer = makers.get(tensor.name)
    if layer is None or layer.type != trt.LayerType.ELEMENTWISE:
        return None
    layer.__class__ = trt.IElementWiseLayer
    if layer.op != trt.ElementWiseOperation.PROD or not _is_one(trt, makers, layer.get_input(1)):
        return None
    return layer.get_input(0)


def _is_one(trt: Any, makers: Mapping[str, Any], tensor: Any) -> bool:
    import numpy as np

    layer = makers.get(tensor.name)
    while layer is not None and layer.type == trt.LayerType.CAST:
        layer = makers.get(layer.get_input(0).name)
    if layer is None or layer.type != trt.LayerType.CONSTANT:
        return False
    layer.__class__ = trt.IConstantLayer
    values = layer.weights  # no array if numpy has no such type
    return isinstance(values, np.ndarray) and bool((values == 1).all())
