"""Recognising quantized checkpoints: their weights are codes and scales, and no matrix that could be factorized."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from lrconvert.tensors import TensorRef

WAY_OUT = "factorize the checkpoint from before quantization and quantize the result, or dequantize it first"

_ONE_BYTE = {torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2}
_ONE_BYTE |= {torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float4_e2m1fn_x2}
_INTEGERS = {torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64}
# Names that config.json gives to methods, as people write them.
_METHODS = {
    "gptq": "GPTQ",
    "awq": "AWQ",
    "bitsandbytes": "bitsandbytes",
    "fp8": "FP8 with scales",
    "fbgemm_fp8": "FP8 with scales",
    "mxfp4": "MXFP4",
    "hqq": "HQQ",
    "aqlm": "AQLM",
    "quanto": "quanto",
}


@dataclass(frozen=True)
class Quantized:
    """A layer whose weight is stored quantized.

    Attributes:
        method: what quantized it.
        weight: the key that holds its codes.
    """

    method: str
    weight: str


@dataclass(frozen=True)
class _Sign:
    """What one method's checkpoints look like.

    Attributes:
        method: its name.
        mark: matches the key that gives it away; its first group is the layer.
        codes: what follows the layer's name in the key of the codes.
        dtypes: one of which the codes must have: `weight_scale` alone may be a parameter of anybody's network.
    """

    method: str
    mark: re.Pattern[str]
    codes: str
    dtypes: frozenset[torch.dtype]


def _sign(method: str, mark: str, codes: str, dtypes: set[torch.dtype]) -> _Sign:
    return _Sign(method, re.compile(rf"(?:(.+)\.)?{mark}"), codes, frozenset(dtypes))


_SIGNS = (
    _sign("GPTQ", r"g_idx", "qweight", _INTEGERS),
    _sign("GPTQ or AWQ", r"qzeros", "qweight", _INTEGERS),
    _sign("bitsandbytes (nf4)", r"weight\.quant_state\.bitsandbytes__nf4", "weight", _ONE_BYTE),
    _sign("bitsandbytes (fp4)", r"weight\.quant_state\.bitsandbytes__fp4", "weight", _ONE_BYTE),
    _sign("bitsandbytes (4 bit)", r"weight\.(?:absmax|quant_map)", "weight", _ONE_BYTE),
    _sign("bitsandbytes (int8)", r"(?:weight\.)?SCB", "weight", _ONE_BYTE),
    _sign("compressed-tensors", r"weight_packed", "weight_packed", _INTEGERS),
    _sign("FP8 with scales", r"weight_scale_inv", "weight", _ONE_BYTE),
    _sign("FP8 or INT8 with scales", r"(?:weight_scale|scale_weight)", "weight", _ONE_BYTE),
    _sign("quanto", r"weight\._scale", "weight._data", _ONE_BYTE),
    _sign("HQQ", r"W_q", "W_q", _INTEGERS | _ONE_BYTE),
    _sign("AQLM", r"codebooks", "codes", _INTEGERS),
)
_EXPERTS = re.compile(r"(.+)_blocks")


def find_quantized(tensors: Mapping[str, TensorRef], folder: Path | None = None) -> dict[str, Quantized]:
    """Layer name to how it is quantized.

    Args:
        tensors: the state dict; only keys and dtypes are looked at.
        folder: whose config.json may name the method.
    """
    found: dict[str, Quantized] = {}
    for sign in _SIGNS:
        for key in tensors:
            match = sign.mark.fullmatch(key)
            if match is None:
                continue
            name = match[1] or ""
            codes = tensors.get(weight := f"{name}.{sign.codes}" if name else sign.codes)
            if codes is not None and codes.dtype in sign.dtypes:
                found.setdefault(name, Quantized(sign.method, weight))
    for key, ref in tensors.items():
        match = _EXPERTS.fullmatch(key)
        if match and f"{match[1]}_scales" in tensors and ref.dtype == torch.uint8:
            found.setdefault(match[1], Quantized("MXFP4", key))
    method = _method_in(folder) if found and folder is not None else None
    if method:
        # The config knows better than the keys, which several methods share.
        found = {
            name: layer if layer.method.startswith(f"{method} (") else Quantized(method, layer.weight)
            for name, layer in found.items()
        }
    return found


def describe(path: object, layers: Mapping[str, Quantized]) -> str:
    """One line that says what is quantized and what to do."""
    first = next(iter(layers))
    methods = sorted({layer.method for layer in layers.values()})
    count = f"{len(layers)} layers are" if len(layers) > 1 else "one layer is"
    return (
        f"{path}: {count} quantized by {' and '.join(methods)} ({first}{', …' if len(layers) > 1 else ''}); {WAY_OUT}"
    )


def _method_in(folder: Path) -> str | None:
    """The quantization method that a Hugging Face folder's config.json names."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        name = config["quantization_config"]["quant_method"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return _METHODS.get(name, str(name))
