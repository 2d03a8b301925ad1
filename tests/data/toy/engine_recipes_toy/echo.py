"""Stage 2 and runtime of the toy: says the prompt backwards, and thinks that every token comes twice."""

from engine_recipes import Check, hookimpl

from .misbehave import misbehave


@hookimpl
def stage2(context) -> None:
    misbehave(context)
    weights = (context.input("toy-checkpoint").path / "weights.json").read_text()
    (context.out / "engine.txt").write_text(f"{context.target} {weights}")


@hookimpl
def validate(context) -> list[Check]:
    misbehave(context)
    engine = (context.input("toy-engine").path / "engine.txt").read_text()
    verdict = "fail" if '"loud": true' in engine else "pass"
    return [Check("says something", verdict, value=1.0, limit=0.5, note="the toy was told to")]


class Echo:
    def __init__(self, confident: bool = True) -> None:
        self.confident = confident

    def generate(self, prompt, sampling, stop=frozenset()):
        for token in list(reversed(prompt))[: sampling.max_tokens]:
            if token in stop:
                return
            yield token

    def logits(self, ids):
        import numpy as np

        logits = np.zeros((len(ids), 256), np.float32)
        logits[range(len(ids)), ids] = 8.0 if self.confident else -8.0
        return logits

    def close(self) -> None:
        pass


@hookimpl
def load_engine(folder):
    assert (folder / "engine.txt").exists()
    return Echo()
