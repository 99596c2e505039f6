"""Finds a checkpoint's quantisation settings: the file and key that hold them, and the method; refuses unknown methods.

The settings may be in config.json (quantization_config, compression_config) or, in checkpoints of older tools, in a
separate file. The layout of codes is in published.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from intaglio.models.config import PortError, Settings
from intaglio.models.files.header import read_json
from intaglio.models.files.scaled import ALGORITHMS

BESIDE = {  # files of older tools and the method they mean
    "quantize_config.json": "gptq", "quant_config.json": "awq", "hf_quant_config.json": "modelopt",
}  # fmt: skip
METHODS = ("fp8", "mxfp4", "compressed-tensors", "gptq", "awq", "bitsandbytes", "hqq", "quark", "mlx", "auto-round")
READ = (*METHODS, "fbgemm_fp8", "modelopt", "metal")
OTHER_NAMES = {"fbgemm-fp8": "fp8", "intel/auto-round": "auto-round", "metal": "mlx", "bnb": "bitsandbytes"}
OTHER = "take a version in FP8, GPTQ, AWQ or compressed-tensors, or the unquantised model and weights=int4 or int8 here"
UNREAD = {
    "nvfp4": "transformers' NVFP4, which quantises while loading and is never saved",
    "aqlm": "AQLM (additive codebooks)", "vptq": "VPTQ (vector codebooks)", "quip": "QuIP# (lattice codebooks)",
    "quanto": "Quanto", "eetq": "EETQ", "higgs": "HIGGS", "torchao": "torchao",
    "bitnet": "BitNet (1.58 bits)",
    "spqr": "SpQR", "fp_quant": "FP-Quant", "exl2": "ExLlamaV2",
    "exl3": "ExLlamaV3", "marlin": "Marlin's packing of GPTQ", "fouroversix": "Four Over Six", "sinq": "SINQ",
    "gguf": "GGUF; give the .gguf file itself", "deepspeedfp": "DeepSpeedFP", "tpu_int8": "tpu_int8", "experts_int8":
    "experts_int8", "squeezellm": "SqueezeLLM", "ptpc_fp8": "ptpc_fp8", "qqq": "QQQ", "ipex": "IPEX", "inc": "INC",
    "bitblas": "BitBLAS", "gptq_marlin": "Marlin's packing of GPTQ", "awq_marlin": "Marlin's packing of AWQ", "gemma":
    "Gemma's quantisation-aware checkpoints",
}  # fmt: skip


def find_quantisation(path: Path, config: Mapping[str, Any]) -> tuple[Settings, str]:
    """Find the quantisation settings of a checkpoint folder. Returns (settings, text that names their file and key).

    Returns (empty Settings, "") if there are no settings. Raises CheckpointError if a file of settings is not JSON.

    path: the folder. config: contents of its config.json.
    """
    inner, mlx = config.get("text_config"), config.get("quantization")
    if isinstance(mlx, Mapping) and "bits" in mlx and "quant_method" not in (config.get("quantization_config") or {}):
        out = Settings(mlx)
        out["quant_method"] = "mlx"
        return out, "config.json: quantization"
    for held, at in (
        (config.get("quantization_config"), "config.json: quantization_config"),
        (inner.get("quantization_config") if isinstance(inner, Mapping) else None,
         "config.json: text_config.quantization_config"),
        (config.get("compression_config"), "config.json: compression_config"),
    ):  # fmt: skip
        if isinstance(held, Mapping) and held:
            return Settings(held), at
    for name, method in BESIDE.items():
        if (path / name).exists():
            held = read_json(path / name)
            inner, at = held.get("quantization"), name
            if isinstance(inner, dict):
                held, at = inner, f"{name}: quantization"
            out = Settings(held)
            dict.setdefault(out, "quant_method", method)
            return out, at
    return Settings({}), ""


def method_of(q: Settings, where: str) -> str:
    """Returns the name of a checkpoint's quantisation method; "" if nothing is quantised.

    The name is one of METHODS, or "modelopt". Raises PortError for any other method.

    q: the quantisation settings. where: file and key of the settings, for the error.
    """
    if not q:
        return ""
    named = q.get("quant_method")
    method = str(named or "").lower().replace("_", "-")
    if not named and "bits" in q and "group_size" in q and "version" not in q:
        others = {key for key in q if key not in ("bits", "group_size", "mode")}
        method = "mlx" if all("." in key or key == "lm_head" for key in others) else "gptq"  # names of modules
    elif not named and ("w_bit" in q or "version" in q):
        method = "awq"
    elif not named and "config_groups" in q:
        method = "compressed-tensors"
    elif not named and (q.get("load_in_4bit") or q.get("load_in_8bit")):
        method = "bitsandbytes"
    method = OTHER_NAMES.get(method, method)
    if method in METHODS:
        return method
    if method == "modelopt" or method.startswith("modelopt-"):
        return _modelopt(q, where)
    unread = UNREAD.get(method) or UNREAD.get(method.replace("-", "_"))
    if unread:
        raise PortError(f"{where}: quant_method {named or method!r}: {unread}; it is not read here. {OTHER}")
    raise PortError(f"{where}: quant_method {named!r} is not read; known are {', '.join(READ)}")


def _modelopt(q: Settings, where: str) -> str:
    """Returns "modelopt" if NVIDIA Model Optimizer's settings quantise matrices; "" if only the K/V cache is quantised.

    Raises PortError for an algorithm that is not supported.

    q: the quantisation settings. where: file and key of the settings, such as "config.json: quantization_config", for
    the error.
    """
    algo = q.get("quant_algo")
    if algo is None and q.get("kv_cache_quant_algo"):
        return ""  # the cache alone, which has formats of its own here
    if algo in ALGORITHMS:
        return "modelopt"
    raise PortError(
        f"{where}: quant_method modelopt (NVIDIA Model Optimizer), quant_algo {algo!r} is not read. Read are "
        f"{', '.join(ALGORITHMS)}. {OTHER}"
    )
