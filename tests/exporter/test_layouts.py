"""What an export keeps of a model's structure: weights that layers share, and experts as feed-forward parts."""

from __future__ import annotations

from pathlib import Path

import pytest

from onnxcomp import blocks
from onnxcomp.canonical import canonicalize
from onnxcomp.files import storage

pytestmark = [pytest.mark.export]
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("onnxruntime")

from onnxcomp.exporter import export  # noqa: E402
from onnxcomp.exporter.experts import looped_experts  # noqa: E402

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24, "vocab_size": 61}
FOUR = {"num_key_value_heads": 2, "pad_token_id": 0, "num_local_experts": 4, "num_experts_per_tok": 2}


def mixtral(layers: int):
    torch.manual_seed(0)
    config = transformers.MixtralConfig(**{**SIZES, "num_hidden_layers": layers}, **FOUR, max_position_embeddings=32)
    return transformers.MixtralForCausalLM(config).eval()


@pytest.mark.parametrize("family", ["Mixtral", "GptOss"])
def test_looped_experts_compute_what_the_library_computes(family):
    sizes = {**SIZES, **FOUR, "num_hidden_layers": 1, "max_position_embeddings": 32}
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**sizes)).eval()
    before = model.get_experts_implementation()
    for name, p in model.named_parameters():  # biases of experts start at zero
        if "experts" in name:
            torch.nn.init.normal_(p, 0.0, 0.1)
    ids = torch.randint(1, 61, (2, 7))
    with torch.no_grad():
        theirs = model(input_ids=ids).logits
        with looped_experts(model):
            assert model.get_experts_implementation() != before
            ours = model(input_ids=ids).logits
    assert model.get_experts_implementation() == before
    torch.testing.assert_close(ours, theirs)


@pytest.mark.slow
def test_an_exported_mixture_is_recognised(tmp_path: Path) -> None:
    g = storage.load(export(mixtral(1), tmp_path / "out", static={"batch": 2}, past=False) / "model.onnx")
    canonicalize(g)
    (found,) = blocks.experts(g)
    assert (found.form, found.count, found.chosen, found.width) == ("looped", 4, 2, 24)


@pytest.mark.slow
def test_an_export_stores_shared_layers_once(tmp_path: Path) -> None:
    config = transformers.AlbertConfig(**SIZES, embedding_size=8, max_position_embeddings=32)
    g = storage.load(
        export(transformers.AlbertModel(config).eval(), tmp_path / "out", static={"batch": 2, "sequence": 9})
        / "model.onnx"
    )
    for _ in range(2):
        weights = [x.weight for x in blocks.linears(g, tied=True) if 16 in x.sizes]
        canonicalize(g)
    assert len(weights) == 6 * 2 + 1
    assert len(set(weights)) == 6 + 1
