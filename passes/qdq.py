"""Static int8: weights and the linears' inputs become integers, with ranges from calibration."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from onnxcomp import blocks
from onnxcomp.blocks import BatchedLinear, Embedding, Linear
from onnxcomp.errors import TargetError
from onnxcomp.graph import Graph, Site
from onnxcomp.methods.quantize import batched, linears, payoff, tables
from onnxcomp.methods.quantize.inputs import InputCodes
from onnxcomp.pipeline import Env, Fidelity, Pass, Stage
from onnxcomp.stats import Need
from onnxcomp.target import Granularity, Target

__all__ = ["Qdq"]

UNREACHED = "no sample of the data reaches it, so it has no range: give more data, or quantize it by dynamic-quant"


@dataclass(frozen=True)
class Qdq(Pass):
    """Put a QuantizeLinear, DequantizeLinear pair on each distinct input of the linears, and int8 weights in them.

    `x ~ s_x (q_x - z_x)`, `W[:, n] ~ s_n q[:, n]`; ranges are clipped by the histogram of each input. Weights that are
    8-bit codes already keep them. Outputs, attention products and norms stay float: quantizing them costs accuracy and
    gains no speed.
    """

    stage: ClassVar[Stage] = Stage.ACTIVATIONS
    fidelity: ClassVar[Fidelity] = Fidelity.LOSSY
    identity: ClassVar[Mapping[str, Any]] = {"skip": ("*",)}
    example: ClassVar[Mapping[str, Any]] = {"min_size": 1}

    clip: Literal["mse", "minmax", "percentile", "entropy", "output"] = "mse"
    """How the range of an input follows from its histogram; output takes that of least error at the outputs."""
    percentile: Annotated[float, Field(gt=50, le=100)] = 99.99
    """Share of values inside the range, percent; used by clip: percentile."""
    weights: Granularity = "channel"
    """One weight scale per output channel, or one per tensor."""
    activations: Literal["auto", "u8", "s8"] = "auto"
    """Integer type of the inputs; auto takes the first the target runs fast."""
    symmetric: bool | None = None
    """Zero point in the middle of the range; by default only where the target needs it."""
    outputs: bool = False
    """Quantize the linears' outputs as well (for runtimes that fuse only between integer operators)."""
    skip: tuple[str, ...] = ()
    """Patterns of node or weight names that stay float."""
    min_size: Annotated[int, Field(ge=0)] = 1024
    """Weights with fewer elements stay float."""
    embeddings: bool = False
    """Store embedding tables as int8 too, one scale per row; a head that shares its table keeps sharing it."""
    only_faster: bool = True
    """Linears that integers would make slower at the asked shapes stay float; false puts size first."""

    @property
    def is_identity(self) -> bool:
        """Whether everything is skipped."""
        return "*" in self.skip

    def require(self, target: Target) -> None:
        """Refuse what the target cannot run, or would run as float arithmetic."""
        legal, name = target.quantized, target.name
        if not legal.pays:
            raise TargetError(f"qdq: '{name}' has no int8 product, so the result would be slower; use cpu or tensorrt")
        if self._type(target) not in legal.activations:
            on_cpu = target.provider.startswith("CPU")
            why = "one s8 pair feeding several linears is not fused there" if on_cpu else "it does not run there"
            use = legal.activations[0]
            raise TargetError(f"qdq: activations '{self.activations}' are not legal on '{name}' ({why}); use {use}")
        if not legal.zero_points and not self._is_symmetric(target):
            raise TargetError(f"qdq: '{name}' takes no zero points; leave 'symmetric' unset or say symmetric: true")
        if self.weights not in legal.granularity:
            use = legal.granularity[0]
            raise TargetError(f"qdq: weights per {self.weights} are not legal on '{name}'; use {use}")

    def sites(self, g: Graph, target: Target) -> Iterable[Site]:
        """Every linear with a float input."""
        found: list[Linear | BatchedLinear] = [*linears.quantizable(g), *linears.coded(g), *batched.quantizable(g)]
        return [*(x.site for x in found), *map(tables.site, self._tables(g))]

    def needs(self, g: Graph, target: Target) -> Iterable[Need]:
        """The histogram of each distinct input (and output) of the linears that will be quantized."""
        copy = g.clone()
        codes, eligible = self._inputs(copy, target), self._chosen(copy, target, [])
        yield from dict.fromkeys(need for x in eligible for need in codes.needs(x.source))
        if self.outputs:
            yield from dict.fromkeys(codes.need(x.output) for x in eligible)
        experts = batched.chosen(copy, self.skip, self.min_size, target)
        yield from dict.fromkeys(codes.need(x.input) for x in experts if x.gather is None)

    def run(self, g: Graph, env: Env) -> None:
        """Quantize the chosen linears, siblings with one pair, and tables."""
        found = self._tables(g)
        eligible = tables.chosen(g, self.skip, self.min_size) if found else []
        codes, inputs = linears.WeightCodes(g, self.weights, env.target, eligible), self._inputs(g, env.target)
        # From the last one on: a product that is cast back takes the place of its value, which later ones read by then.
        named: list[Embedding | BatchedLinear] = [*found, *batched.quantizable(g)]
        for group in reversed(blocks.siblings(self._chosen(g, env.target, named))):
            why = "" if env.stats.reached(inputs.need(group[0].source)) else UNREACHED
            floats = self.only_faster and not any(x.quantized for x in group)  # codes have no faster form than integers
            if why or (floats and (why := payoff.loses(group, env))):
                for linear in group:
                    g.decline(linear.site, why)
                continue
            # A CPU's integer kernels take float32 scales; where halves are computed (TensorRT) pairs keep theirs.
            wide = env.target.provider.startswith("CPU") and group[0].source.dtype in linears.HALVES
            x = inputs.pair(g, group[0].source, env.stats, group, wide=wide)
            for linear in group:
                linears.product(g, linear, x, linears.integer_weight(codes, linear, wide=wide))
                if self.outputs:
                    users = linear.users
                    g.replace(linear.output, inputs.pair(g, linear.output, env.stats), users=users)
        tables.store(g, eligible, codes)
        weights = batched.TableCodes(g, env.target, lambda g, v: inputs.codes(g, v, env.stats))
        experts = batched.chosen(g, self.skip, self.min_size, env.target)
        for one in payoff.paying(experts, g, env, only_faster=self.only_faster):
            batched.store(g, one, weights)

    def _tables(self, g: Graph) -> list[Embedding]:
        return tables.quantizable(g) if self.embeddings else []

    def _chosen(self, g: Graph, target: Target, named: list[Embedding | BatchedLinear]) -> list[Linear]:
        """Linears that become integer products, in the order of the graph, those whose weights are codes included."""
        usable = set(linears.usable(g, target)) | set(linears.quantizable(g))
        among = [x for x in blocks.linears(g, tied=True) if x in usable]
        return linears.chosen(g, self.skip, self.min_size, named, among)

    def _inputs(self, g: Graph, target: Target) -> InputCodes:
        signed, silent = self._type(target) == "s8", linears.silent_channels(g)
        return InputCodes(signed, self._is_symmetric(target), self.clip, self.percentile, silent)

    def _type(self, target: Target) -> str:
        return target.quantized.activations[0] if self.activations == "auto" else self.activations

    def _is_symmetric(self, target: Target) -> bool:
        return not target.quantized.zero_points if self.symmetric is None else self.symmetric
