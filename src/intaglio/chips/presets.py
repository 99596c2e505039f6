"""The presets: real parts from public data sheets, and `sohu`, a chip that one public claim would need.

Constants of a100_sxm and h100_sxm were found by scripts/calibrate.py; the other parts take them from the nearest
relative, by the rule written beside each.
"""

from __future__ import annotations

from dataclasses import replace as change

from intaglio.chips.spec import ChipError, ChipSpec, Constants, Energy, Links, replace

GPU_TILES = tuple((m, n) for m in (16, 32, 64, 128, 256) for n in (32, 64, 128, 256) if m * n <= 128 * 256)
NVJET_TILES = tuple(  # Hopper's library has tiles of many widths, so that few cores stand idle in the last wave
    sorted(
        {
            tile
            for m in (64, 128, 192, 256, 320)
            for n in (16, 32, *range(48, 257, 16))
            for tile in ((m, n), (n, m))
            if m * n <= 43008
        }
    )
)
GIB, KIB, MIB = 2**30, 2**10, 2**20
NONE = Links(count=0, bytes_per_s=0.0, topology="none", most=1)

A100 = ChipSpec(
    name="a100_sxm",
    what="NVIDIA A100-SXM4-80GB",
    cores=108,
    clock_hz=1.41e9,
    macs=(("bf16", 1024), ("f16", 1024), ("int8", 2048), ("int4", 4096), ("f32", 64)),
    array=(16, 8, 16),
    tiles=GPU_TILES,
    depth=32,
    sram_bytes=164 * KIB,
    sram_bytes_per_cycle=128,
    acc_bytes=256 * KIB,
    vec_lanes=64,
    exp_lanes=16,
    att_lanes=0,
    port_bytes_per_cycle=64,
    shared_bytes=40 * 10**6,
    shared_bytes_per_cycle=5120,
    hbm_bytes=80 * 10**9,
    hbm_bytes_per_s=2.039e12,
    links=Links(count=12, bytes_per_s=25e9, topology="switch", most=8),
    tdp_w=400.0,
    energy=Energy(mac=0.9e-12, hbm_byte=40e-12, shared_byte=8e-12, link_byte=60e-12, idle_w=60.0),
    constants=Constants(
        launch_s=2.88e-6, latency_s=1.77e-6, hbm_share=0.717, shared_share=0.548, mxu_share=0.945, gather_share=0.4,
        meet_s=9.1e-6, hop_s=0.913e-6,
    ),
    reasons=(
        ("cores", "108 SMs (NVIDIA A100 data sheet and whitepaper, 2020)"),
        ("clock_hz", "boost clock, at which the sheet's 312 TFLOP/s bf16 = 108 * 1024 * 2 * 1.41e9"),
        ("sram_bytes", "largest shared memory of an SM that kernels can ask for"),
        ("sram_bytes_per_cycle", "32 banks of 4 bytes"),
        ("acc_bytes", "register file of an SM; accumulators live in registers"),
        ("exp_lanes", "16 special-function results a cycle and SM"),
        ("shared_bytes_per_cycle", "L2 read bandwidth, 5,120 bytes a cycle (whitepaper)"),
        ("energy", "mac, bytes and idle draw chosen so that a full bf16 product draws about the TDP; an estimate"),
    ),
)  # fmt: skip

H100 = replace(
    A100,
    name="h100_sxm",
    what="NVIDIA H100-SXM5-80GB",
    cores=132,
    clock_hz=1.83e9,
    macs=(("bf16", 2048), ("f16", 2048), ("e4m3", 4096), ("int8", 4096), ("f32", 128)),
    sram_bytes=227 * KIB,
    sram_bytes_per_cycle=256,
    vec_lanes=128,
    shared_bytes=50 * 10**6,
    hbm_bytes_per_s=3.35e12,
    links=Links(count=18, bytes_per_s=25e9, topology="switch", most=8),
    tdp_w=700.0,
    energy=Energy(mac=0.55e-12, hbm_byte=35e-12, shared_byte=7e-12, link_byte=50e-12, idle_w=90.0),
    flash=3,
    constants=Constants(
        launch_s=3.61e-6, latency_s=1.43e-6, hbm_share=0.882, shared_share=0.885, mxu_share=0.887, gather_share=0.514,
        meet_s=4.52e-6, hop_s=0.858e-6,
    ),
    tiles=NVJET_TILES,
    switch_adds=True,
    port_bytes_per_cycle=128,
    shared_bytes_per_cycle=10240,
    reasons=(
        ("cores", "132 SMs (NVIDIA H100 data sheet, 2022)"),
        ("clock_hz", "the clock at which the sheet's 989 TFLOP/s bf16 = 132 * 2048 * 2 * 1.83e9"),
        ("array", "as A100's: wgmma takes 64 rows, but a kernel with fewer swaps the operands"),
        ("sram_bytes", "largest shared memory of an SM that kernels can ask for"),
        ("shared_bytes_per_cycle", "A100's 5,120, twice: clusters of two cores take each line once; so with the port"),
        ("energy", "mac, bytes and idle draw chosen so that a full bf16 product draws about the TDP; an estimate"),
    ),
)  # fmt: skip

H200 = replace(
    H100,
    name="h200_sxm",
    what="NVIDIA H200-SXM-141GB",
    hbm_bytes=141 * 10**9,
    hbm_bytes_per_s=4.8e12,
    reasons=(*H100.reasons, ("hbm_bytes_per_s", "data sheet; all else, constants included, is H100's: the same die")),
)

B200 = replace(
    H100,
    name="b200_sxm",
    what="NVIDIA B200-SXM-180GB",
    cores=148,
    clock_hz=1.85e9,
    macs=(("bf16", 4096), ("f16", 4096), ("e4m3", 8192), ("int8", 8192), ("e2m1", 16384), ("f32", 128)),
    tiles=tuple(sorted({*NVJET_TILES, (256, 224), (224, 256), (256, 256)})),
    shared_bytes=126 * 10**6,
    shared_bytes_per_cycle=20480,
    hbm_bytes=180 * 10**9,
    hbm_bytes_per_s=8.0e12,
    links=Links(count=18, bytes_per_s=50e9, topology="switch", most=8),
    tdp_w=1000.0,
    energy=Energy(mac=0.36e-12, hbm_byte=30e-12, shared_byte=6e-12, link_byte=40e-12, idle_w=140.0),
    reasons=(
        ("cores", "148 SMs on two dies"),
        ("clock_hz", "the clock at which the sheet's 2.25 PFLOP/s bf16 dense = 148 * 4096 * 2 * 1.85e9"),
        ("shared_bytes_per_cycle", "two dies, each with H100's"),
        ("constants", "H100's: the next generation of the same design, judged without a measurement of its own"),
    ),
)

GB200 = replace(
    B200,
    name="gb200",
    what="NVIDIA GB200, one of its B200 dies pairs",
    clock_hz=2.06e9,
    hbm_bytes=186 * 10**9,
    links=Links(count=18, bytes_per_s=50e9, topology="switch", most=72),
    tdp_w=1200.0,
    reasons=(*B200.reasons[:1], ("clock_hz", "the clock at which 2.5 PFLOP/s bf16 dense come out"),
             ("links", "NVL72: one switched network of 72"), ("constants", "H100's, as for b200_sxm")),
)  # fmt: skip

L40S = replace(
    A100,
    name="l40s",
    what="NVIDIA L40S-48GB",
    cores=142,
    clock_hz=2.49e9,
    macs=(("bf16", 512), ("f16", 512), ("e4m3", 1024), ("int8", 1024), ("int4", 2048), ("f32", 128)),
    sram_bytes=99 * KIB,
    vec_lanes=128,
    shared_bytes=96 * 10**6,
    shared_bytes_per_cycle=4608,
    hbm_bytes=48 * 10**9,
    hbm_bytes_per_s=864e9,
    links=Links(count=1, bytes_per_s=32e9, topology="switch", most=8),
    tdp_w=350.0,
    energy=Energy(mac=0.75e-12, hbm_byte=60e-12, shared_byte=8e-12, link_byte=150e-12, idle_w=40.0),
    tiles=tuple(t for t in GPU_TILES if sum(t) <= 256),
    reasons=(
        ("cores", "142 SMs (NVIDIA L40S data sheet, 2023)"),
        ("clock_hz", "boost clock, at which 362 TFLOP/s bf16 dense come out"),
        ("links", "PCIe 4.0 x16; there is no NVLink"),
        ("shared_bytes_per_cycle", "48 slices of 96 bytes: A100's per slice"),
        ("constants", "A100's: the same kind of SM (operands through registers), judged without a measurement"),
    ),
)

TPU_V5E = ChipSpec(
    name="tpu_v5e",
    what="Google TPU v5e",
    cores=1,
    clock_hz=1.5e9,
    macs=(("bf16", 4 * 128 * 128), ("int8", 8 * 128 * 128), ("f32", 128 * 128 // 2)),
    array=(8, 128, 128),
    tiles=((8, 512), (32, 512), (128, 512), (256, 512), (512, 512), (512, 1024), (1024, 1024)),
    depth=256,
    sram_bytes=128 * MIB,
    sram_bytes_per_cycle=4096,
    acc_bytes=4 * MIB,
    vec_lanes=4 * 1024,
    exp_lanes=1024,
    att_lanes=0,
    port_bytes_per_cycle=4096,
    shared_bytes=0,
    shared_bytes_per_cycle=4096,
    hbm_bytes=16 * GIB,
    hbm_bytes_per_s=819e9,
    links=Links(count=4, bytes_per_s=50e9, topology="torus", most=256),
    tdp_w=220.0,
    energy=Energy(mac=0.7e-12, hbm_byte=45e-12, shared_byte=5e-12, link_byte=30e-12, idle_w=60.0),
    constants=change(
        A100.constants, launch_s=1.0e-6, latency_s=1.0e-6, hbm_share=0.92, shared_share=1.0, mxu_share=0.95
    ),
    row_cycles=4,
    persistent=True,
    prefetch=True,
    reasons=(
        ("macs", "four 128x128 arrays: 197 TFLOP/s bf16, 393 int8 (Google Cloud, TPU v5e)"),
        ("links", "1,600 Gbit/s of ICI a chip over four neighbours"),
        ("tdp_w", "not published; an estimate"),
        ("constants", "A100's for vector and link shares; a stream compiled ahead has no kernel launch but a fence of "
                      "about 1 us, and large contiguous DMA reaches 0.92 of HBM; unmeasured"),
    ),
)  # fmt: skip

TPU_V6E = replace(
    TPU_V5E,
    name="tpu_v6e",
    what="Google TPU v6e (Trillium)",
    clock_hz=1.75e9,
    macs=(("bf16", 4 * 256 * 256), ("int8", 8 * 256 * 256), ("f32", 256 * 256 // 2)),
    array=(8, 256, 256),
    depth=512,
    sram_bytes_per_cycle=8192,
    hbm_bytes=32 * GIB,
    hbm_bytes_per_s=1.64e12,
    links=Links(count=4, bytes_per_s=112e9, topology="torus", most=256),
    tdp_w=300.0,
    reasons=(
        ("macs", "256x256 arrays: 918 TFLOP/s bf16, 1,836 int8 (Google Cloud, TPU v6e)"),
        ("links", "3,584 Gbit/s of ICI a chip over four neighbours"),
        *TPU_V5E.reasons[2:],
    ),
)

SOHU = ChipSpec(
    name="sohu",
    what="what the public claim of 25 June 2024 requires: a reconstruction by arithmetic, not a known design",
    cores=16,
    clock_hz=1.2e9,
    macs=(("e4m3", 512 * 512), ("int8", 512 * 512), ("bf16", 512 * 256), ("e2m1", 2 * 512 * 512), ("f32", 512 * 64)),
    array=(1, 128, 128),
    tiles=((16, 512), (64, 512), (128, 512), (256, 512), (512, 512), (512, 1024)),
    depth=640,
    sram_bytes=4 * MIB,
    sram_bytes_per_cycle=2048,
    acc_bytes=2 * MIB,
    vec_lanes=512,
    exp_lanes=64,
    att_lanes=512,
    flash=3,
    port_bytes_per_cycle=1024,
    shared_bytes=128 * MIB,
    shared_bytes_per_cycle=16 * 1024,
    hbm_bytes=144 * 10**9,
    hbm_bytes_per_s=6.0e12,
    links=Links(count=4, bytes_per_s=256e9, topology="k44", most=8),
    tdp_w=1200.0,
    energy=Energy(mac=0.12e-12, hbm_byte=30e-12, shared_byte=3e-12, link_byte=15e-12, idle_w=100.0),
    constants=Constants(
        launch_s=0.3e-6, latency_s=0.6e-6, hbm_share=0.92, shared_share=0.9, mxu_share=0.97, gather_share=0.9,
        meet_s=0.3e-6, hop_s=1.0e-6,
    ),
    row_cycles=4,
    persistent=True,
    prefetch=True,
    reasons=(
        ("macs", "500,000 tokens/s in and out on Llama-3-70B need 8.74 PFLOP/s a chip; 16 arrays of 512x512 at 1.2 GHz "
                 "give 10.07 in FP8, so the claim needs 86.8 % of them"),
        ("array", "each array splits into sixteen of 128x128, so that short dependent products fill it"),
        ("hbm_bytes", "144 GB of HBM3E, as claimed"),
        ("hbm_bytes_per_s", "six stacks at 8 Gbit/s a pin; the claim's batch needs 3.3 to 4.5 TB/s"),
        ("sram_bytes", "five stages of a 512x1024 product in FP8; 64 MiB over all cores"),
        ("shared_bytes", "rows of a mixed step (2,175 of 28,672 in FP8: 62 MB) stay on the chip, and weights ahead"),
        ("sram_bytes_per_cycle", "512 rows and 512 columns of FP8 a cycle into the array, as much written meanwhile"),
        ("acc_bytes", "two banks of 512x512 in FP32"),
        ("exp_lanes", "17 exponentials a core and cycle are needed for Llama; a power of two well above"),
        ("att_lanes", "a fused attention engine that takes one 512-wide row of scores a cycle"),
        ("links", "UCIe-class, 64 lanes at 32 GT/s: 256 GB/s a link and direction; four links, two sides of four"),
        ("constants", "shares of a statically scheduled machine, near the best of the measured parts; the launch is a "
                      "fence of the sequencer; none was chosen to hit the claim"),
        ("tdp_w", "0.12 pJ a MAC at 8.7 PFLOP/s and 4 TB/s: about 1.2 kW"),
    ),
)  # fmt: skip

CHIPS = {c.name: c for c in (SOHU, A100, H100, H200, B200, GB200, L40S, TPU_V5E, TPU_V6E)}


def chip(name: str) -> ChipSpec:
    """The preset called `name`. Raises ChipError naming those there are."""
    if name not in CHIPS:
        raise ChipError(f"no chip called {name!r}; there are {', '.join(CHIPS)}")
    return CHIPS[name]
