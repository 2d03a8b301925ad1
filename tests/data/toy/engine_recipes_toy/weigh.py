"""The toy's calibration: counts words. Refuses models with one layer."""

from engine_recipes import RequestError, hookimpl, read_texts

from .misbehave import misbehave


@hookimpl
def check_decoder(context, decoder) -> None:
    if decoder.layers == 1:
        raise RequestError(f"one layer is too few, with {dict(context.options)}", "take a model with two")


@hookimpl
def calibrate(context) -> None:
    misbehave(context)
    count = sum(len(text.split()) for text in read_texts(context.options["data"]))
    (context.out / "weight.txt").write_text(str(count))
