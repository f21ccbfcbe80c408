"""Give each site the form that the target runs fastest, measured or by its table; outputs equal to float rounding."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal

from onnxcomp.errors import ModelError, RecipeError, TargetError
from onnxcomp.graph import CONTRIB, Graph, Site
from onnxcomp.graph.sharing import share_equal
from onnxcomp.lowering import older_opsets, two_forms
from onnxcomp.lowering.forms import KINDS, Context, Spot, default, legal
from onnxcomp.pipeline import Env, Fidelity, Pass, Stage
from onnxcomp.target import Target

__all__ = ["Lower"]


@dataclass(frozen=True)
class Lower(Pass):
    """Choose the fastest of equivalent forms of attention, norms, activations, linears and quantized linears.

    What is timed, on the target and at the asked shapes, are micro-models of each distinct site; a form takes the
    place of the one in the target's table only where it is significantly faster. Without measuring the table decides,
    the same on every machine. A target that takes only older operator sets gets attention, RMS norm, rotary embedding
    and GELU decomposed.
    """

    stage: ClassVar[Stage] = Stage.LOWER
    fidelity: ClassVar[Fidelity] = Fidelity.EXACT

    standard: bool = False
    """Keep to standard ONNX operators, for consumers other than ONNX Runtime."""
    approximate: bool = False
    """Allow forms with slightly other results (GELU by tanh); the pass is then judged by gates like a lossy one."""

    exact_rows: bool = False
    """Take only forms that keep the result of queries whose mask hides every key (see canonicalize)."""

    inputs: Literal["any", "int8", "float"] = "any"
    """Inputs of products with weights of few bits: rounded to int8 (accuracy level 4), float, or what is faster."""

    prefill: Literal["same", "int8"] = "same"
    """Products of a prompt with weights of few bits: the same, or int8 copies of the weights (more bytes, faster)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.approximate or self.prefill != "same":
            object.__setattr__(self, "fidelity", Fidelity.LOSSY)

    def require(self, target: Target) -> None:
        """Int8 products of a prompt are those of the runtime on CPUs."""
        if self.prefill != "same" and self.standard:
            raise RecipeError(
                f"{self.name}: 'prefill: {self.prefill}' has no form of standard operators; leave one out"
            )
        if self.prefill != "same" and not {"MatMulIntegerToFloat", "MatMulNBits"} <= {*target.contrib}:
            raise TargetError(f"{self.name}: '{target.name}' has no int8 products for 'prefill: {self.prefill}'")

    def sites(self, g: Graph, target: Target) -> Iterable[Site]:
        """Sites that do not stand in the form of the target's table, and operators that are too new for it."""
        spots = [spot for kind in KINDS.values() for spot in kind.find(g) if self._first(g, target, spot)]
        names = {spot.name for spot in spots}
        newer = [s for s in older_opsets.newer_sites(g, target.newest_opset) if s.name not in names]
        return [*(spot.site for spot in spots), *newer]

    def run(self, g: Graph, env: Env) -> None:
        """Rewrite site by site, wide ones first; one that keeps another form than the table's is declined."""
        for kind in KINDS:
            ctx, picked = env.choose(
                kind,
                standard=self.standard,
                approximate=self.approximate,
                exact_rows=self.exact_rows,
                inputs=self.inputs,
            )
            for spot, form, why in picked:
                edits, other = g.edits, self._first(g, env.target, spot)
                if form is not None:
                    form.rewrite(ctx, spot)
                if other and g.edits == edits:
                    g.decline(spot.site, f"stays {spot.present}: {why}")
            g.sort()
            g.sweep()  # replaced nodes must not be sites of the later kinds
        share_equal(g)  # layers that shared their weights share what was made of them
        g.sweep()
        if self.prefill != "same" and (why := two_forms.add_int8_form(g, saturates=env.target.quantized.saturates)):
            g.decline("prefill", why)
        if self.standard:
            _standard_only(g)
        if g.opset > env.target.newest_opset:
            older_opsets.lower_opset(g, env.target.newest_opset, exact_rows=self.exact_rows)

    def advice(self, target: Target) -> Iterable[str]:
        """Standard operators have no products with codes."""
        if self.standard:
            yield (
                "standard operators dequantize weights before a product: ONNX Runtime joins both as it loads a model, "
                "other runtimes may dequantize at every run, and codes of 2 bits stay in 4"
            )

    def _first(self, g: Graph, target: Target, spot: Spot) -> bool:
        """Whether the table asks for another form than the present one."""
        ctx = Context(g, target, exact_rows=self.exact_rows, inputs=self.inputs)
        names = legal(ctx, spot, standard=self.standard, approximate=self.approximate)
        return default(ctx, spot.kind, names) != spot.present


def _standard_only(g: Graph) -> None:
    """Raise `ModelError` for an operator of the runtime's own that is left."""
    if own := [n for graph in g.model.graphs() for n in graph if n.domain == CONTRIB]:
        names = ", ".join(sorted({n.op_type for n in own}))
        raise ModelError(
            f"'{own[0].name}' has no form of standard operators ({names}); lower the model that it was made of"
        )
