"""Loading and saving models: weights are memory-mapped on load and written one at a time on save, files atomically."""

from __future__ import annotations

import hashlib
import itertools
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Set
from contextlib import contextmanager
from pathlib import Path

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from onnxcomp.errors import ModelError
from onnxcomp.files import external, inlining, weights
from onnxcomp.files.atomic import (
    locked,
    remove_stale,
    staging_folder,
    sync,
    sync_folder,
    temporary_file,
)
from onnxcomp.files.companions import COMPANIONS, companions, copy_companions
from onnxcomp.files.normalized import normalize
from onnxcomp.files.stored import Stored, digest
from onnxcomp.files.switch import finish, steadily, switch
from onnxcomp.files.verified import verify
from onnxcomp.graph import Graph
from onnxcomp.graph.inference import check_recorded

__all__ = [
    "COMPANIONS",
    "chosen_graphs",
    "companions",
    "copy_companions",
    "file_bytes",
    "fingerprint",
    "graphs_of",
    "load",
    "one_graph",
    "publish",
    "read",
    "save",
    "written_bytes",
]

INLINE_LIMIT = 64 << 20  # bytes of weights up to which a model is one file; protobuf's own limit is 2 GiB
LARGEST = (1 << 31) - 1  # bytes of a model file, data files not counted
MIN_IR = 10  # the lowest IR version that is written
_IR_OF = {  # the first IR version with an element type
    ir.DataType.FLOAT4E2M1: 11,
    ir.DataType.FLOAT8E8M0: 12,
    ir.DataType.UINT2: 13,
    ir.DataType.INT2: 13,
    ir.DataType.FLOAT6E2M3: 14,
    ir.DataType.FLOAT6E3M2: 14,
}
Seal = Callable[[Path, Set[str]], None]


# ---- loading ---------------------------------------------------------------------------------------------------------


def graphs_of(path: str | Path) -> dict[str, Path]:
    """`.onnx` files by name, for a file or a folder; raises `ModelError` when there is none."""
    try:
        source = Path(path)
        finish(source if source.is_dir() else source.parent)
    except TypeError:
        raise ModelError(f"a model is a path, not {str(path)[:80]!r}") from None
    except OSError as e:
        raise ModelError(f"{str(path)[:80]}: cannot be read: {e.strerror or e}") from e
    if source.is_dir():
        graphs = {f.stem: f for f in sorted(source.glob("*.onnx")) if f.is_file()}
        if not graphs:
            raise ModelError(f"{source}: no .onnx file in this folder{_hint(source)}")
        return graphs
    if not source.exists():
        raise ModelError(f"{source}: no such file or folder")
    if not source.is_file():
        raise ModelError(f"{source}: not a plain file")
    return {source.stem: source}


def _hint(folder: Path) -> str:
    if list(folder.glob("onnx/*.onnx")):
        return f"; there are some in {folder / 'onnx'}: name one of them"
    if (folder / "config.json").exists():
        return "; it looks like a checkpoint: run 'onnxcomp export' on it first"
    return ""


def load(path: str | Path) -> Graph:
    """A model from an `.onnx` file, or from a folder holding one; weights stay on disk until they are read.

    What runtimes accept is normalized, local functions are inlined; nothing of the file is changed. Raises `ModelError`
    for anything unsafe, invalid, damaged or ambiguous.
    """
    return read(path).graph


def read(path: str | Path) -> Stored:
    """A model as `load` gives it, with what its files tell; the one parse of a model that a job hands on."""
    return steadily(path, lambda: _read_once(path))


def _read_once(path: str | Path) -> Stored:
    graphs = graphs_of(path)
    if len(graphs) > 1:
        raise ModelError(f"{path}: holds several graphs ({', '.join(graphs)}); name one of the files")
    (file,) = graphs.values()
    proto = _read(file)
    files = _files(proto, file)
    try:
        normalize(proto)
        verify(proto)
        model = ir.from_proto(inlining.expanded(proto))
    except ModelError as e:
        raise ModelError(f"{file}: not a valid ONNX model: {e}") from e
    except (ir.serde.SerdeError, ValueError, TypeError, KeyError, AttributeError, RuntimeError) as e:
        raise ModelError(f"{file}: not a valid ONNX model: {_first_line(e)}") from e
    external.attach(model, file.parent)
    inlining.inline(model, file)
    try:
        check_recorded(model)
    except ModelError as e:
        raise ModelError(f"{file}: not a valid ONNX model: {e}") from e
    if any(v.type is None or v.shape is None for v in model.graph.outputs):
        Graph(model).infer_shapes()  # what the file leaves to the runtime belongs to the interface
    return Stored(file, Graph(model, file), files)


def _files(proto: onnx.ModelProto, path: Path) -> tuple[Path, ...]:
    """A model file and those of its external data, which are checked."""
    external.check(proto, path)
    return (path, *(path.parent / x for x in sorted(external.locations(proto))))


def _first_line(e: BaseException) -> str:
    while e.__cause__ is not None:
        e = e.__cause__
    return (str(e).strip() or type(e).__name__).splitlines()[0]


def _read(path: Path) -> onnx.ModelProto:
    """The protobuf of a model without its external data; raises `ModelError`."""
    try:
        proto = onnx.ModelProto()
        if (size := path.stat().st_size) > LARGEST:
            raise ModelError(f"{path}: has {size} bytes, and no model file has more than {LARGEST} (protobuf's limit)")
        proto.ParseFromString(path.read_bytes())
    except OSError as e:
        raise ModelError(f"{path}: cannot be read: {e.strerror or e}") from e
    except (DecodeError, ValueError) as e:
        raise ModelError(f"{path}: not an ONNX model or truncated") from e
    if not proto.ir_version or not proto.HasField("graph") or not proto.graph.output or not proto.opset_import:
        raise ModelError(f"{path}: not an ONNX model or truncated (it has no graph, outputs or operator set)")
    if proto.graph.sparse_initializer:
        raise ModelError(f"{path}: sparse initializers are not supported; store the weights dense")
    return proto


def fingerprint(path: str | Path) -> str:
    """SHA-256 (hex) of a model's files, external data included; independent of their folder."""
    whole = hashlib.sha256()
    for name, file in graphs_of(path).items():
        if Path(path).is_dir():
            whole.update(name.encode() + b"\0")
        whole.update(digest(_files(_read(file), file)))
    return whole.hexdigest()


def is_result(path: Path) -> bool:
    """Whether a file is a model that was written here: its metadata says so."""
    try:
        found = onnx.load(path, load_external_data=False).metadata_props
    except (OSError, DecodeError, ValueError):
        return False
    return any(p.key == "onnxcomp.version" for p in found)


def file_bytes(path: Path) -> int:
    """Bytes of one model file on disk, external data included."""
    beside = external.locations(_read(path))
    return path.stat().st_size + sum((path.parent / x).stat().st_size for x in beside)


# ---- saving ----------------------------------------------------------------------------------------------------------


def save(
    graph: Graph,
    out: Path,
    *,
    metadata: Mapping[str, str] | None = None,
    name: str = "model.onnx",
    one_file: bool = False,
) -> Path:
    """Write a model to the folder `out` (as `name`), or to the file `out` if it ends in `.onnx`; returns the file.

    Weights over 64 MiB together go to a data file named by their hash, unless `one_file`; it is written and synced
    first and the model file is replaced last, so that a killed process leaves either the old result or the new one.
    Raises `ModelError`, also when the output is the source.
    """
    target = out if out.suffix == ".onnx" else out / name
    if graph.path is not None and target.exists() and graph.path.exists() and target.samefile(graph.path):
        raise ModelError(f"{target}: this is the source model, which is never overwritten; choose another output")
    created = _make_folder(target.parent)
    try:
        remove_stale(target.parent)
        written = _write(graph, target, metadata or {}, one_file=one_file)
    except OSError as e:
        raise ModelError(f"{target}: cannot be written: {e.strerror or e}") from e
    finally:
        if not target.exists():
            for folder in created:
                if folder.is_dir() and not any(folder.iterdir()):
                    folder.rmdir()
    return written


def written_bytes(graph: Graph, metadata: Mapping[str, str] | None = None) -> int:
    """Bytes that `save` would write, data file included; weights are not read where they go to a data file.

    An upper bound: `save` stores constants of equal content once, here only those that are one tensor count once.
    """
    model = _prepared(graph, metadata or {})
    if not _is_large(model):
        return int(ir.to_proto(weights.embedded(model, None)).ByteSize())
    return weights.measure(model) + int(ir.to_proto(model).ByteSize())


def _prepared(graph: Graph, metadata: Mapping[str, str]) -> ir.Model:
    model = graph.model.clone()
    model.metadata_props.update(metadata)
    _versions(model)
    return model


def _is_large(model: ir.Model) -> bool:
    """Whether the weights go to a data file."""
    return sum({id(t): t.nbytes for t, _ in external.tensors(model)}.values()) > INLINE_LIMIT


def _write(graph: Graph, target: Path, metadata: Mapping[str, str], *, one_file: bool) -> Path:
    """Write the files under temporary names, then rename them while no other run writes there: the model decides."""
    model, folder = _prepared(graph, metadata), target.parent
    with temporary_file(folder) as weights_file, temporary_file(folder) as model_file:
        data = weights.externalize(model, weights_file, target.stem) if _is_large(model) and not one_file else None
        proto = ir.to_proto(weights.embedded(model, data))
        with model_file.open("wb") as f:
            f.write(proto.SerializeToString(deterministic=True))
            sync(f)
        with locked(folder):
            if data is not None:
                os.replace(weights_file, folder / data)
            os.replace(model_file, target)
            sync_folder(folder)
            if old := _data_of({target.name}, folder) - {data}:
                used = _referenced(folder.glob("*.onnx"))
                for name in old - used if used is not None else ():
                    (folder / name).unlink(missing_ok=True)
    return target


def _versions(model: ir.Model) -> None:
    """Set the IR version to the lowest with all element types in use, and drop operator sets without nodes."""
    used = {t.dtype for t, _ in external.tensors(model)}
    domains = set()
    for graph in model.graphs():
        used |= {v.dtype for v in (*graph.inputs, *graph.outputs) if v.dtype is not None}
        for node in graph:
            domains.add(node.domain)
            used |= {v.dtype for v in node.outputs if v.dtype is not None}
    model.ir_version = max([MIN_IR, *(_IR_OF.get(t, 0) for t in used)])
    for domain in [d for d in model.opset_imports if d and d not in domains]:
        del model.opset_imports[domain]
    model.producer_name, model.producer_version = "onnxcomp", ""


# ---- publishing ------------------------------------------------------------------------------------------------------


def _make_folder(folder: Path) -> list[Path]:
    """Create a folder with its parents; returns the created ones, innermost first."""
    created = list(itertools.takewhile(lambda p: not p.exists(), (folder, *folder.parents)))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise ModelError(f"{folder}: the output folder cannot be made: {e.strerror or e}") from e
    return created


def _data_of(models: Set[str], folder: Path) -> set[str]:
    """Names of data files that results of these names have or had in a folder."""
    pattern = re.compile(f"({'|'.join(re.escape(Path(x).stem) for x in models)})-[0-9a-f]{{12}}\\.onnx\\.data")
    return {p.name for p in folder.iterdir() if pattern.fullmatch(p.name)}


def _referenced(models: Iterable[Path]) -> set[str] | None:
    """Names of external data of models; None where one cannot be read, which may refer to any file."""
    try:
        return {x for p in models if p.is_file() for x in external.locations(_read(p))}
    except ModelError:
        return None


@contextmanager
def publish(out: Path, owned: Collection[str] = (), seal: Seal | None = None) -> Iterator[Path]:
    """A staging folder whose files become those of `out`, all at once (`files/switch.py`); an error leaves nothing.

    Of the names in `owned` those that were not staged are removed: files of an earlier result that the new one lacks.
    `seal` may stage more once no other run can change `out`: it gets the staging folder and the names that `out` loses.
    """
    if out.exists() and not out.is_dir():
        raise ModelError(f"{out}: is a file; choose a folder as output, or a name that ends in .onnx")
    out = out.resolve()
    created = _make_folder(out.parent)
    inside = out.exists() and (os.path.ismount(out) or not os.access(out.parent, os.W_OK | os.X_OK))
    try:
        remove_stale(out.parent)
        if out.exists():
            remove_stale(out)
        with staging_folder(out if inside else out.parent) as staging:
            yield staging
            _place(staging, out, owned, seal)
    except OSError as e:
        raise ModelError(f"{out}: cannot be written: {e.strerror or e}") from e
    finally:
        for folder in created:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


def _place(staging: Path, out: Path, owned: Collection[str], seal: Seal | None) -> None:
    staged = {p.name for p in staging.iterdir()}
    if not out.exists():
        if seal is not None:
            seal(staging, set())
        try:
            os.rename(staging, out)
        except OSError:
            if not out.is_dir():
                raise  # else another run was first
        else:
            return sync_folder(out.parent)
    finish(out)
    with locked(out):
        models = {x for x in staged if x.endswith(".onnx")}
        used = _referenced(p for p in out.glob("*.onnx") if p.name not in models)
        rooted = set(os.listdir(out)) if used is None else used
        removed = (_data_of(models, out) | set(owned)) - staged - rooted
        if seal is not None:
            seal(staging, removed)
        switch(staging, out, removed, rooted)


def chosen_graphs(model: Path, graph: str | None) -> dict[str, Path]:
    """The graphs of a model, or only the named one; raises `ModelError`."""
    graphs = graphs_of(model)
    if graph is None:
        return graphs
    if not isinstance(graph, str) or graph not in graphs:
        raise ModelError(f"{model}: has no graph '{graph}'; there are {', '.join(graphs)}")
    return {graph: graphs[graph]}


def one_graph(model: Path, graph: str | None) -> Path:
    """The file of the named graph, or of the only one; raises `ModelError` where a folder holds several."""
    graphs = chosen_graphs(model, graph if model.is_dir() else None)
    if len(graphs) > 1:
        raise ModelError(f"{model}: holds {len(graphs)} graphs ({', '.join(graphs)}); name one with --graph")
    return next(iter(graphs.values()))
