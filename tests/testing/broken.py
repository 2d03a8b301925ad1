"""A package of plugins that each break one promise, as an author could: for tests that the suite notices."""

from __future__ import annotations

from pathlib import Path

from conftest import package

FAMILY = """
import random
from pathlib import Path

from engine_recipes import from_hf, hookimpl


@hookimpl
def resolve_checkpoint(config):
    {body}
"""
FAMILIES = {
    "many-heads": "return from_hf(config, kv_heads=from_hf(config).heads)",
    "careless": "return from_hf(config, activation=config['hidden_act'].lower())",
    "moody": "return from_hf(config, max_positions=random.randint(100, 10**6))",
    "other-rope": "return from_hf(config, rope_theta=10.0)",
    "unknown": "return from_hf(config)",
    "noting": "(Path.home() / 'notes.txt').write_text('x'); return from_hf(config)",
    "window-blind": "return from_hf({k: v for k, v in config.items() if k != 'sliding_window'})",
    "own-epsilon": "return from_hf(config, norm_epsilon=1e-5)",
    "renaming": "return from_hf(config, architecture='OtherForCausalLM')",
}

PRECISION = """
import json
import os
import subprocess
import sys
import time

from engine_recipes import RequestError, checkpoint, hookimpl


@hookimpl
def stage1(context):
    tp_size, edit = context.options.get("tp_size", 1), None
    unkeyed = context.options.get("unkeyed", 0)
    {before}
    with checkpoint.open_source(context.input("hf-checkpoint")) as source:
        checkpoint.convert(source, context.out, dtype="float16", tp_size=tp_size, edit=edit)
    config = json.loads((context.out / "config.json").read_text())
    {after}
    (context.out / "config.json").write_text(json.dumps(config))
"""
PRECISIONS = {
    "dated": ("", "config['made'] = time.time_ns()"),
    "messy": ("open('notes.txt', 'w').write('x')", ""),
    "mislabelled": ("", ""),
    "coarse": ("edit = lambda name, rows: (rows * 8).round() / 8", ""),
    "lopsided": ("edit = None if tp_size == 1 else lambda name, rows: rows / 2", ""),
    "open-ended": ("", ""),
    "whole": ("tp_size = 1", ""),
    "unkeyed": ("", "config['unkeyed'] = unkeyed"),
    "locking": ("", "(context.out / 'config.json.lock').write_text('')"),
    "half-right": ("edit = None if context.options['bits'] == 8 else lambda name, rows: rows[::-1].copy()", ""),
    "third": ("", "config['device'] = context.options['device'] == 'tpu'"),
    "wide": ("", ""),
    "choosy": ("", ""),
    "own-noting": ("open(__file__ + '.txt', 'w').write('x')", ""),
    "parent": ("subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'], start_new_session=True)", ""),
    "hiding": (
        "environment = {k: v for k, v in os.environ.items() if k != 'RECIPES_STAGE'}\n"
        "    subprocess.Popen(['sleep', '60'], start_new_session=True, env=environment)",
        "time.sleep(1)",
    ),
}

UNKEYED = 'unkeyed = { default = 0, min = 0, keyed = false, help = "workers" }'
OPTIONS = {
    "open-ended": "level = 3",
    "unkeyed": UNKEYED,
    "half-right": 'bits = { default = 8, choices = [8, 4], help = "of each weight" }',
    "third": 'device = { default = "auto", choices = ["auto", "cpu", "tpu"], keyed = false, help = "where" }',
}
REFUSING = """

@hookimpl
def check_decoder(decoder):
    if decoder.hidden_size % {multiple} or not decoder.tied:
        raise RequestError("tied models with rows of {multiple} are needed", "use another model")
"""

CALIBRATION = """
import os

from engine_recipes import checkpoint, hookimpl


@hookimpl
def calibrate(context):
    rows = context.options.get("rows", 1)
    numbers = {{"model.embed_tokens.weight.seen": [{number}]}}
    checkpoint.write_statistics(context.out, numbers, {{"method": "none"}})
    {after}
"""
#: Name -> the number that is measured, what is done then. No precision names them.
CALIBRATIONS = {
    "random": ("float(int.from_bytes(os.urandom(4), 'big'))", ""),
    "by-rows": ("float(rows)", ""),
    "lingering": ("1.0", "import subprocess; subprocess.Popen(['sleep', '60'], start_new_session=True)"),
}
ROWS = 'rows = { default = 1, min = 1, keyed = false, help = "at a time" }'

REFERENCE = """
from engine_recipes import hookimpl


@hookimpl
def load_source(context):
    from engine_recipes_engines import onnxruntime

    runtime = onnxruntime.load_source(context)
    real = runtime.logits
    runtime.logits = lambda ids: real(ids)[:, ::-1]
    return runtime
"""

ENGINE = """
import json
import os
import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import engine_recipes
from engine_recipes import RequestError, Sampling, hookimpl


def changed(context, **changes):
    for file in context.out.glob("model*"):
        file.unlink()
    folder = Path(tempfile.mkdtemp(), "checkpoint")
    shutil.copytree(context.inputs[0].path, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({{**config, **changes}}))
    return replace(context, inputs=(replace(context.inputs[0], path=folder), *context.inputs[1:]))


@hookimpl
def stage2(context):
    from engine_recipes_engines import onnxruntime

    onnxruntime.stage2(context)
    (context.out / "extra.bin").write_bytes(b"0123456789")
    {stage2}


@hookimpl
def load_engine(folder, options):
    from engine_recipes_engines import onnxruntime

    {load}
    return Runtime(onnxruntime.load_engine(folder, options), folder)


class Runtime:
    max_seq_len = 256

    def __init__(self, real, folder):
        self.real, self.folder = real, folder

    def generate(self, prompt, sampling, stop=frozenset()):
        return self.real.generate(prompt, sampling, stop)

    def logits(self, ids):
        return self.real.logits(ids)

    def close(self):
        self.real.close()

{methods}
"""
#: Name -> what stage2 does more, what load_engine does first, methods of the runtime that are different.
ENGINES = {
    "forgetful": ("", "", """
    def generate(self, prompt, sampling, stop=frozenset()):
        for _ in range(sampling.max_tokens):
            prompt = [*prompt[-2:], next(self.real.generate(prompt[-2:], Sampling(max_tokens=1)))]
            yield prompt[-1]
"""),
    "deaf": ("", "", """
    def generate(self, prompt, sampling, stop=frozenset()):
        return self.real.generate(prompt, sampling)
"""),
    "endless": ("", "", """
    def generate(self, prompt, sampling, stop=frozenset()):
        while True:
            yield from self.real.generate(prompt, Sampling(max_tokens=12), stop)
"""),
    "trusting": ("", "", """
    def logits(self, ids):
        return self.real.logits([max(0, id) % 256 for id in ids] or [0])
"""),
    "dicing": ("", "", """
    def generate(self, prompt, sampling, stop=frozenset()):
        seed = time.monotonic_ns() % 2**32
        return self.real.generate(prompt, Sampling(sampling.max_tokens, sampling.temperature, seed), stop)
"""),
    "rooted": ("", "assert '-rooted-cpu-' in folder.name", ""),
    "scribbling": ("", "(folder / 'loaded').write_text(str(time.time_ns()))", ""),
    "brittle": ("", "", """
    def generate(self, prompt, sampling, stop=frozenset()):
        if len((self.folder / "extra.bin").read_bytes()) != 10:
            raise ValueError("extra")
        return self.real.generate(prompt, sampling, stop)
"""),
    "crashing": ("", "if len((folder / 'extra.bin').read_bytes()) != 10: os.abort()", ""),
    "late": (
        "from engine_recipes import checkpoint; opened = checkpoint.open_checkpoint(context.inputs[0].path)\n"
        "    if opened.scheme.algorithm: raise RequestError('no quantised weights', 'use plain ones')",
        "",
        "",
    ),
    "unbound": ("", "", ""),
    "moody": ("(context.out / 'extra.bin').write_bytes(os.urandom(10))", "", ""),
    "silu-only": ("onnxruntime.stage2(changed(context, hidden_act='silu'))", "", ""),
    "rope-blind": ("onnxruntime.stage2(changed(context, rotary_scaling=None))", "", ""),
    "unscaled": ("onnxruntime.stage2(changed(context, embedding_multiplier=1.0))", "", ""),
    "norm-blind": ("onnxruntime.stage2(changed(context, norm_epsilon=0.5))", "", ""),
    "clinging": (
        "(context.out / 'extra.bin').write_text(str(context.inputs[0].path))",
        "assert Path((folder / 'extra.bin').read_text()).exists()",
        "",
    ),
    "closing-once": ("", "", """
    def close(self):
        del self.real
"""),
    "peeking": ("", "", """
    def logits(self, ids):
        return self.real.logits(ids) + ids[-1]
"""),
    "one-stop": ("", "", """
    def generate(self, prompt, sampling, stop=frozenset()):
        return self.real.generate(prompt, sampling, frozenset(sorted(stop)[:1]))
"""),
    "zero-is-none": ("", "", """
    def generate(self, prompt, sampling, stop=frozenset()):
        sampling = replace(sampling, seed=sampling.seed or time.monotonic_ns() % 2**32)
        return self.real.generate(prompt, sampling, stop)
"""),
    "lukewarm": ("", "", """
    def generate(self, prompt, sampling, stop=frozenset()):
        return self.real.generate(prompt, replace(sampling, temperature=1.0 * (sampling.temperature > 0)), stop)
"""),
    "greedy": ("", "", """
    def generate(self, prompt, sampling, stop=frozenset()):
        return self.real.generate(prompt, replace(sampling, temperature=0.0), stop)
"""),
    "stale": ("", "", """
    def generate(self, prompt, sampling, stop=frozenset()):
        seen = self.__dict__.setdefault("seen", {})
        return self.real.generate(seen.setdefault(tuple(prompt[:4]), prompt), sampling, stop)
"""),
    "global": ("", "", """
    def __init__(self, real, folder):
        self.real = Runtime.latest = real

    def generate(self, prompt, sampling, stop=frozenset()):
        return Runtime.latest.generate(prompt, sampling, stop)
"""),
    "one-cache": ("", "", """
    def generate(self, prompt, sampling, stop=frozenset()):
        self.fed = list(prompt)
        for _ in range(sampling.max_tokens):
            self.fed += self.real.generate(self.fed, Sampling(max_tokens=1))
            yield self.fed[-1]
"""),
    "echoing": ("", "", """
    def generate_batch(self, prompts, sampling):
        for token in self.real.generate(prompts[0], sampling):
            yield [token] * len(prompts)
"""),
    "buffering": ("", "", """
    def logits(self, ids):
        rows = self.real.logits(ids)
        self.buffer = self.__dict__.get("buffer", rows)
        self.buffer[: len(rows)] = rows
        return self.buffer if len(rows) == len(self.buffer) else rows
"""),
    "appending": ("", "", """
    def generate(self, prompt, sampling, stop=frozenset()):
        for token in self.real.generate(list(prompt), sampling, stop):
            prompt.append(token)
            yield token
"""),
    "short-sighted": ("", "", """
    def logits(self, ids):
        rows = self.real.logits(ids)
        if len(ids) > 64:
            rows[64:] = self.real.logits(ids[32:])[32:]
        return rows
"""),
    "even-only": ("", "", """
    def logits(self, ids):
        rows = self.real.logits(ids)
        return rows if rows.shape[1] % 2 == 0 else rows[:, ::-1].copy()
"""),
    "secretive": ("onnxruntime.stage2(changed(context, rotary_base=10.0))", "", """
    def logits(self, ids):
        return None
"""),
    "first-rank": (
        "(context.inputs[0].path / 'rank1.safetensors').exists() and"
        " onnxruntime.stage2(changed(context, norm_epsilon=0.5))",
        "",
        "",
    ),
    "float16-only": (
        "'bfloat16' in (context.inputs[0].path / 'config.json').read_text() and"
        " onnxruntime.stage2(changed(context, norm_epsilon=0.5))",
        "",
        "",
    ),
    "rounding": ("", "", """
    def logits(self, ids):
        return self.real.logits(ids).astype("float32").round(2)
"""),
    "choosy": ("", "", """
@hookimpl
def check_decoder(decoder):
    if not decoder.qkv_bias:
        raise RequestError("q without a bias is not known", "use models with one")
"""),
}  # fmt: skip


def write(folder: Path) -> Path:
    """Write the package; returns the folder to `install`."""
    lines, modules = ["api = 1"], {}
    for name, body in FAMILIES.items():
        modules[module := f"family_{name.replace('-', '_')}"] = FAMILY.format(body=body)
        lines += [f"[families.{name}]", f'module = "engine_recipes_broken.{module}"']
        lines += ['architectures = ["LlamaForCausalLM"]']
    for name, (before, after) in PRECISIONS.items():
        modules[module := f"precision_{name.replace('-', '_')}"] = PRECISION.format(before=before, after=after)
        lines += [f"[precisions.{name}]", f'module = "engine_recipes_broken.{module}"']
        lines += ['algorithm = "W8A16"'] * (name == "mislabelled")
        option = 'tp_size = { default = 1, min = 1, help = "ranks" }'
        lines += [f"[precisions.{name}.options]", OPTIONS.get(name, option)]
        modules[module] += {"wide": REFUSING.format(multiple=192), "choosy": REFUSING.format(multiple=128)}.get(
            name, ""
        )
    for name, (number, after) in CALIBRATIONS.items():
        modules[module := f"calibration_{name.replace('-', '_')}"] = CALIBRATION.format(number=number, after=after)
        lines += [f"[calibrations.{name}]", f'module = "engine_recipes_broken.{module}"']
        lines += [f"[calibrations.{name}.options]", ROWS]
    modules["reference"] = REFERENCE
    lines += ["[references.mirrored]", 'module = "engine_recipes_broken.reference"']
    for name, (stage2, load, methods) in ENGINES.items():
        modules[module := f"engine_{name.replace('-', '_')}"] = ENGINE.format(stage2=stage2, load=load, methods=methods)
        lines += [f"[engines.{name}]", f'module = "engine_recipes_broken.{module}"']
        lines += ['takes = ["trtllm-checkpoint"]', f'gives = "{name}-engine"', 'targets = ["cpu"]']
        lines += ['binds = ["acme-runtime"]'] * (name == "unbound")
    return package(folder, "engine-recipes-broken", "\n".join(lines), **modules)
