"""The op moment: one number for each row of a matrix, its mean, root mean square or standard deviation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from intaglio.batch import Batch
from intaglio.ops.op import Op, Results, Tensors, Value, Work, array, operand, result

MOMENTS = ("mean", "rms", "std")


def moment(x: np.ndarray, of: str) -> np.ndarray:
    """Returns the mean, root mean square or standard deviation of each row of x, as an array [rows, 1].

    of: "mean", "rms" or "std".
    """
    mean = x.mean(axis=1, keepdims=True)
    if of == "mean":
        return mean
    return np.asarray(np.sqrt(np.square(x - mean if of == "std" else x).mean(axis=1, keepdims=True)))


@dataclass(frozen=True, kw_only=True)
class Moment(Op, kind="moment"):
    """Op that reduces each row of x to one number: its mean, root mean square or standard deviation.

    x is f32 [rows, width], out is f32 [rows, 1]. mean: sum(x) / width. rms: sqrt(sum(x^2) / width). std: sqrt(sum((x -
    mean)^2) / width), the deviation of a whole population. AltUp scales residual streams by rms (Baykal et al. 2023,
    "Alternating Updates for Efficient Transformers"); the gaussian top-k of Gemma 3n cuts at mean + n * std.
    """

    x: str = operand()
    out: str = result()
    of: str = "mean"

    def shapes(self, t: Tensors) -> Results:
        self.check(self.of in MOMENTS, f"of={self.of!r}; use one of {', '.join(MOMENTS)}")
        rows, _ = self.rows_cols(t, self.x)
        return {self.out: ((rows, 1), "f32")}

    def reference(self, v: Mapping[str, Value], batch: Batch) -> dict[str, np.ndarray]:
        return {self.out: moment(array(v, self.x).astype(np.float64), self.of).astype(np.float32)}

    def work(self, t: Tensors, batch: Batch) -> Work:
        each = {"mean": 1, "rms": 2, "std": 4}[self.of]
        return self.moved(t, batch, each * (t[self.x].nbytes(batch.sizes) // 4))
