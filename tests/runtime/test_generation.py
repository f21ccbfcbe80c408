"""Token by token: caches against the whole text, padding, sampling, and what generates nothing."""

import json

import numpy as np
import onnx_ir as ir
import pytest

pytest.importorskip("onnxruntime")
pytest.importorskip("tokenizers")

from onnxcomp.benchmarking.generation import bench_generation
from onnxcomp.cli import main
from onnxcomp.data.datasets import as_dataset
from onnxcomp.engine.generate import generate
from onnxcomp.errors import DataError, ModelError
from onnxcomp.files.storage import save
from onnxcomp.graph import Graph
from onnxcomp.maths.sampling import Sampling
from onnxcomp.runtime import speculation
from onnxcomp.runtime.generation import Decoder, generated
from onnxcomp.runtime.runner import Runner
from onnxcomp.target import CPU
from onnxcomp.validation.greedy import greedy
from tests import tiny

WORDS, WIDTH, HEADS = 11, 16, 2
RNG = np.random.default_rng(3)
WEIGHTS = {
    "table": 2 * RNG.standard_normal((WORDS, WIDTH)),
    **{n: RNG.standard_normal((WIDTH, WIDTH)) / 2 for n in "qkv"},
    "head": RNG.standard_normal((WIDTH, WORDS)),
}


def decoder(*, cached: bool = True, causal: bool = True) -> Graph:
    """One attention between a table and a head, with caches or without."""
    ids = ir.Value(name="input_ids", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(["b", "s"]))
    floats = ir.TensorType(ir.DataType.FLOAT)
    past = [
        ir.Value(name=f"past.{n}", type=floats, shape=ir.Shape(["b", HEADS, "p", WIDTH // HEADS])) for n in "kv"
    ] * cached
    g = Graph(ir.Model(ir.Graph([ids, *past], [], nodes=[], opset_imports={"": 23}, name="lm"), ir_version=10))
    x = g.op("Gather", g.constant(WEIGHTS["table"].astype(np.float32), "table"), ids)
    q, k, v = (g.op("MatMul", x, g.constant(WEIGHTS[n].astype(np.float32), n)) for n in "qkv")
    sizes = {"q_num_heads": HEADS, "kv_num_heads": HEADS, "is_causal": int(causal)}
    y = g.op("Attention", q, k, v, *([None, *past] if cached else []), outputs=3 if cached else 1, **sizes)
    node = y.producer()
    logits = g.op("MatMul", g.op("Add", x, y), g.constant(WEIGHTS["head"].astype(np.float32), "head"))
    logits.name, logits.type, logits.shape = "logits", floats, ir.Shape(["b", "s", WORDS])
    outs = [logits]
    for name, out in zip("kv", node.outputs[1:], strict=False):
        out.name, out.type, out.shape = f"now.{name}", floats, ir.Shape(["b", HEADS, "t", WIDTH // HEADS])
        outs.append(out)
    g.model.graph.outputs.extend(outs)
    g.sort()
    return g


def formula(tokens: list[int]) -> np.ndarray:
    """The scores behind the last token, float64."""
    x = WEIGHTS["table"][tokens]
    q, k, v = (np.reshape(x @ WEIGHTS[n], (len(tokens), HEADS, -1)).transpose(1, 0, 2) for n in "qkv")
    s = q[:, -1:] @ k.transpose(0, 2, 1) / np.sqrt(WIDTH // HEADS)
    p = np.exp(s - s.max())
    y = (p / p.sum(axis=-1, keepdims=True)) @ v
    return (x[-1] + y.reshape(-1)) @ WEIGHTS["head"]


@pytest.mark.parametrize("cached", [True, False])
def test_tokens_are_those_of_the_formula(cached: bool) -> None:
    text = [1, 4, 2]
    with Decoder(decoder(cached=cached)) as d:
        found = [int(x[0]) for x in generated(d, np.array([text]), 12)]
        assert d.cached is cached
        assert d.cache_bytes == (2 * 4 * WIDTH * (len(text) + 11) if cached else 0)
        d.reset()
        parts = [d.read(np.array([part]))[0] for part in ([1], [4, 2])]  # in pieces
    for token in found:
        assert token == int(formula(text).argmax())
        text.append(token)
    np.testing.assert_allclose(np.concatenate(parts)[-1], formula([1, 4, 2]), rtol=1e-4, atol=1e-4)


def test_a_row_that_ended_is_padded_and_the_rest_goes_on() -> None:
    texts = np.array([[1, 4, 2], [3, 3, 5]])
    with Decoder(decoder()) as d:
        free = np.stack(list(generated(d, texts, 6)), axis=1)
        d.reset()
        end = int(free[0, 2])
        cut = np.stack(list(generated(d, texts, 6, ends=[end], pad=-1 % WORDS)), axis=1)
    stop = [list(row).index(end) + 1 if end in row else 6 for row in free]
    for row, whole, n in zip(cut, free, stop, strict=True):
        np.testing.assert_array_equal(row[:n], whole[:n])
        assert set(row[n:]) <= {WORDS - 1}


def test_a_model_without_a_mask_takes_no_padding() -> None:
    with Decoder(decoder()) as d, pytest.raises(DataError, match="takes no mask"):
        d.read(np.array([[0, 1]]), np.array([[0, 1]]))


def test_what_reads_later_tokens_is_no_decoder() -> None:
    with Decoder(decoder(cached=False, causal=False)) as d:
        d.read(np.array([[1, 4, 2]]))
        with pytest.raises(ModelError, match="no causal decoder"):
            d.read(np.array([[5]]))
    with pytest.raises(ModelError, match="no scores of next tokens"):
        Decoder(tiny.encoder())
    g = decoder()
    del g.model.graph.outputs[2]
    with pytest.raises(ModelError, match="takes 2 caches and gives 1"):
        Decoder(g)


def test_odds_are_those_of_the_kept_tokens() -> None:
    scores = np.log([[0.5, 0.3, 0.15, 0.05]])
    np.testing.assert_allclose(Sampling(1.0).odds(scores), np.exp(scores))
    np.testing.assert_allclose(Sampling(1.0, top_k=2).odds(scores), [[0.625, 0.375, 0, 0]])
    np.testing.assert_allclose(Sampling(1.0, top_p=0.79).odds(scores), [[0.625, 0.375, 0, 0]])
    np.testing.assert_allclose(Sampling(1.0, top_p=0.4).odds(scores), [[1, 0, 0, 0]])
    np.testing.assert_allclose(Sampling(0.5).odds(scores)[0, 0], 0.25 / (0.25 + 0.09 + 0.0225 + 0.0025))
    assert Sampling().odds(scores).tolist() == [[1, 0, 0, 0]]
    rng = np.random.default_rng(0)
    drawn = np.concatenate([Sampling(1.0).pick(scores, rng) for _ in range(2000)])
    np.testing.assert_allclose(np.bincount(drawn, minlength=4) / 2000, np.exp(scores[0]), atol=0.04)
    for wrong in ({"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}):
        with pytest.raises(DataError, match="at least 0"):
            Sampling(**wrong)


def test_a_benchmark_times_the_prompt_and_every_further_token(tmp_path, capsys) -> None:
    for name, cached in (("a", True), ("b", False)):
        save(decoder(cached=cached), tmp_path / name)
    pair = [tmp_path / "a", tmp_path / "b"]
    found = bench_generation(pair, prompt=5, new=3, threads=1)
    assert [(r.model, r.shape) for r in found.rows] == [
        (str(m), s) for s in ("prompt=5", "next token of 3, prompt=5") for m in pair
    ]
    assert [r.samples + r.dropped for r in found.rows] == [6, 6, 12, 12]
    for row, tokens in zip(found.rows, (5, 5, 1, 1), strict=True):
        assert row.tokens == pytest.approx(1000 * tokens / row.median_ms)
    assert [w for w in found.warnings if "no caches" in w] == [
        f"{pair[1]}: has no caches, so it reads all tokens again for each new one"
    ]
    (tmp_path / "a" / "config.json").write_text('{"max_position_embeddings": 6}')
    command = ["bench", *map(str, pair), "--generate"]
    assert main([*command, "prompt=5,new=3"]) == 2
    assert "takes at most 6 tokens, 5 + 3 were asked for" in capsys.readouterr().err
    assert main([*command, "length=5"]) == 2
    assert main([*command, "prompt=2", "--shape", "batch=1"]) == 2
    save(tiny.encoder(), tmp_path / "c")
    assert main(["bench", str(tmp_path / "c"), "--generate", "prompt=2"]) == 2
    assert "no scores of next tokens" in capsys.readouterr().err


def test_the_command_writes_text_and_json(tmp_path, capsys) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    tok = Tokenizer(models.WordLevel({f"w{i}": i for i in range(WORDS)}, unk_token="w0"))
    tok.pre_tokenizer = pre_tokenizers.Whitespace()
    save(decoder(), tmp_path)
    assert main(["generate", str(tmp_path), "w1"]) == 2
    assert "no tokenizer.json" in capsys.readouterr().err
    tok.save(str(tmp_path / "tokenizer.json"))
    assert main(["generate", str(tmp_path), "w1 w4 w2", "--max-new", "5"]) == 0
    shown = capsys.readouterr()
    found = generate(tmp_path, "w1 w4 w2", max_new=5)
    assert shown.out == f"w1 w4 w2{found.text}\n"
    assert "caches of 0.00 MB" in shown.err
    assert found.prompt_tokens == (1, 4, 2)
    assert found.tokens[0] == int(formula([1, 4, 2]).argmax())
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": found.tokens[1], "max_position_embeddings": 6}))
    assert main(["generate", str(tmp_path), "w1 w4 w2", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert len(told["tokens"]) <= 3
    assert told["ended"] == (told["tokens"][-1] == found.tokens[1])
    assert main(["generate", str(tmp_path), "w1 w1 w1 w1 w1 w1"]) == 2
    assert "reads at most 6" in capsys.readouterr().err


@pytest.mark.parametrize("cached", [True, False])
def test_forgotten_tokens_change_nothing_of_what_comes(cached: bool) -> None:
    with Decoder(decoder(cached=cached)) as d:
        d.read(np.array([[1, 5, 3, 7, 2]]))
        d.forget(2)
        np.testing.assert_allclose(d.read(np.array([[4]]))[0, 0], formula([1, 5, 3, 4]), atol=1e-5)


@pytest.mark.parametrize("lookahead", [1, 3])
def test_a_draft_changes_no_greedy_token(lookahead: int) -> None:
    g, other, prompt = decoder(), decoder(), np.array([1, 5, 3])
    other.put(other.value("head"), -other.array(other.value("head")))
    told = speculation.Drafted()
    with Decoder(g) as d, Decoder(other) as draft:
        alone = [int(x[0]) for x in generated(d, prompt[None], 30)]
        d.reset()
        text = list(speculation.speculated(d, draft, prompt, 30, lookahead=lookahead, told=told))
    assert text == alone
    assert told.accepted < told.proposed
    told = speculation.Drafted()
    with Decoder(g) as d, Decoder(g) as draft:
        assert list(speculation.speculated(d, draft, prompt, 30, lookahead=lookahead, told=told)) == alone
    assert told.rate == 1


def test_drawn_tokens_keep_their_odds_whatever_the_draft_proposes() -> None:
    rng = np.random.default_rng(0)
    p, q = (rng.dirichlet(np.ones(5), n) for n in (2, 1))
    draws, counts = 20_000, np.zeros(5)
    for _ in range(draws):
        proposal = int(rng.choice(5, p=q[0]))
        kept, new = speculation._judged(p, q, [proposal], rng)
        counts[proposal if kept else new] += 1
    assert (np.abs(counts / draws - p[0]) < 5 * np.sqrt(p[0] * (1 - p[0]) / draws)).all()


def test_a_text_in_pieces_gives_what_it_gives_at_once() -> None:
    tokens = RNG.integers(0, WORDS, (3, 11))
    empty = np.zeros((3, HEADS, 0, WIDTH // HEADS), np.float32)
    feeds = {"input_ids": tokens, "past.k": empty, "past.v": empty}
    runs = []
    for pieces in (0, 4):
        with Runner(decoder(), CPU, pieces=pieces) as r:
            runs.append(r.run(feeds))
    assert list(runs[0]) == list(runs[1])
    for name, a in runs[0].items():
        np.testing.assert_allclose(runs[1][name], a, atol=1e-5)
    with pytest.raises(ModelError, match="no decoder of text with caches"):
        Runner(decoder(cached=False), CPU, pieces=4)


def test_greedy_text_is_compared_up_to_the_first_difference() -> None:
    g, other = decoder(), decoder()
    other.put(other.value("head"), -other.array(other.value("head")))
    data = as_dataset([{"input_ids": RNG.integers(0, WORDS, (4, 6))}], g)
    same, none = (greedy(g, x, data, prompt=5, new=7) for x in (g, other))
    assert (same.texts, same.equal, same.tokens, same.median_first) == (4, 4, 1.0, 7)
    assert (none.equal, none.tokens, none.median_first) == (0, 0.0, 0)
    with pytest.raises(DataError, match="no text has 9 tokens"):
        greedy(g, g, data, prompt=9, new=7)
