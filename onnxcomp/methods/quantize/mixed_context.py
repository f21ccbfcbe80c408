"""A second measurement of weights, each with all the others as chosen: for models in which errors do not add."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from onnxcomp.graph import Graph
from onnxcomp.methods.quantize import linears, site_options
from onnxcomp.methods.quantize.site_options import Choice, Moments, Static, Unit, loss_of, plainly
from onnxcomp.pipeline import Edit, Env

__all__ = ["adds", "factors"]

ADDS = 1.25  # between the sum of losses and the loss of all: less moves few choices, and costs a run for each weight
MOST = 16.0  # by which a second measurement may change a loss: differences of nearly equal numbers are noise


def adds(total: float, loss: float) -> bool:
    """Whether losses of single weights add up to the loss of all."""
    return total / ADDS <= loss <= total * ADDS


def factors(
    g: Graph, env: Env, found: Sequence[Unit], choice: Choice, loss: float, moments: Moments, metric: str,
    alone: Mapping[str, float],
) -> dict[str, float]:  # fmt: skip
    """By what to multiply the losses of each weight, so that they are those among all the others.

    Each weight is put back to float in the model that is rounded as chosen, which loses `loss`; `alone` is what it
    loses in the model whose other weights are float. Those that are float in the choice keep their losses.
    """
    rounded = g.clone()
    plainly(found, choice, moments, env.target)(rounded)
    rounded.sort()
    changed = [u for u in found if choice[u.name] is not None and _can(u, choice)]
    scores = env.evaluate([_restore(g, u, choice) for u in changed], metric, site_options.SAMPLES, rounded)
    found_factors = dict.fromkeys((u.name for u in found), 1.0)
    for u, score in zip(changed, scores, strict=True):
        gone = loss - loss_of(score.value, metric)
        if alone[u.name] > 0:
            found_factors[u.name] = min(max(gone / alone[u.name], 1 / MOST), MOST)
    return found_factors


def _can(u: Unit, choice: Choice) -> bool:
    """Whether a weight can be put back: an integer product of halves is made in float32."""
    return not isinstance(choice[u.name], Static) or all(x.source.dtype not in linears.HALVES for x in u.readers)


def _restore(g: Graph, u: Unit, choice: Choice) -> Edit:
    """An edit that gives a weight, the bias beside it and its readers' inputs what they are in `g`."""
    name, bias = str(u.weight.name), u.bias and str(u.bias.name)
    products = [(str(x.node.name), str(x.input.name)) for x in u.readers]

    def edit(h: Graph) -> None:
        if isinstance(choice[u.name], Static):
            weight = h.constant(g.array(u.weight), name)
            for product, source in products:
                h.set_input(h.node(product), 0, h.value(source))
                h.set_input(h.node(product), 1, weight)
            return
        h.put(h.value(name), g.array(u.weight))
        if bias:
            h.put(h.value(bias), g.array(u.bias))

    return edit
