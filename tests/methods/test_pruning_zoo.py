"""A quarter of the heads, channels and layers of every architecture, on the graphs kept for recognition."""

import numpy as np
import pytest

pytest.importorskip("onnxruntime")

from tests import cut_matrix, zoo

pytestmark = pytest.mark.no_cover  # the same code runs on smaller graphs elsewhere; counting its lines takes time
FP32 = {name: a for name, (a, s) in zoo.kept().items() if s.dtype == "fp32"}
ONE = {name.partition(".")[0]: name for name in FP32}  # one graph of each architecture
# What cannot be cut, with the limit.
UNCUT: dict[tuple[str, str], str] = {}


# Heads of every other architecture, channels or layers of the rest; `tools/cuts` judges all of all.
CUTS = [
    (a, kind)
    for i, a in enumerate(ONE)
    if (a, kind := ("heads", "channels", "heads", "layers")[i % 4]) not in cut_matrix.OTHERWISE
]


@pytest.mark.parametrize(("architecture", "kind"), CUTS)
def test_a_quarter_goes_as_predicted_and_equals_the_masked_model(architecture, kind):
    name = ONE[architecture]
    cut = cut_matrix.KINDS[kind](FP32[name], cut_matrix.canonical(name))
    if (why := UNCUT.get((architecture, kind))) is not None:
        assert cut.declined
        assert all(why in reason for reason in cut.declined)
    else:
        assert not cut.declined


@pytest.mark.parametrize("kind", cut_matrix.KINDS)
@pytest.mark.parametrize("architecture", ["bert", "llama", "vit"])
def test_exports_of_one_model_are_cut_alike(architecture, kind):
    names = [n for n in FP32 if n.partition(".")[0] == architecture][:2]
    assert len(names) > 1
    found = [cut_matrix.KINDS[kind](FP32[n], cut_matrix.canonical(n)).output for n in names]
    for y in found[1:]:
        assert np.max(np.abs(y - found[0])) <= cut_matrix.ALIKE * np.max(np.abs(y))
