"""An engine in the caller's process: what its own code raises is an error of two lines that says whose it is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from operator import index
from typing import TYPE_CHECKING, Any

from .errors import RecipesError, StageFailed, first_line, one_line
from .types import Provider, Runtime, Sampling

if TYPE_CHECKING:
    import numpy as np

_IDS = range(2**31)


@contextmanager
def blamed(provider: Provider, what: str, hint: str = "") -> Iterator[None]:
    """Make a StageFailed of all that foreign code raises; what is an error of ours already stays what it is.

    Args:
        what: what went wrong if something does: `precision fp8 (acme 1.0) cannot do it`.
        hint: what to do about it; its authors are told, if this says nothing.
    """
    hint = hint or f"report this to the authors of {provider.package}; RECIPES_DEBUG=1 shows where it happened"
    try:
        yield
    except (KeyboardInterrupt, GeneratorExit):
        raise
    except RecipesError as error:
        error.message, error.hint = one_line(error.message), one_line(error.hint) or hint
        raise
    except BaseException as error:
        raise StageFailed(f"{what}: {first_line(error)}", hint) from error


class Guarded:
    """A runtime whose errors are its provider's. Has whatever attributes the runtime has."""

    def __init__(self, runtime: Runtime, provider: Provider) -> None:
        self._runtime, self._provider = runtime, provider

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runtime, name)

    def generate(self, prompt: Sequence[int], sampling: Sampling, stop: frozenset[int] = frozenset()) -> Iterator[int]:
        """As the runtime's. Whatever kind of integer it yields, these are int.

        Raises:
            StageFailed: it failed, or gave what is no token id.
        """
        with blamed(self._provider, f"{self._provider} cannot generate"):
            tokens = iter(self._runtime.generate(prompt, sampling, stop))
        return self._checked(tokens)

    def _checked(self, tokens: Iterable[int]) -> Iterator[int]:
        with blamed(self._provider, f"{self._provider} cannot generate"):
            for token in tokens:
                number = index(token)
                if number not in _IDS:
                    raise ValueError(f"{number} is no token id")
                yield number

    def logits(self, ids: Sequence[int]) -> np.ndarray[Any, np.dtype[np.float32]] | None:
        """As the runtime's."""
        with blamed(self._provider, f"{self._provider} cannot compute logits"):
            return self._runtime.logits(ids)

    def close(self) -> None:
        """As the runtime's."""
        with blamed(self._provider, f"{self._provider} cannot be closed"):
            self._runtime.close()
