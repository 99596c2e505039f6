"""Speed of the chip simulator: CPU seconds for a layer, a model and a thousand steps, compared with GenZ if installed.

    python bench/silicon.py            # needs `pip install genz-llm` for the comparison

Prints CPU seconds measured on this machine and, separately, modelled times.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from importlib import import_module
from importlib.util import find_spec
from io import StringIO
from typing import Any

import numpy as np

from intaglio.batch import Chunk, bind
from intaglio.chips import target
from intaglio.codesign.simulate import Serving, Simulation, ported, stages
from intaglio.collectives import schedule
from intaglio.compiler import build
from intaglio.devices import ArrayWeights, StateSpec, StepRequest
from intaglio.devices.silicon import SiliconDevice
from intaglio.models import port_config
from intaglio.ops import Attend, Embed, KvWrite, Linear, Map, Norm, Sample, Select
from intaglio.program import Builder, Program
from intaglio.silicon.kernels import timing
from intaglio.silicon.kernels.attend import attend_timing
from intaglio.silicon.kernels.collectives import collective_timing, hbm_traffic, link_traffic, unit_seconds
from intaglio.silicon.kernels.product import linear_timing
from intaglio.silicon.plan import Plan
from intaglio.silicon.sizes import BatchSizes

GPT3 = {"hidden": 12288, "heads": 96, "inner": 4 * 12288, "vocabulary": 50257}
SMALL_CORE = target("tpu_v5e").with_chip(  # as in published cycle-level simulations: 128 x 128 at 1 GHz
    name="one_array", clock_hz=1e9, macs=(("bf16", 128 * 128), ("int8", 128 * 128), ("f32", 128 * 16)),
    hbm_bytes_per_s=300e9,
)  # fmt: skip


def cpu(work: Callable[[], Any]) -> float:
    """CPU seconds of one call of `work`."""
    start = time.process_time()
    work()
    return time.process_time() - start


def forget() -> None:
    """Clear all timing caches, so that the next timing starts cold."""
    collectives = (collective_timing, unit_seconds, link_traffic, hbm_traffic, schedule)
    for cached in (timing, linear_timing, attend_timing, *collectives):
        cached.cache_clear()


def gpt3_layer(lanes: int) -> Program:
    """One layer of GPT-3 175B on one of `lanes` tensor-parallel ranks, with the head; multi-head attention."""
    d, heads, inner = GPT3["hidden"], GPT3["heads"] // lanes, GPT3["inner"] // lanes
    b = Builder("gpt3-layer", 4096)
    x = b.op(Embed, "embed", "tokens", b.weight("embed.weight", (256, d), "e", "bf16"))
    n = b.op(Norm, "norm1", x, weight=b.weight("n1", (d,), "n1", "bf16"), norm="layer")
    parts = [b.op(Linear, f"{p}_proj", n, b.weight(p, (heads * 128, d), p, "bf16"), x_format="bf16") for p in "qkv"]
    caches = [b.cache(f"{p}_cache", heads, 128, "bf16") for p in "kv"]
    b.op(KvWrite, "kv_write", parts[1], parts[2], *caches)
    a = b.op(Attend, "attend", parts[0], *caches, heads=heads, scale=128**-0.5)
    y = b.op(Linear, "o_proj", a, b.weight("o", (d, heads * 128), "o", "bf16"), x_format="bf16")
    x = b.op(Map, "add1", x, b=y, expr="a + b")
    n = b.op(Norm, "norm2", x, weight=b.weight("n2", (d,), "n2", "bf16"), norm="layer")
    h = b.op(Linear, "up", n, b.weight("up.weight", (inner, d), "up", "bf16"), x_format="bf16", activation="gelu_tanh")
    y = b.op(Linear, "down", h, b.weight("down.weight", (d, inner), "down", "bf16"), x_format="bf16")
    x = b.op(Map, "add2", x, b=y, expr="a + b")
    r = b.op(Select, "select", x, "rows")
    b.op(Linear, "head", r, b.weight("h", (256, d), "h", "bf16"), x_format="bf16", out="logits", role="output")
    b.op(Sample, "sample", "logits", tokens="next_tokens", logprobs="logprobs", role="output")
    return b.done()


def gpt3(chip_name: str, load: BatchSizes) -> float:
    """Modelled seconds of the layer on four chips: one rank and two all_reduces."""
    on = target(chip_name)
    one = Plan(gpt3_layer(4), on).run(load).seconds
    return one + 2 * collective_timing(on, "all_reduce", 4, load.tokens * GPT3["hidden"] * 2).seconds


PREFILL, DECODE = BatchSizes(8 * 2048, 8, ((2048, 2048, 8),)), BatchSizes(8, 8, ((1, 3072, 8),))


def layer_rows() -> None:
    for name, load in (("prefill, batch 8 of 2,048", PREFILL), ("decode, batch 8 at 3,072", DECODE)):
        forget()
        modelled: list[float] = []
        spent = cpu(lambda load=load, modelled=modelled: modelled.append(gpt3("a100_sxm", load)))
        print(f"GPT-3 175B layer on 4 A100, {name}: {spent:.3f} CPU s cold (modelled {modelled[0] * 1e3:.3f} ms)")
    genz_rows()


def genz_rows() -> None:
    """Time the same model with GenZ (genz-llm on PyPI), an analytic roofline model.

    In int8, since by its count the model does not fit four chips in bf16.
    """
    if find_spec("GenZ") is None:
        print("GenZ is not installed: no comparison (pip install genz-llm)")
        return
    genz = import_module("GenZ")
    how = {"model": "gpt-3", "batch_size": 8, "system_name": "A100_80GB_GPU", "bits": "int8", "tensor_parallel": 4}
    for name, call, more in (
        ("prefill", genz.prefill_moddeling, {"input_tokens": 2048}),
        ("decode", genz.decode_moddeling, {"input_tokens": 3072, "output_tokens": 1, "Bb": 1}),
    ):
        with redirect_stdout(StringIO()):
            result: list[Any] = []
            spent = cpu(lambda call=call, more=more, result=result: result.append(call(**how, **more)))
        took = result[0]["Latency"]
        print(f"GenZ, GPT-3 175B whole, int8, {name}: {spent:.3f} CPU s (modelled {took:.3f} ms, 96 layers)")


def model_rows() -> None:
    made: list[Simulation] = []

    def make() -> None:
        parts = stages(ported("llama-3-70b", None), "tp1", "fp8row", "int8", "fp8")
        made.append(Simulation.of(parts, target("sohu").with_chip(hbm_bytes=10**12), "tp1"))

    print(f"Llama-3-70B: port, compile and plan {cpu(make):.2f} CPU s")
    load = Serving(2048, 128).mixed()
    forget()
    print(f"  a mixed step, cold {cpu(lambda: made[0].phase('mixed', load, 128)):.3f} CPU s")
    print(f"  the same step, warm {cpu(lambda: made[0].phase('mixed', load, 128)):.4f} CPU s")
    draw = np.random.default_rng(0)
    loads = []
    for _ in range(1000):
        prompt, contexts = int(draw.integers(1, 2048)), draw.integers(10, 4000, 64)
        loads.append(BatchSizes(prompt + 64, 65, (*((1, int(c), 1) for c in np.unique(contexts)), (prompt, prompt, 1))))
    forget()
    spent = cpu(lambda: [made[0].phase("mixed", x, 65) for x in loads])
    print(f"  1,000 steps of different sizes: {spent:.2f} CPU s")


def values_row() -> None:
    """A Llama-8B layer with values computed by the host: modelled cycles of a small core for each second."""
    config = {
        "architectures": ["LlamaForCausalLM"], "vocab_size": 2048, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 1, "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 2048,
        "torch_dtype": "bfloat16", "tie_word_embeddings": False,
    }  # fmt: skip
    ported_layer = port_config(config)
    draw = np.random.default_rng(0)
    arrays = {}
    for t in ported_layer.of_role("weight"):
        arrays[t.source[0]] = (draw.standard_normal(t.shape, np.float32) * 0.02).astype(np.float32)
    device = SiliconDevice(SMALL_CORE, values="host", cache=None)
    executable = device.load(build(ported_layer, "bf16"), ArrayWeights(arrays), StateSpec(64, 32))
    batch = bind([Chunk(draw.integers(0, 2048, 512).tolist(), 0, list(range(16)), rows=(511,))], 32)
    executable.step(StepRequest(batch))
    before = device.clock()
    start = time.perf_counter()
    executable.step(StepRequest(batch))
    seconds = time.perf_counter() - start
    cycles = (device.clock() - before) * SMALL_CORE.chip.clock_hz
    rate = f"{cycles:,.0f} cycles modelled in {seconds:.2f} s: {cycles / seconds:,.0f} a second"
    print(f"Llama-8B layer, 512 tokens, values on: {rate}")


def growth_rows() -> None:
    """CPU seconds of a mixed step with cold caches, by layers and by context; equal layers are timed once."""
    for layers in (1, 10, 40, 80, 160):
        config = {
            "architectures": ["LlamaForCausalLM"], "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
            "num_hidden_layers": layers, "num_attention_heads": 32, "num_key_value_heads": 8,
            "max_position_embeddings": 131072, "torch_dtype": "bfloat16", "tie_word_embeddings": False,
        }  # fmt: skip
        plan = Plan(build(port_config(config), "auto"), target("sohu").with_chip(hbm_bytes=10**12))
        forget()
        print(
            f"{layers:4} layers: {cpu(lambda plan=plan: plan.run(Serving(2048, 128).mixed())):.4f} CPU s a step, cold"
        )
    for keys in (1024, 8192, 65536, 131072):
        forget()
        load = BatchSizes(keys + 64, 65, ((1, keys, 64), (keys, keys, 1)))
        print(f"{keys:7,} tokens of context: {cpu(lambda plan=plan, load=load: plan.run(load)):.4f} CPU s a step, cold")


def chips_rows() -> None:
    """Llama-3-70B sharded over 1 to 256 chips, eight in a network: its step, and one collective over all chips."""
    whole = ported("llama-3-70b", None)
    for chips in (1, 2, 4, 8, 16, 32, 64, 128, 256):
        layout = f"tp{min(chips, 8)}" + (f"pp{chips // 8}" if chips > 8 else "")
        made: list[Simulation] = []

        def make(layout: str = layout, made: list[Simulation] = made) -> None:
            parts = stages(whole, layout, "fp8row", "int8", "fp8")
            made.append(Simulation.of(parts, target("sohu").with_chip(hbm_bytes=10**12), layout))

        cut = cpu(make)
        forget()
        spent = cpu(lambda made=made: made[0].phase("mixed", Serving(2048, 128).mixed(), 128))
        print(f"{chips:4} chips, {layout:8}: {cut:.2f} CPU s to shard and compile, {spent:.4f} a step, cold")
    for chips in (2, 8, 16, 32, 64, 128, 256):
        forget()
        spent = cpu(lambda chips=chips: collective_timing(target("tpu_v6e"), "all_reduce", chips, 10**7))
        print(f"{chips:4} chips, one all_reduce of 10 MB round a torus: {spent:.4f} CPU s, cold")


def main() -> None:
    print(f"Python {sys.version.split()[0]}; CPU seconds are measured here, milliseconds are modelled", flush=True)
    layer_rows()
    model_rows()
    values_row()
    growth_rows()
    chips_rows()


if __name__ == "__main__":
    main()
