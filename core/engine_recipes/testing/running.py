"""What a loaded engine promises: `generate`, `logits` and `close`, and what it does with folders that are damaged."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path

from ..errors import RecipesError, RequestError
from ..store import MANIFEST
from ..types import Sampling
from .answers import (
    MORE,
    allowing,
    another,
    expect_likely,
    greedy,
    interleaved,
    loaded,
    logits_of,
    rounding,
)
from .building import load
from .faults import Fault, Skip, expect
from .folders import _look as look
from .lab import Lab
from .numbers import apart, room, sample
from .processes import ask
from .recipes import runs_here

_VOCABULARY = 256  # of the tiny models
_PROMPT = sample(_VOCABULARY, 8)


def gives_the_same_logits_twice(lab: Lab, name: str) -> None:
    """What an engine said once it must say again: also after it generated, and when it is loaded anew."""
    ids, limit = sample(_VOCABULARY), rounding(lab, name) / 10
    with loaded(lab, name) as first, loaded(lab, name) as second:
        base = logits_of(first, ids)
        expect(base.shape == (len(ids), _VOCABULARY), f"logits are {base.shape}, not {(len(ids), _VOCABULARY)}")
        expect(str(base.dtype) == "float32", f"logits are {base.dtype}, not float32")
        given = first.logits(ids)
        greedy(first, _PROMPT, 4)
        first.logits(list(reversed(ids)))
        expect(
            given is not None and apart(given, base) <= limit,
            "logits that it gave change when other tokens are run: give the caller an array, no view of a buffer",
        )
        for what, found in (
            ("the same engine, after it generated,", logits_of(first, ids)),
            ("the engine loaded again", logits_of(second, ids)),
        ):
            error = apart(found, base)
            expect(
                error <= limit,
                f"{what} gives other logits for the same tokens, {error:.2g} of their spread away, {limit:g} is allowed"
                f"{allowing(lab, name, error)}",
            )


def later_tokens_do_not_change_earlier_logits(lab: Lab, name: str) -> None:
    """A decoder looks back only: if it sees what comes, its logits cannot be compared with any other model's."""
    ids, limit = sample(_VOCABULARY), rounding(lab, name)
    with loaded(lab, name) as runtime:
        error = apart(logits_of(runtime, ids[:10]), logits_of(runtime, ids)[:10])
    expect(
        error <= limit,
        f"the first 10 logits change by {error:.2g} of their spread if 14 more tokens follow, {limit:g} is allowed"
        f"{allowing(lab, name, error)}",
    )


def generates_what_its_logits_say(lab: Lab, name: str) -> None:
    """`generate` goes through a cache: one that is wrong gives fluent nonsense, which no error tells."""
    with loaded(lab, name) as runtime:
        said = greedy(runtime, _PROMPT, 12)
        expect(len(said) == 12, f"max_tokens is 12, there is room, and {len(said)} tokens came")
        expect_likely(lab, name, runtime, _PROMPT, said, "is the cache, or the position of new tokens, wrong?")
        for length in (8, min(100, room(runtime, 24) - 6)):  # less and more than a block of tokens of common caches
            ids = sample(_VOCABULARY, length)
            other = [*ids[: length // 2], *((token + 5) % _VOCABULARY for token in ids[length // 2 :])]
            prompts = (ids, other, ids[: 3 * length // 4], ids)
            for prompt, answer in [(prompt, greedy(runtime, prompt, 6)) for prompt in prompts]:
                why = "prompts before it began with the same tokens: does it take more of their cache than is theirs?"
                expect_likely(lab, name, runtime, prompt, answer, why)


def stops_where_it_is_told_to(lab: Lab, name: str) -> None:
    """An answer that does not end costs time and money; one that goes on after the stop token puts words in a mouth."""
    with loaded(lab, name) as runtime:
        said = greedy(runtime, _PROMPT, 12)
        for most in (0, 1, 3):
            count = len(greedy(runtime, _PROMPT, most))
            expect(count == most, f"max_tokens is {most}, and {count} tokens came")
        stop = sorted(said)[len(said) // 2]
        unsaid = [token for token in range(_VOCABULARY) if token not in said]
        below, above = [token for token in unsaid if token < stop][:1], [token for token in unsaid if token > stop][-1:]
        for stops in ([stop], [*below, stop, *above]):
            expected = said[: said.index(stop)]
            got = greedy(runtime, _PROMPT, 12, frozenset(stops))
            expect(got == expected, f"stop is {stops}: expected {expected}, which end before it, and got {got}")
        if not hasattr(runtime, "max_seq_len"):  # nobody can know how long a prompt may be
            return
        longest = room(runtime)
        count = len(greedy(runtime, sample(_VOCABULARY, longest - 2), 50))
        expect(
            2 <= count <= 3,
            f"a prompt of {longest - 2} tokens leaves room for 2 of {longest} (and one more that is never fed back),"
            f" and {count} tokens came",
        )


def refuses_prompts_that_it_cannot_take(lab: Lab, name: str) -> None:
    """Users must read what is wrong with a prompt; an index out of range may as well read foreign memory."""
    with loaded(lab, name) as runtime:
        longest = room(runtime)
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
    with loaded(lab, name) as runtime:

        def draw(seed: int, temperature: float = 1.0) -> list[int]:
            sampling = Sampling(max_tokens=8, temperature=temperature, seed=seed)
            return [int(token) for token in islice(runtime.generate(_PROMPT, sampling), 8 + MORE)]

        for seed in (7, 0):
            expect(draw(seed) == draw(seed), f"the same seed gives two answers: {seed} was drawn with twice")
        different = len({tuple(draw(seed)) for seed in range(5)})
        expect(different == 5, f"five seeds at temperature 1 give {different} answers, of 8 tokens each")
        for seed in range(3):  # tokens that are 0.02 less likely, in logits, are drawn once in e^20 times
            why = "at temperature 0.001 only the likeliest can be drawn: are logits divided by the temperature?"
            expect_likely(lab, name, runtime, _PROMPT, draw(seed, 1e-3), why, 0.02)


def two_work_at_once_and_close_twice(lab: Lab, name: str) -> None:
    """Servers load several engines and interleave requests; `close` comes from `with`, from `finally` and at exit."""
    other = list(reversed(_PROMPT))
    with loaded(lab, name) as first, loaded(lab, name) as second:
        alone = greedy(first, _PROMPT, 6), greedy(first, other, 6)
        mixed = interleaved((first, _PROMPT), (second, other))
        expect(mixed == alone, "two engines at work at once disturb each other")
        mixed = interleaved((first, _PROMPT), (first, other))
        expect(
            mixed == alone,
            f"two generations of one engine that are open at once disturb each other: alone they say {alone}, in turns"
            f" {mixed}. Each needs a cache of its own, as engine_recipes.stepping.Stepper gives it",
        )
        with another(lab, name) as third:
            theirs = greedy(third, _PROMPT, 6)
            for what, runtime, prompt, before in (
                ("the one loaded first", first, other, alone[1]),
                ("the other", third, _PROMPT, theirs),
            ):
                said = greedy(runtime, prompt, 6)
                expect(said == before, f"with engines of two models loaded, {what} says {said}, no more {before}")
        first.close()
        first.close()
        expect(greedy(second, other, 6) == alone[1], "closing one engine breaks another of the same folder")


def says_in_a_batch_what_each_prompt_says_alone(lab: Lab, name: str) -> None:
    """`recipes bench` and servers run prompts together: one that gets its neighbour's answer, no error tells."""
    prompts = [_PROMPT, list(reversed(_PROMPT)), [(token + 1) % _VOCABULARY for token in _PROMPT]]
    with loaded(lab, name) as runtime:
        batch = getattr(runtime, "generate_batch", None)
        if batch is None:
            raise Skip("it has no generate_batch")
        try:
            steps = list(islice(batch(prompts, Sampling(max_tokens=6)), 6 + MORE))
        except RequestError as error:
            raise Skip(f"it takes no batch of {len(prompts)}: {error.message}") from None
        expect(
            len(steps) == 6 and all(len(step) == len(prompts) for step in steps),
            f"max_tokens is 6, of {len(prompts)} prompts, and steps of {[len(step) for step in steps]} tokens came",
        )
        for prompt, answer in zip(prompts, zip(*steps, strict=True), strict=True):
            said, alone = [int(token) for token in answer], greedy(runtime, prompt, 6)
            if said != alone:  # which two equally likely tokens allow
                why = f"this is prompt {prompts.index(prompt)} of a batch, alone it says {alone}"
                expect_likely(lab, name, runtime, prompt, said, why)


def loads_wherever_its_folder_lies(lab: Lab, name: str) -> None:
    """Engines are built once and carried to the machines that serve them, often on disks that cannot be written."""
    recipe = runs_here(lab, name)
    with loaded(lab, name) as runtime:
        before = greedy(runtime, _PROMPT, 4)
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
        expect(greedy(runtime, _PROMPT, 4) == before, "after its folder was moved the engine says something else")
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
    with loaded(lab, name) as runtime:
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
    says_in_a_batch_what_each_prompt_says_alone,
    loads_wherever_its_folder_lies,
    a_damaged_folder_is_an_error_of_two_lines,
)


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
