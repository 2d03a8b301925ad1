"""The toy's reference: what the engine is compared with. TOY_SOURCE="quiet" makes it think something else."""

import os

from engine_recipes import hookimpl

from .echo import Echo
from .misbehave import misbehave


@hookimpl
def load_source(context) -> Echo:
    misbehave(context)
    return Echo(confident=os.environ.get("TOY_SOURCE") != "quiet")
