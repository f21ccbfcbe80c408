"""A fuzzer: damaged and hostile inputs of every kind, each tried in a worker with a time limit, and what came of it.

A case is a number: everything it does follows from its seed. An input may be accepted or refused (`OnnxcompError`);
a raw exception, a hang, a crash of the process or a byte written outside of the output is a failure.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import select
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from onnxcomp.errors import OnnxcompError
from onnxcomp.files import storage
from onnxcomp.runtime import child, trial
from tests import mutations

__all__ = ["KINDS", "Outcome", "fuzz"]

Rng = np.random.Generator
LIMIT = 30.0  # seconds of one case
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod")


@dataclass(frozen=True)
class Outcome:
    """What came of a case: `ok`, `refused`, or a failure (`raw`, `fault`, `hang`, `crash`, `outside`) with its text."""

    kind: str
    seed: int
    verdict: str
    text: str = ""

    @property
    def failed(self) -> bool:
        return self.verdict not in ("ok", "refused")


# ---- what is tried ---------------------------------------------------------------------------------------------------


def _load(rng: Rng, folder: Path) -> Callable[[], Any]:
    """A damaged model is only loaded."""
    source = _damaged(rng, folder)
    return lambda: storage.load(source).infer_shapes()


def _model(rng: Rng, folder: Path) -> Callable[[], Any]:
    """A damaged model is inspected, optimized, compressed or compared."""
    return _use(rng, _damaged(rng, folder), folder)


def _damaged(rng: Rng, folder: Path) -> Path:
    source = folder / "in" / "model.onnx"
    base = mutations.base(rng)
    if rng.random() < 0.3:
        source.write_bytes(mutations.damaged(rng, base.SerializeToString(), 1 + int(rng.integers(4))))
    else:
        for _ in range(int(mutations.pick(rng, (1, 1, 1, 2, 4)))):
            mutations.change_model(rng, base)
        source.write_bytes(base.SerializeToString())
    return source


PASSES: Sequence[Sequence[Any]] = (
    *(["dynamic-quant", "lower"], ["half", "lower"], ["cleanup"], ["qdq", "lower"]),
    *([{"prune-heads": {"keep": 0.5}}], [{"prune-ffn": {"keep": 0.5}}], [{"drop-layers": {"keep": 0.5}}]),
)


def _use(rng: Rng, source: Path, folder: Path) -> Callable[[], Any]:
    import onnxcomp as oc
    from onnxcomp.cli import inspect_model

    out = folder / "out"
    chosen = rng.random()
    if chosen < 0.4:
        return lambda: inspect_model.inspect(source)
    if chosen < 0.75:
        return lambda: oc.optimize(source, out, measure=False)
    if chosen < 0.85:
        return lambda: oc.validate(source, source, "random", samples=2, batch=1, sequence=5)
    some = ["canonicalize", *mutations.pick(rng, PASSES)]
    return lambda: oc.compress(source, out, passes=some, calibration="random", samples=2, measure=False)


def _external(rng: Rng, folder: Path) -> Callable[[], Any]:
    """External data that is short, damaged or elsewhere."""
    source = folder / "in" / "model.onnx"
    proto = mutations.with_external_data(rng, mutations.base(rng), source.parent)
    source.write_bytes(proto.SerializeToString())
    return _use(rng, source, folder)


def _recipe(rng: Rng, folder: Path) -> Callable[[], Any]:
    import onnxcomp as oc

    source = folder / "in" / "model.onnx"
    source.write_bytes(mutations.encoder().SerializeToString())
    file = folder / "in" / "recipe.yaml"
    file.write_bytes(mutations.recipe(rng))
    to = source.parent if rng.random() < 0.3 else folder / "out"
    return lambda: oc.compress(source, to, recipe=file, calibration="random", samples=2, sequence=4, measure=False)


def _data(rng: Rng, folder: Path) -> Callable[[], Any]:
    """Arrays, texts, tokenizers and configurations beside a model that is sound."""
    import onnxcomp as oc

    inside = folder / "in"
    (inside / "model.onnx").write_bytes(mutations.encoder().SerializeToString())
    data = mutations.data(rng, inside)
    return lambda: oc.validate(inside / "model.onnx", inside / "model.onnx", str(data), samples=4)


def _cache(rng: Rng, folder: Path) -> Callable[[], Any]:
    """A cache folder and a file of choices in which anything was changed."""
    import onnxcomp as oc

    inside, cache = folder / "in", folder / "cache"
    (inside / "model.onnx").write_bytes(mutations.encoder().SerializeToString())
    shutil.copytree(mutations.cache(), cache)
    mutations.change_files(rng, cache)
    choices = next(iter(cache.glob("choices-*.json")), None) if rng.random() < 0.3 else None

    def run() -> None:
        oc.compress(
            inside / "model.onnx", folder / "out", passes=mutations.CACHED, calibration="random", samples=4, sequence=4,
            measure=False, cache=cache, choices=choices,
        )  # fmt: skip

    return run


KINDS: dict[str, Callable[[Rng, Path], Callable[[], Any]]] = {
    "load": _load,
    "model": _model,
    "external": _external,
    "recipe": _recipe,
    "data": _data,
    "cache": _cache,
}


# ---- how it is tried -------------------------------------------------------------------------------------------------


def fuzz(kind: str, seeds: Sequence[int], limit: float = LIMIT, keep: Path | None = None) -> Iterator[Outcome]:
    """Try cases in one worker, which is started again after a hang or a crash; failing inputs are copied to `keep`."""
    left = list(seeds)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        while left:
            reader, writer = os.pipe()
            if (pid := os.fork()) == 0:
                os.close(reader)
                _worker(kind, left, Path(name), writer, keep)
            os.close(writer)
            with os.fdopen(reader, "rb", buffering=0) as replies:
                while left:
                    outcome = _next(kind, left[0], replies, pid, limit)
                    left.pop(0)
                    yield outcome
                    if outcome.verdict in ("hang", "crash"):
                        if keep is not None:
                            shutil.copytree(Path(name) / "in", keep / f"{kind}-{outcome.seed}", dirs_exist_ok=True)
                        break
                else:
                    os.waitpid(pid, 0)


def _next(kind: str, seed: int, replies: Any, pid: int, limit: float) -> Outcome:
    if not select.select([replies], [], [], limit)[0]:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        return Outcome(kind, seed, "hang", f"no end within {limit:.0f} s")
    if line := replies.readline():
        return Outcome(**json.loads(line))
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return Outcome(kind, seed, "crash", f"the process ended with {status}")


def _worker(kind: str, seeds: Sequence[int], folder: Path, writer: int, keep: Path | None) -> None:
    """Answer one outcome after the other; never returns."""
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        trial.spawn = _spawn
        trial._worker = None
        child.SECONDS = 5
        outside: list[str] = []
        sys.addaudithook(lambda event, args: _audit(event, args, folder, outside))
        with os.fdopen(writer, "w") as answers:
            for seed in seeds:
                answers.write(json.dumps(dataclasses.asdict(_one(kind, seed, folder, outside, keep))) + "\n")
                answers.flush()
    finally:
        os._exit(0)


def _one(kind: str, seed: int, folder: Path, outside: list[str], keep: Path | None) -> Outcome:
    for p in folder.iterdir():
        shutil.rmtree(p)
    (folder / "in").mkdir()
    run = KINDS[kind](np.random.default_rng([*kind.encode(), seed]), folder)
    before = _contents(folder / "in")
    outside.clear()
    os.chdir(folder)
    try:
        run()
        verdict, text = "ok", ""
    except OnnxcompError as e:
        fault = type(e).__name__ == "PassFault"
        verdict, text = ("fault" if fault else "refused"), str(e)
    except BaseException as e:  # noqa: BLE001  that is what is looked for
        where = traceback.extract_tb(e.__traceback__)
        ours = [f"{Path(f.filename).name}:{f.lineno}" for f in where if "onnxcomp" in f.filename]
        verdict, text = "raw", f"{type(e).__name__}: {str(e)[:160]} at {' < '.join(reversed(ours[-4:]))}"
    after = _contents(folder / "in")
    if outside or any(after.get(k) != v for k, v in before.items()):
        changed = [k for k, v in before.items() if after.get(k) != v]
        verdict, text = "outside", f"wrote {outside[:2]} or changed {changed}"
    outcome = Outcome(kind, seed, verdict, text)
    if keep is not None and outcome.failed:
        shutil.copytree(folder / "in", keep / f"{kind}-{seed}", dirs_exist_ok=True)
    return outcome


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def _audit(event: str, args: tuple[Any, ...], folder: Path, outside: list[str]) -> None:
    """Note what is written outside of the case's folder and the scratch folders."""
    if event == "open":
        path, _, flags = args
        if not (isinstance(flags, int) and flags & WRITES) or not isinstance(path, (str, bytes)):
            return
    elif event in CHANGES:
        path = args[1] if event in ("os.rename", "os.link", "os.symlink") else args[0]
    else:
        return
    if isinstance(path, (str, bytes, os.PathLike)):
        place = os.path.abspath(os.fsdecode(path))
        scratch = os.path.join(tempfile.gettempdir(), "")
        ours = (f"{folder}{os.sep}", f"{scratch}onnxcomp-scratch-", f"{scratch}tmp", "/dev/")
        inside = place == str(folder) or place.startswith(ours)
        if not inside and "__pycache__" not in place:
            outside.append(f"{event} {place}")


class _Fork:
    """What `child.Child` uses of a process, for a fork: a start takes no seconds here."""

    def __init__(self) -> None:
        lines, to = os.pipe()
        back, answers = os.pipe()
        self.returncode: int | None = None
        if (pid := os.fork()) == 0:
            try:
                os.close(to)
                os.close(back)
                with os.fdopen(lines) as asked, os.fdopen(answers, "w") as replies:
                    trial.answer(asked, replies)
            finally:
                os._exit(0)
        os.close(lines)
        os.close(answers)
        self.pid, self.stdin, self.stdout = pid, os.fdopen(to, "w"), os.fdopen(back)

    def poll(self) -> int | None:
        return self.returncode

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.returncode


def _spawn() -> child.Child:
    made = child.Child.__new__(child.Child)
    vars(made).update(name="", _what="the process that ran it", _log=io.BytesIO(), process=_Fork())
    return made
