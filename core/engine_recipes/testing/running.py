"""What a loaded engine promises: `generate`, `logits` and `close`, and what it does with folders that are damaged."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from ..errors import RecipesError
from ..store import MANIFEST
from ..types import Runtime, Sampling
from .building import load
from .faults import Fault, Skip, expect
from .folders import _look as look
from .lab import Lab
from .numbers import apart, sample
from .processes import ask
from .recipes import runs_here

_VOCABULARY = 256  # of the tiny models
_POSITIONS = 256
_PROMPT = sample(_VOCABULARY, 8)
_MORE = 8  # tokens past its end that an endless generation is allowed before it is cut off


def gives_the_same_logits_twice(lab: Lab, name: str) -> None:
    """What an engine said once it must say again: also after it generated, and when it is loaded anew."""
    ids = sample(_VOCABULARY)
    with _loaded(lab, name) as first, _loaded(lab, name) as second:
        base = _logits(first, ids)
        list(islice(first.generate(_PROMPT, Sampling(max_tokens=4)), 4 + _MORE))
        expect(base.shape == (len(ids), _VOCABULARY), f"logits are {base.shape}, not {(len(ids), _VOCABULARY)}")
        expect(str(base.dtype) == "float32", f"logits are {base.dtype}, not float32")
        for what, runtime in (("the same engine, after it generated", first), ("the engine loaded again", second)):
            error = apart(_logits(runtime, ids), base)
            expect(error <= 1e-5, f"{what} gives other logits for the same tokens, {error:.2g} of their spread away")


def later_tokens_do_not_change_earlier_logits(lab: Lab, name: str) -> None:
    """A decoder looks back only: if it sees what comes, its logits cannot be compared with any other model's."""
    ids = sample(_VOCABULARY)
    with _loaded(lab, name) as runtime:
        error = apart(_logits(runtime, ids[:10]), _logits(runtime, ids)[:10])
    expect(error <= 1e-3, f"the first 10 logits change by {error:.2g} of their spread if 14 more tokens follow")


def generates_what_its_logits_say(lab: Lab, name: str) -> None:
    """`generate` goes through a cache: one that is wrong gives fluent nonsense, which no error tells."""
    with _loaded(lab, name) as runtime:
        said = _greedy(runtime, _PROMPT, 12)
        expect(len(said) == 12, f"max_tokens is 12, there is room, and {len(said)} tokens came")
        rows = _logits(runtime, [*_PROMPT, *said])
        for position, token in enumerate(said):
            row = rows[len(_PROMPT) + position - 1]
            best = int(row.argmax())
            expect(
                row[best] - row[token] <= 1e-3 * row.std(),
                f"token {position} of a greedy answer is {token}, logits of all tokens at once say {best}: is the"
                " cache, or the position of new tokens, wrong?",
            )


def stops_where_it_is_told_to(lab: Lab, name: str) -> None:
    """An answer that does not end costs time and money; one that goes on after the stop token puts words in a mouth."""
    with _loaded(lab, name) as runtime:
        said = _greedy(runtime, _PROMPT, 12)
        for most in (0, 1, 3):
            count = len(_greedy(runtime, _PROMPT, most))
            expect(count == most, f"max_tokens is {most}, and {count} tokens came")
        stop = said[3]
        expected = said[: said.index(stop)]
        got = _greedy(runtime, _PROMPT, 12, frozenset({stop}))
        expect(got == expected, f"stop is {{{stop}}}: expected {expected}, which end before it, and got {got}")
        longest = int(getattr(runtime, "max_seq_len", _POSITIONS))
        count = len(_greedy(runtime, sample(_VOCABULARY, longest - 2), 50))
        expect(
            2 <= count <= 3,
            f"a prompt of {longest - 2} tokens leaves room for 2 of {longest} (and one more that is never fed back),"
            f" and {count} tokens came",
        )


def refuses_prompts_that_it_cannot_take(lab: Lab, name: str) -> None:
    """Users must read what is wrong with a prompt; an index out of range may as well read foreign memory."""
    with _loaded(lab, name) as runtime:
        longest = int(getattr(runtime, "max_seq_len", _POSITIONS))
        for what, ids in (
            ("an empty prompt", []),
            (f"the token id {_VOCABULARY} of a vocabulary of {_VOCABULARY}", [1, _VOCABULARY]),
            ("the token id -1", [1, -1]),
            (f"a prompt of {longest + 1} tokens, one more than max_seq_len", sample(_VOCABULARY, longest + 1)),
        ):
            for how, call in (
                ("generate", lambda ids=ids: next(iter(runtime.generate(ids, Sampling(max_tokens=2))), None)),
                ("logits", lambda ids=ids: runtime.logits(ids)),
            ):
                try:
                    answer = call()
                except RecipesError as error:
                    expect(error.hint, f"{how} refuses {what} without a hint")
                    continue
                except Exception as error:
                    raise Fault(f"{how} answers {what} with {type(error).__name__}: {error}") from None
                if how == "logits" and answer is None:  # it hides them always
                    continue
                raise Fault(f"{how} takes {what}: raise RequestError (`engine_recipes.stepping.check_ids` does)")


def samples_by_its_seed(lab: Lab, name: str) -> None:
    """A seed makes an answer repeatable; without chance temperature means nothing."""
    with _loaded(lab, name) as runtime:

        def draw(seed: int) -> list[int]:
            sampling = Sampling(max_tokens=8, temperature=1.0, seed=seed)
            return [int(token) for token in islice(runtime.generate(_PROMPT, sampling), 8 + _MORE)]

        expect(draw(7) == draw(7), "the same seed gives two answers")
        expect(len({tuple(draw(seed)) for seed in range(5)}) > 1, "five seeds at temperature 1 give the same answer")


def two_work_at_once_and_close_twice(lab: Lab, name: str) -> None:
    """Servers load several engines and interleave requests; `close` comes from `with`, from `finally` and at exit."""
    with _loaded(lab, name) as first, _loaded(lab, name) as second:
        other = list(reversed(_PROMPT))
        alone = _greedy(first, _PROMPT, 6), _greedy(first, other, 6)
        pairs = zip(
            first.generate(_PROMPT, Sampling(max_tokens=6)),
            second.generate(other, Sampling(max_tokens=6)),
            strict=False,
        )
        mixed = [(int(a), int(b)) for a, b in islice(pairs, 6 + _MORE)]
        expect(mixed == list(zip(*alone, strict=False)), "two engines at work at once disturb each other")
        first.close()
        first.close()
        expect(_greedy(second, other, 6) == alone[1], "closing one engine breaks another of the same folder")


def loads_wherever_its_folder_lies(lab: Lab, name: str) -> None:
    """Engines are built once and carried to the machines that serve them, often on disks that cannot be written."""
    recipe = runs_here(lab, name)
    with _loaded(lab, name) as runtime:
        before = _greedy(runtime, _PROMPT, 4)
    plan, built = lab.plan(recipe), lab.build(recipe).path("stage2")
    assert built is not None
    moved = lab.place("elsewhere") / "engine"
    others = [lab.setup.workspace, Path(recipe.model).parent]  # what it was made from does not come along
    built.rename(moved)
    for folder in others:
        folder.rename(folder.with_name(f"{folder.name}-away"))
    try:
        moved.chmod(0o555)
        earlier = look([moved])
        runtime = load(plan, moved).runtime
        expect(_greedy(runtime, _PROMPT, 4) == before, "after its folder was moved the engine says something else")
        runtime.close()
        wrote = [path for path, status in look([moved]).items() if earlier.get(path) != status]
        expect(not wrote, f"loading writes into the engine's folder: {', '.join(wrote)}")
    except OSError as error:
        raise Fault(f"it cannot be loaded from a folder that was moved and is read-only: {error}") from None
    finally:
        moved.chmod(0o755)
        for folder in others:
            folder.with_name(f"{folder.name}-away").rename(folder)
        moved.rename(built)


def a_damaged_folder_is_an_error_of_two_lines(lab: Lab, name: str) -> None:
    """Copies are cut short and disks fill up: what is wrong and what to do must be said, and without a crash."""
    recipe = runs_here(lab, name)
    plan, built = lab.plan(recipe), lab.build(recipe).path("stage2")
    assert built is not None
    with _loaded(lab, name) as runtime:
        whole = [int(token) for token in islice(runtime.generate([1, 5, 9], Sampling(max_tokens=4)), 4)]
    folders = dict(_damaged(built, lab.folder / f"damaged-{name}"))
    stage = plan.stage("stage2")
    request = {"provider": asdict(stage.provider), "options": stage.options, "folders": folders}
    answers = ask(lab, "load_damaged", request, limit=120)
    for what, answer in answers.items():
        expect("fault" not in answer, f"{what}: it loads, and then {answer.get('fault')}")
        expect(answer.get("refused", True), f"{what}: message and hint must be one line each: {answer.get('text')!r}")
        expect(answer.get("tokens", whole) == whole, f"{what}: it loads, and says something else than before")


PROMISES: Sequence[Callable[[Lab, str], None]] = (
    gives_the_same_logits_twice,
    later_tokens_do_not_change_earlier_logits,
    generates_what_its_logits_say,
    stops_where_it_is_told_to,
    refuses_prompts_that_it_cannot_take,
    samples_by_its_seed,
    two_work_at_once_and_close_twice,
    loads_wherever_its_folder_lies,
    a_damaged_folder_is_an_error_of_two_lines,
)


@contextmanager
def _loaded(lab: Lab, name: str) -> Iterator[Runtime]:
    """The engine on a tiny model, closed in the end."""
    runtime = lab.load(runs_here(lab, name)).runtime
    try:
        yield runtime
    finally:
        runtime.close()


def _greedy(runtime: Runtime, prompt: Sequence[int], most: int, stop: frozenset[int] = frozenset()) -> list[int]:
    tokens = islice(runtime.generate(prompt, Sampling(max_tokens=most), stop), most + _MORE)
    return [int(token) for token in tokens]


def _logits(runtime: Runtime, ids: Sequence[int]) -> Any:
    logits = runtime.logits(ids)
    if logits is None:
        raise Skip("the engine gives no logits")
    return logits


def _damaged(built: Path, place: Path) -> Iterator[tuple[str, str]]:
    """Copies of an engine, each with one file cut short or missing: what is wrong -> folder."""
    for file in sorted(path for path in built.rglob("*") if path.is_file() and path.name != MANIFEST):
        name = file.relative_to(built)
        for what in ("cut short", "missing"):
            folder = place / f"{len(list(place.iterdir())) if place.exists() else 0}"
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(built, folder)
            if what == "missing":
                (folder / name).unlink()
            else:
                (folder / name).write_bytes(file.read_bytes()[: file.stat().st_size // 2])
            yield f"{name} {what}", str(folder)
