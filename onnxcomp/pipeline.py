"""What a pass is, what it declares for the engine and the laws, and what it may ask of the world."""

from __future__ import annotations

import abc
import dataclasses
import functools
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import onnx_ir as ir
from pydantic import ConfigDict, TypeAdapter, ValidationError

from onnxcomp.errors import OnnxcompError, RecipeError
from onnxcomp.graph import Declined, Graph, Site
from onnxcomp.stats import Need, Stats
from onnxcomp.target import Target, resolved

if TYPE_CHECKING:
    from onnxcomp.data.datasets import Dataset
    from onnxcomp.lowering.costs import Cost
    from onnxcomp.lowering.forms import Context, Form, Spot
    from onnxcomp.lowering.planner import Planner

__all__ = [
    "Companions",
    "Declined",
    "Edit",
    "Env",
    "Fidelity",
    "Pass",
    "PassFault",
    "Score",
    "SequentialPass",
    "Site",
    "Stage",
]

Edit = Callable[[Graph], None]


class Stage(IntEnum):
    """The order in which passes belong; a recipe out of order is refused unless it says `any_order: true`."""

    CANONICALIZE = 0
    DEPTH = 1
    WIDTH = 2
    ATTENTION = 3
    TOKENS = 4
    REFIT = 5
    RESCALE = 6
    SPARSIFY = 7
    WEIGHTS = 8
    ACTIVATIONS = 9
    CACHE = 10
    CORRECT = 11
    LOWER = 12


class Fidelity(Enum):
    """Whether a pass promises equal outputs (to float noise) or is judged by gates."""

    EXACT = "exact"
    LOSSY = "lossy"


class PassFault(OnnxcompError):
    """A pass broke its contract: a fault of the pass, not of the user's model or data."""


@dataclass(frozen=True)
class Score:
    """What one variant costs in quality: `value` is the asked metric (lower is better)."""

    value: float


@dataclass(frozen=True)
class Env:
    """All a pass may ask of the world; the engine does the work behind `evaluate`, `cost` and `collect`."""

    target: Target
    stats: Stats
    original: Graph
    rng: np.random.Generator
    memory: int | None
    scratch: Path
    run_variants: Callable[[Sequence[Edit], str | None, int | None, Graph | None], list[Score]]
    run_costs: Callable[[Mapping[str, Graph], Mapping[str, Sequence[int]]], list[Cost]]
    run_collect: Callable[[Graph, Sequence[Need], Graph | None], Stats]
    run_plan: Callable[[], Planner]
    measures: bool = False
    shapes: tuple[Mapping[str, int], ...] = ()
    dry: bool = False  # only sizes count: no statistic was collected
    run_split: Callable[[], Env] | None = None
    run_unseen: Callable[[], Env | None] | None = None
    watch: Callable[[str, int, int], None] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "target", resolved(self.target))

    def evaluate(
        self, variants: Iterable[Edit], metric: str | None = None, samples: int | None = None, of: Graph | None = None
    ) -> list[Score]:
        """Score edits, each on its own copy of the current graph, against the original on calibration data.

        `metric` is a gate name (`kl`, `rel-l2`, `perplexity-rise`, ...); None takes `kl` for logits, else `rel-l2`.
        At most `samples` of the data are run. Copies may be `of` another graph than the current one.
        """
        return self.run_variants(list(variants), metric, samples, of)

    def cost(self, site: Site, forms: Mapping[str, Graph], shapes: Mapping[str, Sequence[int]]) -> list[Cost]:
        """Seconds and bytes of equivalent micro-models of a site on the target, measured or from its table.

        `shapes` maps the micro-models' inputs to shapes; a failing form is an error naming the site.
        """
        try:
            return self.run_costs(forms, shapes)
        except OnnxcompError as e:
            raise type(e)(f"cost of '{site.name}': {e}") from e

    def dims(self, v: ir.Value) -> list[tuple[int, ...]]:
        """Sizes of a value's axes at each of the asked shapes; empty where they are not known before the model runs."""
        return self.run_plan().dims(v)

    def choose(
        self,
        kind: str,
        *,
        standard: bool = False,
        approximate: bool = False,
        exact_rows: bool = False,
        inputs: str = "any",
    ) -> tuple[Context, list[tuple[Spot, Form | None, str]]]:
        """The form of every site of a kind (`lowering.forms`) with the reason, measured on the target or off its table.

        `standard` takes no operators of the runtime's own; `approximate` allows forms with slightly other results;
        `exact_rows` none that change what rows without a visible key give; `inputs` of products with few bits are
        rounded to `int8`, stay `float`, or are what is faster.
        """
        planner = self.run_plan()
        planner.exact_rows, planner.inputs = exact_rows, inputs
        return planner.context(), planner.choose(kind, standard=standard, approximate=approximate)

    def collect(self, g: Graph, needs: Iterable[Need], original: Graph | None = None) -> Stats:
        """Statistics of the graph as it is at this moment; only the prefix that is needed runs.

        Needs of the original are of the uncompressed model, or of the graph that is given instead.
        """
        return self.run_collect(g, list(needs), original)

    def progress(self, label: str, done: int, total: int) -> None:
        """Tell people who wait what is being done, and how much of it is done."""
        if self.watch is not None:
            self.watch(label, done, total)

    def split(self) -> Env:
        """The same world, where `evaluate` judges on one fifth of the calibration data, which `collect` does not see.

        For choices between fits: what a fit has seen overrates it. Of few samples both use all.
        """
        return self if self.run_split is None or self.dry else self.run_split()

    def unseen(self) -> Env | None:
        """The same world on the calibration samples that no fit of the pass reads; None where none were left out."""
        return None if self.run_unseen is None or self.dry else self.run_unseen()


@dataclass(frozen=True)
class Companions:
    """What a result needs of the files beside it: `why` they must be its own, a `note` for the report, the rewriting.

    `rewrite` edits them in a folder where they are copies of the original's.
    """

    why: str
    note: str
    rewrite: Callable[[Path], object]


@dataclass(frozen=True)
class Pass(abc.ABC):
    """One method: a frozen dataclass whose fields are its options; `Env` is all it may ask.

    All that the engine, the reports and the laws of every pass need to know of it is declared here, by class variables
    with defaults that suit most passes and by methods, so that a new pass is one file.
    """

    name: ClassVar[str]
    stage: ClassVar[Stage]
    fidelity: ClassVar[Fidelity]
    changes_interface: ClassVar[bool] = False
    """Inputs or outputs may have other names, types or axes afterwards."""
    changes_sizes: ClassVar[bool] = False
    """Counts of layers or heads, or widths, may be others afterwards: the model's configuration follows them."""
    plans: ClassVar[bool] = False
    """Sizes do not depend on the data: a dry run (`env.dry`) has no statistics."""
    any_place: ClassVar[bool] = False
    """It may stand anywhere in a recipe, whatever its stage."""
    runs_code: ClassVar[bool] = False
    """It runs code that is no part of it: a job needs `allow_code`."""
    chooses: ClassVar[bool] = False
    """It weighs its sites against each other, so that no one looks for some to leave alone where gates refuse it."""
    mends: ClassVar[bool] = False
    """It makes up for passes before it, so that it is no error where it finds nothing to do."""
    rounding_db: ClassVar[float] = 1.0
    """What exact passes behind this one may lose, decibels: float noise moves values over its rounding edges."""

    identity: ClassVar[Mapping[str, Any]] = {}
    """Options at which a lossy pass changes nothing."""
    example: ClassVar[Mapping[str, Any]] = {}
    """Options at which it changes little of a model of a few dozen channels, so that the laws have something to see."""
    example_error: ClassVar[float] = 0.2
    """Relative error of outputs up to which that goes in a model of random weights, which has nothing to spare."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" not in cls.__dict__:
            cls.name = cls.__module__.rpartition(".")[2].replace("_", "-")

    def __post_init__(self) -> None:
        for key, adapter in option_types(type(self)).items():
            try:
                value = adapter.validate_python(getattr(self, key))
            except ValidationError as e:
                raise RecipeError(f"{self.name}: option '{key}': {e.errors()[0]['msg']}") from None
            object.__setattr__(self, key, value)

    @property
    def options(self) -> dict[str, Any]:
        """The options that differ from their defaults."""
        return {f.name: v for f in dataclasses.fields(self) if (v := getattr(self, f.name)) != default_of(f)}

    def __str__(self) -> str:
        if not self.options:
            return self.name
        import yaml

        text = yaml.safe_dump({self.name: plain(self.options)}, default_flow_style=True, sort_keys=False, width=10**6)
        return text.strip().removeprefix("{").removesuffix("}")

    @property
    def wants_data(self) -> bool:
        """Whether the pass asks for statistics, so that missing data can be refused before any work."""
        return type(self).needs is not Pass.needs or isinstance(self, SequentialPass)

    @property
    def fits(self) -> bool:
        """Whether weights follow the calibration data closely: some samples are left out, to judge what it learnt."""
        return False

    @property
    def content(self) -> str:
        """What else than its options the result depends on, such as the hash of a file: a part of keys and hashes."""
        return ""

    def beside(self, folder: Path) -> Pass:
        """The pass as it stands in a recipe file of that folder, to which paths in its options are relative."""
        return self

    def planning(self) -> Pass | None:
        """The pass as a dry run makes it: results of the same sizes without data; None where sizes need the data."""
        return self if self.plans or not self.wants_data else None

    @property
    def is_identity(self) -> bool:
        """Whether the options say that nothing is to change; such a pass makes zero edits."""
        return bool(self.identity) and all(getattr(self, k) == v for k, v in self.identity.items())

    def require(self, target: Target) -> None:  # noqa: B027  most passes are for every target
        """Raise `TargetError` or `RecipeError` where these options are not for this target, before any pass runs."""

    def advice(self, target: Target) -> Iterable[str]:
        """What a user of these options should know about this target; goes into the report's warnings."""
        return ()

    def companions(self, result: Graph) -> Companions | None:
        """What the files beside a result (tokenizer, configuration) must say otherwise; None where they fit as is."""
        return None

    def calibration(self, data: Dataset, g: Graph) -> Dataset:
        """The data for `env.collect`, made of the job's calibration data."""
        return data

    def sites(self, g: Graph, target: Target) -> Iterable[Site]:
        """What is eligible; each site ends edited or declined with a reason, or it is a fault of the pass."""
        return ()

    def needs(self, g: Graph, target: Target) -> Iterable[Need]:
        """The statistics that `run` will read from `env.stats`."""
        return ()

    @abc.abstractmethod
    def run(self, g: Graph, env: Env) -> None:
        """Edit the graph."""


class SequentialPass(Pass):
    """A pass that sees each site's inputs as the already edited sites before it make them (GPTQ, layer-wise repair)."""

    def site_needs(self, g: Graph, site: Site, target: Target) -> Iterable[Need]:
        """The statistics that `edit` of this site will read, of the graph as edited so far."""
        return ()

    @abc.abstractmethod
    def edit(self, g: Graph, site: Site, env: Env) -> None:
        """Edit one site."""

    def run(self, g: Graph, env: Env) -> None:
        """Visit the sites in topological order, collecting each one's statistics on the changed prefix."""
        g.sort()
        order = {str(node.name): i for i, node in enumerate(g.nodes())}
        for site in sorted(self.sites(g, env.target), key=lambda s: min(order[n] for n in s.nodes)):
            stats = env.collect(g, self.site_needs(g, site, env.target))
            self.edit(g, site, dataclasses.replace(env, stats=stats))


@functools.cache
def option_types(cls: type[Pass]) -> Mapping[str, TypeAdapter[Any]]:
    """What checks each option of a pass, by name; making it takes a hundred times as long as a check."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {f.name: TypeAdapter(hints[f.name]) for f in dataclasses.fields(cls)}


def default_of(f: dataclasses.Field[Any]) -> Any:
    """The default of a dataclass field."""
    return f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default


def plain(x: Any) -> Any:
    """Tuples as lists and enums as values, all the way down, for YAML and JSON."""
    if isinstance(x, Mapping):
        return {k: plain(v) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return [plain(v) for v in x]
    return x.value if isinstance(x, Enum) else x
