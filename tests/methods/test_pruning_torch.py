"""Scores of the width passes against PyTorch's activations of the same trained layers; an exported ResNet is cut."""

from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="compared with PyTorch")
pytest.importorskip("transformers", reason="the reference model is a transformers checkpoint")
pytest.importorskip("onnxruntime")
pytestmark = [pytest.mark.export, pytest.mark.slow, pytest.mark.no_cover]

from models import vit_digits  # noqa: E402
from onnxcomp.canonical import canonicalize  # noqa: E402
from onnxcomp.coupling import Coupling  # noqa: E402
from onnxcomp.coupling.sizes import parameters  # noqa: E402
from onnxcomp.data.datasets import as_dataset  # noqa: E402
from onnxcomp.engine import catalog  # noqa: E402
from onnxcomp.engine.manager import PassManager  # noqa: E402
from onnxcomp.files import storage  # noqa: E402
from onnxcomp.stats import calibrate  # noqa: E402
from onnxcomp.target import CPU  # noqa: E402
from tests import cut_matrix, cuts  # noqa: E402
from tests.legacy_export import export_logits  # noqa: E402

READS = {"prune-ffn": ("mlp.fc2", 256), "prune-heads": ("attention.o_proj", 4)}  # what reads the axis, and its units


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    with np.load(vit_digits.DATA / "heldout.npz") as data:
        return data["pixel_values"][:96]


def exported(model, x: torch.Tensor, path):
    """The canonical graph."""
    g = storage.load(export_logits(model, x, path))
    canonicalize(g)
    return g


@pytest.fixture(scope="module")
def graph(tmp_path_factory, images):
    path = tmp_path_factory.mktemp("vit") / "model.onnx"
    return exported(vit_digits.load(), torch.tensor(images[:2]), path)


@pytest.fixture(scope="module")
def layers(images) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Inputs `[rows, K]` and weight `[N, K]` of every linear of the checkpoint, in float64."""
    model, seen = vit_digits.load().double(), {}

    def keep(name, linear, inputs):
        seen[name] = (inputs[0].flatten(0, -2), linear.weight)

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda m, x, name=name: keep(name, m, x))
    with torch.no_grad():
        model(torch.tensor(images).double())
    return seen


def wanda(x: torch.Tensor, weight: torch.Tensor, units: int) -> torch.Tensor:
    """`|W| * ||X||` summed over everything that a unit's columns feed."""
    return (weight.abs() * x.norm(dim=0)).sum(dim=0).unflatten(0, (units, -1)).sum(dim=1)


def flap(x: torch.Tensor, weight: torch.Tensor, units: int) -> torch.Tensor:
    """`E (X - E X)^2 * ||W||^2`, averaged over a unit's columns."""
    fluctuation = (x - x.mean(dim=0)).square().mean(dim=0) * weight.norm(dim=0).square()
    return fluctuation.unflatten(0, (units, -1)).mean(dim=1)


@pytest.mark.parametrize("name", READS)
@pytest.mark.parametrize("reference", [wanda, flap], ids=["wanda", "flap"])
def test_scores_agree_with_pytorch(graph, layers, images, name, reference):
    p = catalog.load(name)(score=reference.__name__, repair="none")
    data = as_dataset({"pixel_values": images}, graph, batch=32)
    stats = calibrate.collect(graph, list(p.needs(graph, CPU)), data)
    places = p.places(Coupling(graph))
    module, units = READS[name]
    theirs = [reference(*layers[k], units).detach().numpy() for k in layers if k.endswith(module)]
    assert len(places) == len(theirs) == 5
    for place, want in zip(places, theirs, strict=True):
        ours = p._scores(graph, place, SimpleNamespace(stats=stats))
        np.testing.assert_allclose(ours, want, rtol=1e-4)
        assert np.ptp(want) > 0.1 * want.mean()  # far apart, so that an order or a norm taken wrongly would show


def test_half_of_the_channels_of_an_exported_resnet(tmp_path):
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    sizes = {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [2, 2], "layer_type": "basic"}
    model = ResNetForImageClassification(ResNetConfig(**sizes, num_labels=10))
    for norm in (m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)):
        norm.running_mean.normal_(0, 0.1)
        norm.running_var.uniform_(0.5, 1.5)
    g = exported(model, torch.randn(2, 3, 32, 32), tmp_path / "m.onnx")
    p = catalog.load("prune-channels")(ratio=0.5, score="magnitude", repair="none")
    mask = g
    for place, keep in zip(*cut_matrix.planned(p, g.clone()), strict=True):
        mask = cuts.masked(mask, place.group, np.setdiff1d(np.arange(place.group.units), keep))
    result = PassManager([p]).run(g)
    assert result.report.steps[0].changed == len([*g.nodes("Conv")]) == 10
    assert parameters(result.model) < 0.28 * parameters(g)
    feeds = [{"pixel_values": torch.randn(n, 3, 32, 32).numpy()} for n in (1, 3)]
    cuts.assert_same(mask, result.model, *feeds)
    data = as_dataset([{"pixel_values": torch.randn(16, 3, 32, 32).numpy()} for _ in range(4)], g)
    repaired = PassManager([catalog.load("prune-channels")(ratio=0.5, score="magnitude")]).run(g, data)
    assert repaired.report.steps[0].changed == 10
    want, without, fitted = (cuts.run(m, feeds[1])["logits"] for m in (g, result.model, repaired.model))
    assert np.linalg.norm(fitted - want) < 0.5 * np.linalg.norm(without - want)
