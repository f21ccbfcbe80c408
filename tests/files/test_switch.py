"""Laws of publishing: old or new, whole, whenever we are killed; runs beside each other; nothing stays behind."""

from __future__ import annotations

import errno
import multiprocessing
import os
import shutil
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnxcomp.errors import ModelError, OnnxcompError
from onnxcomp.files import atomic, storage, switch
from tests.files.test_storage import holding, names

pytestmark = pytest.mark.skipif(os.name != "posix", reason="forks and locks")
RENAMES = ("rename", "replace", "link", "unlink")


@pytest.fixture(autouse=True)
def outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "INLINE_LIMIT", 0)
    monkeypatch.setattr(os, "fsync", lambda fd: None)  # kills are not power cuts


def put(out: Path, value: int, name: str = "model.onnx", owned: tuple[str, ...] = ("tokenizer.json",)) -> None:
    """Publish a result whose weights, configuration, report and seal say `value`; an odd one has a tokenizer too."""

    def seal(staging: Path, gone: object) -> None:
        (staging / "manifest.json").write_text(str(value))

    with storage.publish(out, owned, seal) as staging:
        storage.save(holding(np.full(5000, value, np.float32)), staging, name=name)
        (staging / "config.json").write_text(str(value))
        (staging / "report.json").write_text(str(value))
        if value % 2:
            (staging / "tokenizer.json").write_text(str(value))


def held(out: Path) -> int:
    """The value that all files of a result agree on; nothing else of ours may be there."""
    value = int((out / "config.json").read_text())
    g = storage.load(out / "model.onnx")
    (v,) = g.model.graph.initializers.values()
    assert set(g.array(v)) == {float(value)}
    assert (out / "report.json").read_text() == (out / "manifest.json").read_text() == str(value)
    tokenizer = out / "tokenizer.json"
    assert tokenizer.exists() == bool(value % 2)
    assert not tokenizer.exists() or tokenizer.read_text() == str(value)
    return value


def killed(step: int, action: Callable[[], Any]) -> bool:
    """Run an action in a fork that dies at its n-th change of a name; whether it came so far."""
    if (pid := os.fork()) == 0:
        left = [step]

        def counted(real: Any) -> Any:
            def call(*args: Any, **options: Any) -> Any:
                left[0] -= 1
                if left[0] == 0:
                    os._exit(9)
                return real(*args, **options)

            return call

        for name in (*RENAMES, "rmdir"):
            setattr(os, name, counted(getattr(os, name)))
        switch._swap = counted(switch._swap)  # type: ignore[assignment]
        try:
            action()
        except BaseException:  # noqa: BLE001  a fork must not go on as a second test run
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code in (0, 9)
    return code == 9


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("beside", ["nothing", "old", "file", "folder", "model"])
def test_a_kill_at_every_rename_leaves_the_old_result_or_the_new_one(tmp_path: Path, beside: str) -> None:
    """Row 4 of the issue's cases: a folder of its own, one with a user's files, and one that cannot be exchanged."""
    seen, step = set(), 0
    died = True
    while died:
        step += 1
        place = tmp_path / str(step)
        out = place / "out"
        place.mkdir()
        if beside != "nothing":
            put(out, 1)
        if beside == "file":
            (out / "notes.txt").write_text("mine")
        elif beside == "folder":
            (out / "sub").mkdir()
        elif beside == "model":
            storage.save(holding(np.zeros(3000, np.float32)), out, name="other.onnx")
        died = killed(step, lambda out=out: put(out, 2))  # type: ignore[misc]
        if beside in ("folder", "model"):  # moved file by file: a reader of ours completes it
            storage.graphs_of(out)
        seen.add(held(out) if out.exists() else 0)
        assert beside != "file" or (out / "notes.txt").read_text() == "mine"
        put(out, 3)
        assert held(out) == 3
        assert names(place) == ["out"]
        assert not [n for n in names(out) if n.startswith(".")]
        if beside == "model":
            assert storage.load(out / "other.onnx").nbytes == 12000
    assert seen == ({0, 2} if beside == "nothing" else {1, 2})
    assert step > 4


@pytest.mark.parametrize("folder", [False, True])
def test_without_exchange_the_files_are_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: bool) -> None:
    """Another system or a mount point has no exchange; a user's file and the folder's own mode stay."""

    def none(a: Path, b: Path) -> None:
        raise OSError(38, "no such call")

    put(tmp_path / "out", 1)
    (tmp_path / "out").chmod(0o750)
    (tmp_path / "out" / "notes.txt").write_text("mine")
    before = (tmp_path / "out").stat().st_ino
    if not folder:
        monkeypatch.setattr(switch, "_swap", none)
    put(tmp_path / "out", 2)
    assert held(tmp_path / "out") == 2
    assert ((tmp_path / "out").stat().st_ino == before) == (not folder)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o750
    notes = tmp_path / "out" / "notes.txt"
    assert (notes.read_text(), notes.stat().st_nlink) == ("mine", 1)
    assert not [n for n in names(tmp_path / "out") if n.startswith(".")]


def test_a_folder_on_another_mount_gets_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bind mount of the same disk: nothing can be renamed into it from beside it."""
    put(tmp_path / "out", 1)
    real = os.rename

    def rename(a: Path, b: Path) -> None:
        if Path(a).parent != Path(b).parent:
            raise OSError(errno.EXDEV, "cross-device link")
        real(a, b)

    monkeypatch.setattr(os, "rename", rename)
    monkeypatch.setattr(switch, "_occupied", lambda folder: True)
    put(tmp_path / "out", 2)
    assert held(tmp_path / "out") == 2
    assert names(tmp_path) == ["out"]


def test_a_folder_that_a_process_stands_in_is_not_exchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "out", 1)
    monkeypatch.chdir(tmp_path / "out")
    put(Path(), 2)
    assert held(Path()) == 2
    assert held(tmp_path / "out") == 2


def _put_often(out: str, start: int) -> None:
    for i in range(6):
        put(Path(out), start + 2 * i)
        storage.save(holding(np.full(5000, start, np.float32)), Path(out).parent / "saved")


def test_runs_beside_each_other_leave_one_whole_result(tmp_path: Path) -> None:
    """Neither destroys the other's data file, whether they publish or save."""
    fork = multiprocessing.get_context("fork")
    runs = [fork.Process(target=_put_often, args=(str(tmp_path / "out"), i)) for i in (1, 2, 3)]
    for run in runs:
        run.start()
    for run in runs:
        run.join(60)
    assert [run.exitcode for run in runs] == [0, 0, 0]
    assert held(tmp_path / "out") in range(1, 14)
    assert storage.load(tmp_path / "saved").nbytes == 20000
    assert len(names(tmp_path / "saved")) == 2
    assert names(tmp_path) == ["out", "saved"]


def test_a_living_run_is_not_swept_wherever_it_lives(tmp_path: Path) -> None:
    """The lock tells, not the process id; what no process holds goes, also in the system's temporary folder."""
    with atomic.staging_folder(tmp_path) as living, atomic.temporary_file(tmp_path) as file:
        dead = tmp_path / ".onnxcomp-00000000.tmp"
        dead.mkdir()
        atomic.remove_stale(tmp_path)
        assert living.is_dir()
        assert file.is_file()
        assert not dead.exists()
    assert names(tmp_path) == []


def test_scratch_folders_of_killed_runs_are_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic.tempfile, "gettempdir", lambda: str(tmp_path))
    (tmp_path / "onnxcomp-scratch-0").mkdir()
    (tmp_path / "onnxcomp-scratch-0" / "weights").write_text("big")
    with atomic.scratch_folder() as a, atomic.scratch_folder() as b:
        assert names(tmp_path) == sorted([a.name, b.name])
        assert stat.S_IMODE(a.stat().st_mode) == 0o700
    assert names(tmp_path) == []


def test_another_run_is_waited_for_and_not_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic, "_PATIENCE", 0.2)
    with pytest.raises(OnnxcompError, match="another run has been writing there"), atomic.locked(tmp_path):
        storage.save(holding(np.ones(3, np.float32)), tmp_path)
    assert names(tmp_path) == []
    with atomic.locked(tmp_path):
        monkeypatch.setattr(atomic, "_PATIENCE", 30)
        later = threading.Thread(target=storage.save, args=(holding(np.ones(3, np.float32)), tmp_path))
        later.start()
    later.join(30)
    assert "model.onnx" in names(tmp_path)


def test_what_a_stranger_put_into_a_ready_folder_stays_inside(tmp_path: Path) -> None:
    """A folder of models may come from anywhere: no link is followed, no name leaves it."""
    victim, out = tmp_path / "victim", tmp_path / "out"
    put(out, 1)
    victim.mkdir()
    (victim / "file").write_text("mine")
    (out / ".onnxcomp-0.ready").symlink_to(victim)
    ready = out / ".onnxcomp-1.ready"
    ready.mkdir()
    (ready / ".removed").write_text("../victim/file\n/etc/hostname\n..\n")
    assert held(out) == 1
    assert names(victim) == ["file"]
    assert not ready.exists()


def test_a_folder_in_the_place_of_a_file_is_one_clear_error(tmp_path: Path) -> None:
    put(tmp_path / "out", 2)
    (tmp_path / "out" / "tokenizer.json").mkdir()
    with pytest.raises(ModelError, match=r"tokenizer\.json: is a folder"):
        put(tmp_path / "out", 1)
    shutil.rmtree(tmp_path / "out" / "tokenizer.json")
    assert held(tmp_path / "out") == 2
