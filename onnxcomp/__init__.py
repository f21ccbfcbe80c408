"""onnxcomp makes trained transformers small and fast as ONNX graphs, and proves it.

The names below are loaded when they are first used; importing the package loads none of the heavy libraries.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from onnxcomp.version import __version__

if TYPE_CHECKING:
    from onnxcomp import stats as stats
    from onnxcomp.benchmarking.benchmark import bench as bench
    from onnxcomp.blocks import Linear as Linear
    from onnxcomp.data.datasets import Batch as Batch
    from onnxcomp.data.datasets import Dataset as Dataset
    from onnxcomp.data.datasets import load_data as load_data
    from onnxcomp.engine.compress import compress as compress
    from onnxcomp.engine.compress import optimize as optimize
    from onnxcomp.engine.consumers import package as package
    from onnxcomp.engine.generate import generate as generate
    from onnxcomp.engine.job import Job as Job
    from onnxcomp.engine.manager import PassManager as PassManager
    from onnxcomp.engine.recipe import Recipe as Recipe
    from onnxcomp.engine.settings import Settings as Settings
    from onnxcomp.engine.verified_result import verify as verify
    from onnxcomp.errors import DataError as DataError
    from onnxcomp.errors import GateFailed as GateFailed
    from onnxcomp.errors import ModelError as ModelError
    from onnxcomp.errors import OnnxcompError as OnnxcompError
    from onnxcomp.errors import RecipeError as RecipeError
    from onnxcomp.errors import TargetError as TargetError
    from onnxcomp.errors import UnknownPass as UnknownPass
    from onnxcomp.exporter import export as export
    from onnxcomp.files.storage import load as load
    from onnxcomp.files.storage import save as save
    from onnxcomp.graph import Graph as Graph
    from onnxcomp.graph import Site as Site
    from onnxcomp.graph.groups import Group as Group
    from onnxcomp.pipeline import Companions as Companions
    from onnxcomp.pipeline import Env as Env
    from onnxcomp.pipeline import Fidelity as Fidelity
    from onnxcomp.pipeline import Pass as Pass
    from onnxcomp.pipeline import PassFault as PassFault
    from onnxcomp.pipeline import Score as Score
    from onnxcomp.pipeline import SequentialPass as SequentialPass
    from onnxcomp.pipeline import Stage as Stage
    from onnxcomp.reports.outcome import Report as Report
    from onnxcomp.reports.outcome import Result as Result
    from onnxcomp.stats import Need as Need
    from onnxcomp.stats import Statistic as Statistic
    from onnxcomp.stats import Stats as Stats
    from onnxcomp.target import CPU as CPU
    from onnxcomp.target import CUDA as CUDA
    from onnxcomp.target import TENSORRT as TENSORRT
    from onnxcomp.target import Target as Target
    from onnxcomp.validation.compare import validate as validate
    from onnxcomp.validation.gates import Gate as Gate

_HOME = {
    "bench": "benchmarking.benchmark",
    "Batch": "data.datasets",
    "Dataset": "data.datasets",
    "load_data": "data.datasets",
    "DataError": "errors",
    "GateFailed": "errors",
    "ModelError": "errors",
    "OnnxcompError": "errors",
    "RecipeError": "errors",
    "TargetError": "errors",
    "UnknownPass": "errors",
    "export": "exporter",
    "Gate": "validation.gates",
    "Graph": "graph",
    "Job": "engine.job",
    "compress": "engine.compress",
    "optimize": "engine.compress",
    "generate": "engine.generate",
    "package": "engine.consumers",
    "Pass": "pipeline",
    "PassManager": "engine.manager",
    "Report": "reports.outcome",
    "Result": "reports.outcome",
    "SequentialPass": "pipeline",
    "Recipe": "engine.recipe",
    "Settings": "engine.settings",
    "load": "files.storage",
    "save": "files.storage",
    "CPU": "target",
    "CUDA": "target",
    "TENSORRT": "target",
    "Target": "target",
    "validate": "validation.compare",
    "verify": "engine.verified_result",
    # for those who write passes; what they may ask for by name are the functions of `onnxcomp.stats`
    "Companions": "pipeline",
    "Env": "pipeline",
    "Fidelity": "pipeline",
    "Group": "graph.groups",
    "Linear": "blocks",
    "Need": "stats",
    "PassFault": "pipeline",
    "Score": "pipeline",
    "Site": "graph",
    "Stage": "pipeline",
    "Statistic": "stats",
    "Stats": "stats",
    "stats": "stats",
}
__all__ = [*_HOME, "__version__"]


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'onnxcomp' has no attribute '{name}'")
    module = import_module(f"onnxcomp.{home}")
    value = module if name == home else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
