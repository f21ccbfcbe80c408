"""Checkpoints for export: safe loading, task, inputs, and the tokenizer and configuration files for the result."""

from __future__ import annotations

import contextlib
import importlib.metadata
import inspect
import io
import logging
import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from onnxcomp.errors import ExportError
from onnxcomp.files.storage import COMPANIONS, copy_companions
from onnxcomp.version import __version__

TASKS = {  # task: transformers' class that loads it, its outputs
    "feature-extraction": ("AutoModel", ("last_hidden_state",)),
    "text-classification": ("AutoModelForSequenceClassification", ("logits",)),
    "token-classification": ("AutoModelForTokenClassification", ("logits",)),
    "question-answering": ("AutoModelForQuestionAnswering", ("start_logits", "end_logits")),
    "image-classification": ("AutoModelForImageClassification", ("logits",)),
    "fill-mask": ("AutoModelForMaskedLM", ("logits",)),
    "text-generation": ("AutoModelForCausalLM", ("logits",)),
    "text2text-generation": ("AutoModelForSeq2SeqLM", ("logits",)),
    "automatic-speech-recognition": ("AutoModelForSpeechSeq2Seq", ("logits",)),
    "image-to-text": ("AutoModelForImageTextToText", ("logits",)),
}
_ARCHITECTURES = {
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForImageClassification": "image-classification",
    "ForMaskedLM": "fill-mask",
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
    "Model": "feature-extraction",
}
_PAIRS = {  # encoder-decoders
    "WhisperForConditionalGeneration": "automatic-speech-recognition",
    "VisionEncoderDecoderModel": "image-to-text",
    "ForConditionalGeneration": "text2text-generation",
    "MTModel": "text2text-generation",
}
PAIRED = frozenset(_PAIRS.values())
VOCABULARIES = ("vocab.txt", "vocab.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model")


def load_checkpoint(
    source: str | Path | Any, task: str | None, revision: str | None, allow_pickle: bool
) -> tuple[Any, str]:
    """The module in evaluation mode and its task; raises `ExportError` where weights are missing in the checkpoint."""
    import transformers

    if not isinstance(source, (str, Path)):
        return _prepared(source), task or task_of(source.config, type(source).__name__)
    name = located(source)
    common: dict[str, Any] = {"revision": revision, "trust_remote_code": False}
    try:
        config = transformers.AutoConfig.from_pretrained(name, **common)
        task = task or task_of(config, source)
        loader = getattr(transformers, TASKS[task][0])
        model, info = loader.from_pretrained(
            name, config=config, dtype="float32", use_safetensors=None if allow_pickle else True,
            output_loading_info=True, **common,
        )  # fmt: skip
    except Exception as e:  # transformers, safetensors and torch raise many kinds
        raise ExportError(_why_not_loaded(source, e)) from e
    ignored = ("pooler.", ".pooler.") if task == "feature-extraction" else ()
    missing = sorted(k for k in info["missing_keys"] if not any(k.startswith(x) or f".{x}" in f".{k}" for x in ignored))
    if missing:
        raise ExportError(
            f"{source}: the checkpoint has no weights for {', '.join(missing[:3])}"
            f"{f' and {len(missing) - 3} more' if len(missing) > 3 else ''}, so the task '{task}' would run on random "
            "numbers; choose the task it was trained for with --task"
        )
    return _prepared(model), task


def located(source: str | Path) -> str:
    """The folder of a checkpoint, or its name on the hub; raises `ExportError`."""
    path = Path(source)
    text = str(source)
    if path.is_file():
        raise ExportError(f"{source}: is a file; name the checkpoint's folder")
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ExportError(f"{source}: this folder has no config.json, so it is not a transformers checkpoint")
        return text
    if isinstance(source, Path) or text.startswith((".", "/", "~")) or text.count("/") > 1 or "\\" in text:
        raise ExportError(f"{source}: no such folder")
    return text


def _why_not_loaded(source: str | Path, e: BaseException) -> str:
    folder = Path(source)
    if isinstance(e, ExportError):
        return str(e)
    if not folder.is_dir() and isinstance(e, OSError):
        return f"{source}: no such folder, and it could not be loaded from the hub: {one_line(e)}"
    return f"{source}: cannot be loaded: {one_line(e)}"


def task_of(config: Any, source: object) -> str:
    """The task that a configuration's architecture is for; raises `ExportError`."""
    names = list(getattr(config, "architectures", None) or []) or [str(source)]
    pair = getattr(config, "is_encoder_decoder", False)
    for suffix, task in (_PAIRS if pair else _ARCHITECTURES).items():
        if names[0].endswith(suffix):
            return task
    raise ExportError(f"{source}: the task does not follow from '{names[0]}'; give --task, one of {', '.join(TASKS)}")


def _prepared(model: Any) -> Any:
    model.eval()
    model.config.use_cache = False
    model.config.return_dict = True
    return model


def cast(model: Any, dtype: str) -> Any:
    import torch

    return model.to({"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[dtype])


def inputs_of(model: Any, source: object) -> tuple[str, ...]:
    """The model's inputs, in the order they are exported."""
    takes = inspect.signature(model.forward).parameters
    if "pixel_values" in takes and "input_ids" not in takes:
        return ("pixel_values",)
    if "input_ids" not in takes:
        raise ExportError(f"{source}: takes {', '.join(takes)}; only text and image models are supported")
    names = ["input_ids", "attention_mask"]
    if "token_type_ids" in takes and (getattr(model.config, "type_vocab_size", 0) or 0) > 1:
        names.append("token_type_ids")
    return tuple(n for n in names if n in takes)


def title(source: object, model: Any) -> str:
    """A hub id as it is, a folder so that nobody takes it for one: `./org/name`, or absolute."""
    if not isinstance(source, (str, Path)):
        return type(model).__name__
    local = Path(source).is_dir() and not Path(source).is_absolute()
    return f"./{Path(source).as_posix()}" if local else str(source)


def companions(model: Any, source: str | Path | Any, revision: str | None, staging: Path, log: list[str]) -> None:
    """Write tokenizer, processor and configuration files; a tokenizer without tokenizer.json is converted."""
    if not isinstance(source, (str, Path)):
        model.config.save_pretrained(staging)
        return
    if Path(source).is_dir():
        copy_companions(Path(source), staging)
    else:
        _from_hub(str(source), revision, staging)
    vocabulary = any((staging / name).exists() for name in VOCABULARIES)
    if vocabulary and not (staging / "tokenizer.json").exists():
        import transformers

        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                str(source), revision=revision, trust_remote_code=False
            )
            tokenizer.save_pretrained(staging)
        except Exception as e:  # noqa: BLE001  a tokenizer that cannot be converted is no reason to fail
            log.append(f"no tokenizer was written: {one_line(e)}")


def _from_hub(name: str, revision: str | None, staging: Path) -> None:
    from transformers.utils.hub import cached_file

    for companion in COMPANIONS:
        path = cached_file(
            name, companion, revision=revision, _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )  # fmt: skip
        if path is not None:
            shutil.copyfile(path, staging / companion)


def versions() -> dict[str, str]:
    """Versions of the packages that take part in an export."""
    versions = {"onnxcomp": __version__}
    for name in ("torch", "transformers", "onnxscript", "onnx", "onnx-ir"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def one_line(e: BaseException, hide: Path | None = None) -> str:
    """The first meaningful line of an error, without the path of a temporary folder."""
    lines = [x.strip() for x in str(e).splitlines() if x.strip()]
    return (lines[0] if lines else type(e).__name__).replace(f"{hide}/", "")[:400]


class _Capture(logging.Handler):
    """Collects log lines instead of showing them."""

    def __init__(self, lines: list[str]) -> None:
        super().__init__(logging.INFO)
        self.lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        """Store one line."""
        self.lines.append(f"{record.name}: {record.getMessage().splitlines()[0] if record.getMessage() else ''}")


@contextlib.contextmanager
def quiet(lines: list[str]) -> Iterator[None]:
    """Send what torch and transformers print, log and warn to `lines`."""
    import transformers

    os.environ.setdefault("TORCH_LOGS", "-all")  # torch sets its handlers anew while it exports, to stderr
    capture, text = _Capture(lines), io.StringIO()
    loggers = [
        logging.getLogger(n)
        for n in ("torch", "torch.onnx", "torch.export", "transformers", "onnxscript", "onnx_ir", "huggingface_hub")
    ]
    before = [(x, x.handlers, x.propagate) for x in loggers]
    bars = transformers.utils.logging.is_progress_bar_enabled()
    for x in loggers:
        x.handlers, x.propagate = [capture], False
    transformers.utils.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings(record=True) as caught, contextlib.redirect_stdout(text):
            warnings.simplefilter("always")
            yield
    finally:
        for x, handlers, propagate in before:
            x.handlers, x.propagate = handlers, propagate
        if bars:
            transformers.utils.logging.enable_progress_bar()
        lines += sorted({str(w.message).splitlines()[0] for w in caught if str(w.message)})
        lines += [x for x in text.getvalue().splitlines() if x.strip()]
