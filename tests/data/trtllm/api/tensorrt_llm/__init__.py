"""A stand-in for TensorRT-LLM's Python API, as far as an engine's server needs it.

Signatures, fields and checks are those of the 1.0 to 1.2 line (`llmapi/llm.py`, `sampling_params.py`,
`executor/result.py`); what is unknown there is refused here. The "engine" says (31 x sum of ids + 7) mod vocabulary.
`STAND_IN` in the environment makes it fail, `STAND_IN_VERSION` makes it older or newer.
"""

import os
import sys
from pathlib import Path

__version__ = os.environ.get("STAND_IN_VERSION", "1.2.1")

print(f"[TensorRT-LLM] TensorRT-LLM version: {__version__}")  # as the real one does, to stdout
sys.stdout.flush()
os.system("echo '[TensorRT-LLM][INFO] from C++'")
if os.environ.get("STAND_IN") == "no driver":
    raise ImportError("libcuda.so.1: cannot open shared object file: No such file or directory")

if __version__.startswith(("1.0", "1.1", "1.2")):
    __path__.append(str(Path(__file__).with_name("since_0_21")))
if __version__.startswith("0."):
    from .llmapi.llm import _TrtLLM as LLM
else:

    class LLM:  # type: ignore[no-redef]
        """PyTorch's, which knows no engines."""

        def __init__(self, *args: object, **kwargs: object) -> None:
            raise ValueError("Unrecognized model: should have a `model_type` key in its config.json")
