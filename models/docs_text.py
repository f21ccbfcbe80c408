"""The text of `docs_lm`: Python's own documentation strings, split by whole modules.

Strings differ by Python version, so the tokens are shipped under `data/docs_lm`; `models.docs_lm --collect` makes them
anew. A *module* is a top-level name (`email` owns `email.mime.text`); its C and Python twins (`_decimal`,
`_pydecimal`) belong to it. A string met twice is kept once, and near copies of training text are not held out.
"""

from __future__ import annotations

import ast
import importlib
import importlib.machinery
import inspect
import json
import random
import sys
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

DATA = Path(__file__).parent / "data" / "docs_lm"
MARK, PAD = "<|doc|>", "<|pad|>"
VOCAB, WINDOW = 2048, 128
HELDOUT_WINDOWS, CALIBRATION_WINDOWS = 256, 128
SKIPPED = {
    "test",
    "tests",
    "idlelib",
    "turtledemo",
    "lib2to3",
    "site-packages",
    "dist-packages",
    "ensurepip",
    "__pycache__",
    "antigravity",
    "this",
}
# Always for training: pydoc's topics are a fifth of the text and quote the manual; the others are large or boilerplate.
TRAIN_ONLY = {"pydoc_data", "builtins", "encodings", "codecs", "os", "email", "tkinter", "distutils"}
TWINS = {
    "posix": "os",
    "nt": "os",
    "posixpath": "os",
    "ntpath": "os",
    "genericpath": "os",
    "nturl2path": "urllib",
    "pyexpat": "xml",
    "elementtree": "xml",
    "thread": "threading",
    "bootsubprocess": "subprocess",
    "posixsubprocess": "subprocess",
}
PLAIN = str.maketrans(
    {
        "\u201c": '"',
        "\u201d": '"',
        "\u2018": "'",
        "\u2019": "'",
        "\u2026": "...",
        "\u2013": "-",
        "\u2014": "--",
        "\u00b6": "",
    }
)

Docs = dict[str, list[str]]


def module_key(name: str) -> str:
    """The owner of a module's strings: its top-level name without the marks of C and Python twins."""
    top = name.split(".")[0]
    bare = top.removeprefix("_py") if top.startswith("_py") else top.lstrip("_")
    return TWINS.get(bare, bare)


def source_strings(root: Path) -> Iterator[tuple[str, str]]:
    """(module, doc string) of every module, class and function in the `.py` files under `root`."""
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if SKIPPED & set(parts):
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_text(encoding="utf-8", errors="replace"))
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                yield ".".join(parts), ast.get_docstring(node) or ""
        if parts[0] == "pydoc_data":
            yield from (
                ("pydoc_data", leaf.value)
                for leaf in ast.walk(tree)
                if isinstance(leaf, ast.Constant) and isinstance(leaf.value, str) and len(leaf.value) > 200
            )


def compiled_strings() -> Iterator[tuple[str, str]]:
    """(module, doc string) of the modules written in C, their functions, classes and methods."""
    folder = Path(sysconfig.get_paths()["platstdlib"]) / "lib-dynload"
    suffixes = tuple(importlib.machinery.EXTENSION_SUFFIXES)
    names = {p.name.split(".")[0] for p in folder.glob("*") if p.name.endswith(suffixes)} | set(
        sys.builtin_module_names
    )
    for name in sorted(n for n in names if "test" not in n and n not in SKIPPED):
        try:
            module = importlib.import_module(name)
        except ImportError:
            continue
        yield name, module.__doc__ or ""
        for _, value in sorted(vars(module).items(), key=lambda item: item[0]):
            yield name, _doc(value)
            if inspect.isclass(value):
                yield from ((name, _doc(member)) for _, member in sorted(vars(value).items(), key=lambda item: item[0]))


def _doc(value: object) -> str:
    """The doc string that belongs to a callable, class or descriptor of a C module."""
    wanted = inspect.isclass(value) or inspect.isroutine(value) or inspect.isdatadescriptor(value)
    text = getattr(value, "__doc__", None) if wanted else None
    return inspect.cleandoc(text) if isinstance(text, str) else ""


def collect() -> Docs:
    """Doc strings by module, cleaned, ASCII, at least 24 characters, each kept only where it is met first."""
    root = Path(sysconfig.get_paths()["stdlib"])
    seen: set[str] = set()
    docs: Docs = {}
    for name, text in (*source_strings(root), *compiled_strings()):
        text = text.expandtabs(4).translate(PLAIN).strip()
        if len(text) < 24 or not text.isascii() or text in seen:
            continue
        seen.add(text)
        docs.setdefault(module_key(name), []).append(text)
    return dict(sorted(docs.items()))


def split(docs: Docs, seed: int = 0) -> dict[str, list[str]]:
    """Module names of the parts: about 6 % of the characters held out, 4 % for tuning, the rest for training."""
    total = sum(len(t) for texts in docs.values() for t in texts)
    names = sorted(set(docs) - TRAIN_ONLY)
    random.Random(seed).shuffle(names)
    parts: dict[str, list[str]] = {"heldout": [], "tune": [], "train": sorted(set(docs) & TRAIN_ONLY)}
    sizes = {"heldout": 0.06 * total, "tune": 0.04 * total, "train": float("inf")}
    for name in names:
        size = sum(map(len, docs[name]))
        part = next(p for p, room in sizes.items() if size <= room)
        parts[part].append(name)
        sizes[part] -= size
    return {part: sorted(members) for part, members in parts.items()}


def shingles(text: str, words: int = 6) -> set[tuple[str, ...]]:
    """The runs of `words` words in a text."""
    parts = text.split()
    return {tuple(parts[i : i + words]) for i in range(max(1, len(parts) - words + 1))}


def without_copies(docs: Docs, parts: dict[str, list[str]]) -> Docs:
    """Drop held-out and tuning strings of which more than a third of the six-word runs stand in the training part."""
    known = set().union(*(shingles(text) for name in parts["train"] for text in docs[name]))
    held = {*parts["heldout"], *parts["tune"]}

    def fresh(text: str) -> bool:
        runs = shingles(text)
        return 3 * len(runs & known) <= len(runs)

    return {name: [t for t in texts if name not in held or fresh(t)] for name, texts in docs.items()}


def train_tokenizer(texts: Iterable[str], folder: Path) -> None:
    """Write a byte-level BPE tokenizer of `VOCAB` entries that opens every text with `MARK`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=[MARK, PAD], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{MARK} $A", pair=f"{MARK} $A {MARK} $B", special_tokens=[(MARK, 0)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=MARK, eos_token=MARK, pad_token=PAD, model_max_length=WINDOW
    )
    fast.save_pretrained(folder)


def stream(tokenizer, texts: Iterable[str]) -> np.ndarray:
    """All texts as one uint16 array of tokens, each opened by `MARK`."""
    rows = tokenizer(list(texts), add_special_tokens=True, verbose=False)["input_ids"]
    return np.concatenate([np.asarray(row, np.uint16) for row in rows])


def windows(tokens: np.ndarray, count: int) -> np.ndarray:
    """`count` disjoint windows [count, WINDOW] int64, spread evenly over the stream."""
    rows = tokens[: len(tokens) // WINDOW * WINDOW].reshape(-1, WINDOW)
    return rows[np.linspace(0, len(rows) - 1, count).astype(int)].astype(np.int64)


def write(weights: Path, data: Path = DATA) -> dict[str, int]:
    """Collect, split, make the tokenizer and write every data file; returns tokens per part."""
    from transformers import AutoTokenizer

    docs = collect()
    parts = split(docs)
    docs = without_copies(docs, parts)
    data.mkdir(parents=True, exist_ok=True)
    texts = {part: [text for name in names for text in docs[name]] for part, names in parts.items()}
    train_tokenizer(texts["train"], weights)
    tokenizer = AutoTokenizer.from_pretrained(weights)
    streams = {part: stream(tokenizer, texts[part]) for part in texts}
    np.savez_compressed(data / "train.npz", tokens=streams["train"], tune=streams["tune"])
    for part, source, count in (("heldout", "heldout", HELDOUT_WINDOWS), ("calibration", "train", CALIBRATION_WINDOWS)):
        ids = windows(streams[source], count)
        np.savez_compressed(data / f"{part}.npz", input_ids=ids, attention_mask=np.ones_like(ids))
        rows = _rows(docs, parts[source], count)
        (data / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    version = ".".join(map(str, sys.version_info[:3]))
    (data / "modules.json").write_text(json.dumps({"python": version, **parts}, indent=1) + "\n", encoding="utf-8")
    return {part: len(tokens) for part, tokens in streams.items()}


def _rows(docs: Docs, names: list[str], count: int) -> list[dict[str, str]]:
    """`count` rows of 80 to 800 characters, spread evenly over the modules."""
    rows = [{"module": name, "text": text} for name in names for text in docs[name] if 80 <= len(text) <= 800]
    return [rows[i] for i in np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int)]
