from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from engine_recipes import MachineError
from engine_recipes.store import Slot, Store, read_manifest, size_of

KEY = "0123456789abcdef" * 4
SLOT = Slot("engines", "model-fp16-onnxruntime-cpu", KEY)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "work space")


def put(store: Store, slot: Slot = SLOT, text: str = "weights") -> Path:
    with store.staging(slot) as out:
        (out / "model.bin").write_text(text)
        return store.commit(slot, out, {"ref": "model:fp16"})


def test_what_was_committed_is_found(store: Store) -> None:
    folder = put(store)
    assert folder.name == "model-fp16-onnxruntime-cpu-01234567"
    assert store.get(SLOT) == folder
    assert read_manifest(folder) == {"ref": "model:fp16", "key": KEY, "files": {"model.bin": 7}}


def test_a_stage_that_raises_leaves_nothing(store: Store) -> None:
    with pytest.raises(RuntimeError), store.staging(SLOT) as out:
        (out / "model.bin").write_text("half")
        raise RuntimeError
    assert store.get(SLOT) is None
    assert list((store.workspace / "engines").iterdir()) == []


def test_what_a_killed_build_left_is_swept_by_the_next(store: Store) -> None:
    left = store.workspace / "engines" / f".tmp-{SLOT.label}-01234567-dead"
    left.mkdir(parents=True)
    assert store.garbage() == [left]
    put(store)
    assert not left.exists()


def test_a_folder_whose_files_were_cut_is_not_whole(store: Store) -> None:
    folder = put(store)
    (folder / "model.bin").write_text("cut")
    assert store.get(SLOT) is None
    put(store)
    assert store.get(SLOT) == folder


def test_two_keys_with_the_same_eight_digits_live_side_by_side(store: Store) -> None:
    other = Slot(SLOT.place, SLOT.label, KEY[:8] + "f" * 56)
    first, second = put(store, SLOT, "one"), put(store, other, "two")
    assert first != second
    assert (store.get(SLOT), store.get(other)) == (first, second)


def test_the_plain_name_moves_to_the_newest(store: Store) -> None:
    first = put(store)
    second = put(store, Slot(SLOT.place, SLOT.label, "f" * 64))
    plain = store.link(first)
    assert plain.name == SLOT.label
    assert plain.resolve() == first
    store.link(second)
    assert plain.resolve() == second
    assert [folder for folder, _ in store.artifacts("engines")] == sorted([first, second])


def test_a_lock_is_waited_for_and_a_dead_holders_is_free(store: Store) -> None:
    hold = (
        "import sys, time; from pathlib import Path; from engine_recipes.store import Slot, Store;"
        "lock = Store(Path(sys.argv[1])).lock(Slot(*sys.argv[2:]), print); lock.__enter__(); print('held', flush=True);"
        "time.sleep(60)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", hold, store.workspace, *vars(SLOT).values()], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    waited = []

    def on_wait() -> None:
        waited.append(True)
        holder.kill()
        holder.wait()

    with store.lock(SLOT, on_wait):
        assert waited == [True]
    holder.stdout.close()


def test_staging_of_a_live_build_is_not_garbage(store: Store) -> None:
    with store.lock(SLOT, lambda: None), store.staging(SLOT) as out:
        assert out.exists()
        code = (
            "import sys; from pathlib import Path; from engine_recipes.store import Store;"
            "print(len(Store(Path(sys.argv[1])).garbage()))"
        )
        seen = subprocess.run([sys.executable, "-c", code, store.workspace], capture_output=True, text=True, check=True)
        assert seen.stdout == "0\n"


def test_no_write_permission_is_said() -> None:
    # Root may write everywhere, so the child gives root up first; it needs a folder it may at least enter.
    code = (
        "import os, shutil, sys; from pathlib import Path; from engine_recipes.store import Slot, Store;"
        "os.geteuid() or (os.setegid(65534), os.seteuid(65534));"
        "Store(Path(sys.argv[1]) / 'w').staging(Slot(*sys.argv[2:])).__enter__()"
    )
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o555)
        arguments = [sys.executable, "-c", code, folder, *vars(SLOT).values()]
        done = subprocess.run(arguments, capture_output=True, text=True, check=False)
        Path(folder).chmod(0o755)
    assert "MachineError: the workspace" in done.stderr
    assert "cannot be written: Permission denied" in done.stderr


def test_a_file_in_the_way_is_said(tmp_path: Path) -> None:
    (tmp_path / "w").write_text("")
    with pytest.raises(MachineError, match="--workspace"), Store(tmp_path / "w").staging(SLOT):
        pass


def test_sizes_count_all_files(store: Store) -> None:
    assert size_of(put(store)) > 7
    assert size_of(store.workspace / "absent") == 0
