"""Quantised matrices of checkpoints: finds the tensors that make up each matrix, by the checkpoint's method.

If a weight format here can hold a matrix's codes, they are kept unchanged. Other matrices, such as HQQ's with groups
along columns, are rounded to bf16.
"""

from __future__ import annotations

from intaglio.models.config import Settings
from intaglio.models.files.affine import hqq, mlx
from intaglio.models.files.bitsandbytes import bitsandbytes
from intaglio.models.files.coded import Coded, Stored
from intaglio.models.files.compressed import compressed
from intaglio.models.files.floats import fp8, mxfp4
from intaglio.models.files.packed import auto_round, awq, gptq
from intaglio.models.files.quantisation import BESIDE, method_of
from intaglio.models.files.scaled import scaled

ACTIVATION_SCALES = (
    "input_scale", "k_scale", "v_scale", "output_scale", "weight_shape", "input_zero_point", "input_global_scale",
    "input_scale_ub",
)  # fmt: skip
FINDERS = {
    "fp8": fp8, "mxfp4": mxfp4, "compressed-tensors": compressed, "gptq": gptq, "awq": awq, "modelopt": scaled,
    "quark": scaled, "bitsandbytes": bitsandbytes, "hqq": hqq, "mlx": mlx, "auto-round": auto_round,
}  # fmt: skip


def find_coded(stored: Stored, q: Settings, where: str = "config.json") -> tuple[dict[str, Coded], set[str]]:
    """Find the quantised matrices of a checkpoint. Returns ({name of a matrix: Coded}, set of stored tensors' names).

    A Coded decodes a matrix from its stored tensors. Matrices have the names of an unquantised checkpoint, such as
    a.weight. The set has the names of the tensors from which the matrices are decoded, and the names of activation
    scales. Both results are empty if nothing is quantised.

    Args:
        stored: contents of the checkpoint's files.
        q: the quantisation settings.
        where: the file and key that hold the settings, for errors.

    Raises PortError for a method that is not supported, or tensors that do not fit the method.
    """
    method = method_of(q, where)
    if (
        method
        and where.split(":")[0] in BESIDE
        and not any(n.endswith((".qweight", "_scale", "_scale_inv")) for n in stored.dtypes)
    ):
        return {}, set()  # a file left from another version of the model
    if not method:
        return {}, set()
    coded = FINDERS[method](stored, q)
    taken = {part for c in coded.values() for part in c.parts}
    taken |= {n for n in stored.dtypes if n.rpartition(".")[2] in ACTIVATION_SCALES}
    return coded, taken
