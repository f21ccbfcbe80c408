"""Targets as data: what an execution provider can run, in which quantized forms, and what is fastest on it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from onnxcomp.errors import TargetError
from onnxcomp.machine import cpu_features, runtime_opset

__all__ = ["CPU", "CPU_ARM64", "CPU_AVX2", "CPU_VNNI", "CUDA", "TARGETS", "TENSORRT", "Target", "find", "resolved"]

Granularity = Literal["tensor", "channel"]


# In-channels per scale, by bits, for which ONNX Runtime 1.32 has a kernel; others dequantize the weight at every run,
# which takes 100 times as long.
_CPU_BLOCKS = {8: (16, 32, 64, 128, 256), 4: (16, 32, 64, 128, 256), 2: (32, 64, 128)}
_CUDA_BLOCKS = {8: (32,), 4: (32,), 2: (64,)}  # of its fast path, which takes no zero points either


@dataclass(frozen=True)
class Quantized:
    """The legal forms of a quantized linear on a target: code types, granularity of weight scales, zero points.

    `pays` says whether int8 products are faster than float ones. `blocks` has, by bits, the blocks of codes of weights
    for which products with float inputs have a kernel; with `block_zero_points` they may have zero points.
    """

    activations: tuple[str, ...] = ("u8",)
    weights: tuple[str, ...] = ("s8",)
    granularity: tuple[Granularity, ...] = ("channel", "tensor")
    zero_points: bool = True
    saturates: bool = False  # pairs of u8 x s8 products are added in 16 bits, so pairs of weights must be limited
    pays: bool = True
    blocks: Mapping[int, tuple[int, ...]] = field(default_factory=lambda: dict(_CPU_BLOCKS))
    block_zero_points: bool = True
    floats: tuple[str, ...] = ()  # float formats of weights for which it has a product


@dataclass(frozen=True)
class Target:
    """Where the model will run; users add targets as YAML files with the same fields.

    `forms` lists per kind of site the forms to choose without measuring, the first legal one; `contrib` the
    `com.microsoft` operators with a kernel, `lacks` standard operators without one; `width_multiple` what pruned widths
    are rounded to; `gflops` rates by type for estimates; `here` whether it may be this machine.
    """

    name: str
    providers: tuple[str, ...]
    description: str = ""
    provider_options: Mapping[str, str] = field(default_factory=dict)
    session_options: Mapping[str, str] = field(default_factory=dict)
    package: str = "onnxcomp[cpu]"
    min_runtime: str = "1.28"
    max_opset: int | None = None
    max_ir: int = 10
    width_multiple: int = 8
    quantized: Quantized = field(default_factory=Quantized)
    forms: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    contrib: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ()
    sparse: tuple[str, ...] = ()
    gflops: Mapping[str, float] = field(default_factory=dict)
    here: bool = True

    @property
    def provider(self) -> str:
        """The provider that must really run the model."""
        return self.providers[0]

    @property
    def newest_opset(self) -> int:
        """The newest operator set that is written: `max_opset`, by default the newest of the installed runtime."""
        return self.max_opset or runtime_opset()


# The fastest forms on x86-64 with ONNX Runtime 1.32: its fusions of `Add` with a norm and with GELU
# (SkipLayerNormalization, BiasGelu) are slower than what they replace, and it turns a quantized product of rank 2 or of
# static shape before an `Add` into a float Gemm. It fuses nothing with `Sum`.
_CPU_FORMS = {
    "projections": ("separate",),
    "siblings": ("separate",),
    "coded siblings": ("joined",),
    "attention": ("Attention", "decomposed"),
    "weight-only": ("MatMulNBits", "Q/DQ"),
    "quantized": ("MatMulIntegerToFloat", "Sum"),
    "dynamic": ("standard",),
    "activation": ("Sum",),
    "linear": ("Add",),
    "silu": ("spelled",),
    "residual": ("Sum",),
    "table": ("gathered", "GatherBlockQuantized"),
}
# In the oldest supported runtime the standard Attention has no CUDA kernel and runs on the CPU (onnxruntime #28025).
_GPU_FORMS = {
    "projections": ("separate",),
    "siblings": ("separate",),
    "coded siblings": ("separate",),
    "attention": ("MultiHeadAttention", "GroupQueryAttention", "decomposed"),
    "weight-only": ("MatMulNBits, bias behind", "Q/DQ"),
    "quantized": ("Add",),
    "dynamic": ("standard",),
    "activation": ("Add",),
    "linear": ("Add",),
    "silu": ("spelled",),
    "residual": ("Add",),
    "table": ("gathered", "GatherBlockQuantized"),
}
_CPU_CONTRIB = (
    "Attention",
    "BiasGelu",
    "DynamicQuantizeMatMul",
    "FastGelu",
    "GatherBlockQuantized",
    "GroupQueryAttention",
    "MatMulIntegerToFloat",
    "MatMulNBits",
    "MultiHeadAttention",
    "QGemm",
    "QuickGelu",
    "SkipLayerNormalization",
    "SkipSimplifiedLayerNormalization",
)
_CUDA_CONTRIB = tuple(x for x in _CPU_CONTRIB if x not in ("DynamicQuantizeMatMul", "MatMulIntegerToFloat", "QGemm"))
# GFLOP/s for estimates where nothing is measured; only ratios matter (these were measured on 2 AVX512-VNNI cores).
_CPU_RATES = {"fp32": 230.0, "int8": 700.0, "int8-dynamic": 640.0}

CPU = Target(
    name="cpu",
    providers=("CPUExecutionProvider",),
    description="the CPU of this machine",
    forms=_CPU_FORMS,
    contrib=_CPU_CONTRIB,
    gflops=_CPU_RATES,
)
CPU_VNNI = dataclasses.replace(CPU, name="cpu-vnni", description="x86-64 with AVX-VNNI or AVX512-VNNI", here=False)
CPU_AVX2 = dataclasses.replace(
    CPU,
    name="cpu-avx2",
    description="x86-64 with AVX2 and no VNNI: u8 x s8 sums saturate, so pairs of weights are limited",
    quantized=Quantized(saturates=True),
    gflops={"fp32": 100.0, "int8": 150.0, "int8-dynamic": 140.0},
    here=False,
)
CPU_ARM64 = dataclasses.replace(
    CPU,
    name="cpu-arm64",
    description="64-bit Arm with dot product instructions",
    quantized=Quantized(activations=("u8", "s8")),
    gflops={"fp32": 60.0, "int8": 200.0, "int8-dynamic": 180.0},
    here=False,
)
CUDA = Target(
    name="cuda",
    providers=("CUDAExecutionProvider", "CPUExecutionProvider"),
    description="NVIDIA GPU through ONNX Runtime's CUDA provider (no int8 product for Q/DQ there)",
    provider_options={"use_tf32": "0"},
    package="onnxcomp[gpu]",
    quantized=Quantized(activations=("u8", "s8"), pays=False, blocks=_CUDA_BLOCKS, block_zero_points=False),
    forms=_GPU_FORMS,
    contrib=_CUDA_CONTRIB,
    lacks=("Attention", "QLinearMatMul"),
    gflops={"fp32": 40000.0, "int8": 20000.0, "int8-dynamic": 10000.0},
)
TENSORRT = Target(
    name="tensorrt",
    providers=("TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"),
    description="NVIDIA GPU through ONNX Runtime's TensorRT provider: symmetric, no zero points, strongly typed",
    provider_options={"trt_fp16_enable": "0", "trt_engine_cache_enable": "0", "trt_sparsity_enable": "1"},
    package="onnxcomp[tensorrt]",
    max_opset=22,
    quantized=Quantized(
        activations=("s8",), zero_points=False, blocks={4: (64, 128)}, block_zero_points=False, floats=("fp8",)
    ),
    forms={**_GPU_FORMS, "attention": ("decomposed",), "table": ("dequantized",)},
    lacks=("Attention", "QLinearMatMul"),
    sparse=("2:4",),
    gflops={"fp32": 40000.0, "int8": 400000.0},
)
LARGEST = 64 << 10  # bytes of a file of a target
TARGETS = {t.name: t for t in (CPU, CPU_VNNI, CPU_AVX2, CPU_ARM64, CUDA, TENSORRT)}


def resolved(target: Target) -> Target:
    """The target with the limits of this machine's instruction set if it is this machine's CPU, else unchanged.

    Targets are resolved where they are used (manager, environment of a pass, job, costs); doing it again is harmless.
    """
    features = cpu_features()
    if not target.here or target.provider != CPU.provider or "avx2" not in features or "vnni" in features:
        return target
    return dataclasses.replace(
        target,
        quantized=dataclasses.replace(target.quantized, saturates=True),
        gflops=CPU_AVX2.gflops if target.gflops == CPU.gflops else target.gflops,
    )


def find(name: str | Target) -> Target:
    """A built-in target by name, or one read from a YAML file, not yet `resolved`; raises `TargetError`.

    A target itself is returned as it is.
    """
    if isinstance(name, Target):
        return name
    if not isinstance(name, str) or "\0" in name:
        raise TargetError(f"a target is a name or a Target, not {str(name)[:80]!r}")
    if name in TARGETS:
        return TARGETS[name]
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        return _read(path)
    raise TargetError(f"unknown target '{name}'; there are {', '.join(TARGETS)}, or a YAML file with the same fields")


def _read(path: Path) -> Target:
    import yaml
    from pydantic import TypeAdapter, ValidationError

    try:
        if not path.is_file() or path.stat().st_size > LARGEST:
            raise TargetError(f"{path}: is no file of a target")
        text = path.read_text(encoding="utf-8")
        if any(isinstance(x, yaml.AliasEvent) for x in yaml.parse(text, Loader=yaml.SafeLoader)):
            raise TargetError(f"{path}: YAML aliases are not allowed in a target; write the value out")
        fields: Any = yaml.safe_load(text)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as e:
        raise TargetError(f"{path}: cannot read the target: {e}") from e
    if not isinstance(fields, dict):
        raise TargetError(f"{path}: a target file is a mapping with the fields of a target, such as name and providers")
    base = fields.pop("like", None)
    if base is not None and base not in TARGETS:
        raise TargetError(f"{path}: 'like: {base}' names no built-in target; there are {', '.join(TARGETS)}")
    quantized = fields.get("quantized")
    if isinstance(quantized, dict) and "reduce_range" in quantized:  # the former name of `saturates`
        fields["quantized"] = {"saturates": quantized.pop("reduce_range"), **quantized}
    schemas = {"": Target, "quantized": Quantized}
    for part, kind in schemas.items():
        values = fields.get(part, {}) if part else fields
        unknown = set(values if isinstance(values, Mapping) else ()) - {f.name for f in dataclasses.fields(kind)}
        if unknown:
            where = f" of '{part}'" if part else " of a target"
            raise TargetError(f"{path}: unknown field '{sorted(unknown)[0]}'{where}")
    if base is not None:
        fields = _merged(dataclasses.asdict(TARGETS[base]), fields)
    try:
        return TypeAdapter(Target).validate_python(fields)
    except ValidationError as e:
        first = e.errors()[0]
        raise TargetError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from e


def _merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The base updated with changes; nested mappings are merged key by key."""
    merged = {
        k: _merged(v, changes[k])
        for k, v in base.items()
        if isinstance(v, Mapping) and isinstance(changes.get(k), Mapping)
    }
    return {**base, **changes, **merged}
