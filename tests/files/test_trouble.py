"""Publishing in trouble: a full disk or no permission at every write, and readers beside a writer."""

from __future__ import annotations

import errno
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnxcomp.errors import OnnxcompError
from onnxcomp.files import atomic, storage, switch
from tests.files.test_storage import names
from tests.files.test_switch import held, put

pytestmark = [
    pytest.mark.skipif(os.name != "posix", reason="forks and folder descriptors"),
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),
]
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
REFUSED, RAW, DONE = 2, 1, 0  # how a fork ends


@pytest.fixture(autouse=True)
def outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "INLINE_LIMIT", 0)


def refusing(step: int, number: int, place: Path, action: Callable[[], Any]) -> int:
    """How a fork ends in which the n-th write under `place`, and every later one, fails with an error of the system."""
    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    seen = [0]

    def refuse() -> None:
        seen[0] += 1
        if seen[0] >= step:
            raise OSError(number, os.strerror(number))

    def watch(event: str, args: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(args[2], int) and args[2] & WRITES
        if (writes or event in ("os.mkdir", "os.rename", "os.link")) and str(args[0]).startswith(str(place)):
            refuse()

    def sync(fd: int) -> None:
        refuse()  # where a disk that delays its allocation says that it is full

    sys.addaudithook(watch)
    os.fsync = sync
    try:
        action()
    except OnnxcompError as e:
        os._exit(REFUSED if os.strerror(number) in str(e) and "\n" not in str(e) else RAW)
    except BaseException:  # noqa: BLE001  a fork must not go on as a second test run
        os._exit(RAW)
    os._exit(DONE)


@pytest.mark.parametrize(
    ("number", "beside"),
    [(errno.ENOSPC, "nothing"), (errno.ENOSPC, "folder"), (errno.EACCES, "old")],
)
def test_a_write_that_fails_is_one_error_and_the_old_result_stays(tmp_path: Path, number: int, beside: str) -> None:
    """Every step of publishing in turn; a result that was begun to be moved in file by file is completed later."""
    code, step, seen = REFUSED, 0, set()
    while code != DONE:
        step += 1
        place = tmp_path / str(step)
        out = place / "deep" / "out"
        place.mkdir()
        if beside != "nothing":
            put(out, 1)
        if beside == "folder":
            (out / "sub").mkdir()
        code = refusing(step, number, place, lambda out=out: put(out, 2))  # type: ignore[misc]
        assert code in (REFUSED, DONE), f"step {step} ended with {code}"
        if beside == "folder":
            storage.graphs_of(out)
        found = held(out) if out.exists() else 0
        seen.add(found)
        assert code == REFUSED or found == 2
        assert list(place.rglob(".onnxcomp-*")) == []
        assert out.exists() or names(place) == []
    assert seen == ({0, 2} if beside == "nothing" else {1, 2})
    assert step > 8


@pytest.mark.parametrize("size", [0, 100, 5000])
def test_a_disk_that_is_full_in_the_middle_of_a_file(tmp_path: Path, size: int) -> None:
    """The system refuses the bytes themselves: of the weights, of a model file."""
    resource = pytest.importorskip("resource")
    put(tmp_path / "out", 1)
    if (pid := os.fork()) == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        try:
            put(tmp_path / "out", 2)
        except OnnxcompError as e:
            os._exit(REFUSED if "cannot be written" in str(e) else RAW)
        except BaseException:  # noqa: BLE001
            os._exit(RAW)
        os._exit(DONE)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == REFUSED
    assert held(tmp_path / "out") == 1
    assert names(tmp_path) == ["out"]


# ---- readers beside a writer -----------------------------------------------------------------------------------------

TIMES = 40


def _write_often(out: str, exchange: bool) -> None:
    if not exchange:
        switch._swap = _no_swap  # type: ignore[assignment]
    for i in range(TIMES):
        put(Path(out), 2 + i % 4)
        time.sleep(0.005)


def _no_swap(a: Path, b: Path) -> None:
    raise OSError(errno.ENOSYS, "no exchange")


def _in_folder(folder: int, name: str) -> bytes:
    with os.fdopen(os.open(name, os.O_RDONLY, dir_fd=folder), "rb") as f:
        return f.read()


def _values(out: Path) -> set[float]:
    """What all files of a result say, read through one descriptor of the folder; raises where it was taken away."""
    folder = os.open(out, os.O_RDONLY)
    try:
        found = {float(_in_folder(folder, name)) for name in ("config.json", "report.json")}
        model = storage.onnx.ModelProto.FromString(_in_folder(folder, "model.onnx"))
        for t in model.graph.initializer:
            told = {e.key: e.value for e in t.external_data}
            found |= set(np.frombuffer(_in_folder(folder, told["location"]), np.float32)[:5000].tolist())
        return found
    finally:
        os.close(folder)


def test_a_reader_of_one_folder_never_sees_two_results(tmp_path: Path) -> None:
    """Where folders are exchanged, whoever opens the folder once and reads in it has one run's files."""
    out = tmp_path / "out"
    put(out, 1)
    writer = multiprocessing.get_context("fork").Process(target=_write_often, args=(str(out), True))
    writer.start()
    whole: set[float] = set()
    while writer.is_alive():
        try:
            found = _values(out)
        except FileNotFoundError:  # the folder that was opened is the old one, which is being removed
            continue
        assert len(found) == 1
        whole |= found
    writer.join()
    assert writer.exitcode == 0
    assert len(whole) > 1


@pytest.mark.parametrize("exchange", [True, False])
def test_readers_of_ours_get_a_whole_model_whenever_they_come(tmp_path: Path, exchange: bool) -> None:
    """Also where files are moved one by one: what was begun is completed first, and a read is tried again."""
    out = tmp_path / "out"
    put(out, 1)
    writer = multiprocessing.get_context("fork").Process(target=_write_often, args=(str(out), exchange))
    writer.start()
    seen, reads = set(), 0
    while writer.is_alive():
        g = storage.load(out)
        (v,) = g.model.graph.initializers.values()
        seen.add(v.const_value.nbytes if v.const_value is not None else 0)
        reads += 1
    writer.join()
    assert writer.exitcode == 0
    assert seen == {20000}
    assert reads > 3
    assert held(out) in range(2, 6)
    assert atomic.remove_stale(tmp_path) is None
    assert names(tmp_path) == ["out"]
