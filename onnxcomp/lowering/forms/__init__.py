"""The equivalent forms of each kind of site; lowering chooses one by measurement or from the target's table."""

from __future__ import annotations

from onnxcomp.lowering.forms.attention import ATTENTION
from onnxcomp.lowering.forms.form import FORMS_VERSION, Context, Form, Kind, Spot
from onnxcomp.lowering.forms.linear import ACTIVATION, LINEAR, SILU, TIED
from onnxcomp.lowering.forms.quantized import DYNAMIC, QUANTIZED
from onnxcomp.lowering.forms.residual import RESIDUAL
from onnxcomp.lowering.forms.siblings import CODED_SIBLINGS, PROJECTIONS, SIBLINGS
from onnxcomp.lowering.forms.tables import TABLE
from onnxcomp.lowering.forms.weight_only import WEIGHT_ONLY

__all__ = ["FORMS_VERSION", "KINDS", "Context", "Form", "Kind", "Spot", "default", "legal"]

# Sites of several linears come first: what they are rewritten to consists of sites of the later, smaller kinds.
KINDS = {
    kind.name: kind
    for kind in (
        PROJECTIONS,
        SIBLINGS,
        CODED_SIBLINGS,
        ATTENTION,
        WEIGHT_ONLY,
        QUANTIZED,
        DYNAMIC,
        ACTIVATION,
        LINEAR,
        TIED,
        SILU,
        RESIDUAL,
        TABLE,
    )
}


def legal(ctx: Context, spot: Spot, *, standard: bool, approximate: bool) -> list[str]:
    """Names of the forms the spot may take on the target."""
    forms = KINDS[spot.kind].forms
    return [f.name for f in forms if not f.why_not(ctx, spot, standard=standard, approximate=approximate)]


def default(ctx: Context, kind: str, names: list[str]) -> str:
    """The form of the target's table, the first legal one of a kind that it does not name, or nothing."""
    return next((f for f in (*ctx.target.forms.get(kind, ()), *names) if f in names), "")
