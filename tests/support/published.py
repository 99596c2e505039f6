"""Quantised checkpoints written from plain ones, their logits, and the median error that tests of formats compare."""

from __future__ import annotations

import json
import shutil

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from support.tiny import error, truth

from intaglio.batch import Chunk, bind
from intaglio.compiler import build, build_mesh
from intaglio.devices import MeshDevice, StateSpec, StepRequest, open_device
from intaglio.formats import Quantised
from intaglio.models import Checkpoint, account, port
from intaglio.program.source import read

SIZES = {"hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 2}


def logits(path, device, program=None, weights="auto", tokens=range(40)):
    c = Checkpoint.open(path)
    program = program or build(port(c, c.config.get("max_position_embeddings")), weights)
    state = StateSpec(4, 16, 2 * program.recurrent)
    chunk = Chunk(tokens, 0, range(4), range(len(tokens)), state=state.pair(0, 0))
    return open_device(device).load(program, c, state).step(StepRequest(bind([chunk], 16), logits=True)).logits


def typical(ours, wanted):
    """The median over tokens of ||ours - wanted|| / ||wanted||: those that go to another expert differ more."""
    gaps = np.linalg.norm(ours - wanted, axis=1) / np.linalg.norm(wanted, axis=1)
    return float(np.median(gaps))


def words(codes, order=range(8), less=0):
    """[.., 8 n] codes 0..15 as [.., n] int32, nibble i holding column order[i] of its eight, or with an order of four
    codes 0..255; each word less so much, modulo 2^32."""
    parts = codes.to(torch.int64).reshape(*codes.shape[:-1], -1, len(order))
    total = (sum(parts[..., column] << (32 // len(order) * i) for i, column in enumerate(order)) - less) % (1 << 32)
    return torch.where(total >= 1 << 31, total - (1 << 32), total).to(torch.int32)


def with_zeros(w, group, most=15):
    """(codes 0..most [N, K], scales f16 [N, G], zeros 0..most [N, G], values)."""
    n, k = w.shape
    groups = w.reshape(n, -1, group)
    low, high = groups.amin(dim=2).clamp(max=0), groups.amax(dim=2).clamp(min=0)
    scale = ((high - low) / most).half()
    zero = (-low / scale.float()).round().clamp(0, most)
    codes = (groups / scale.float()[..., None] + zero[..., None]).round().clamp(0, most)
    return codes.reshape(n, k), scale, zero, ((codes - zero[..., None]) * scale.float()[..., None]).reshape(n, k)


def quantised(path, folder, encode, config):
    """(checkpoint with the matrices of its layers encoded, the same dequantised, what each matrix stands for)."""
    arrays = load_file(path / "model.safetensors")
    coded, plain, values = {}, {}, {}
    for name, w in arrays.items():
        if w.dim() != 2 or "embed" in name or "lm_head" in name or ".gate.weight" in name:
            coded[name] = plain[name] = w
            continue
        parts, back = encode(w.float(), name)
        coded |= {f"{name.removesuffix('weight')}{part}": x.contiguous() for part, x in parts.items()}
        plain[name] = values[name] = back.to(w.dtype).contiguous()
    table = json.loads((path / "config.json").read_text())
    for sub, tensors, more in (("coded", coded, {"quantization_config": config}), ("plain", plain, {})):
        shutil.copytree(path, folder / sub)
        save_file(tensors, folder / sub / "model.safetensors")
        (folder / sub / "config.json").write_text(json.dumps({**table, **more}))
    return folder / "coded", folder / "plain", values


def in_place(c, name):
    """The values of a matrix, its columns where they belong."""
    got = c.read(name)
    assert isinstance(got, Quantised)
    rows, order = got.rows(slice(None)), c.order(name)
    return got.format, rows[:, np.argsort(c.read(order))] if order else rows


def hold(coded, plain, values, limit, formats=None, rounding=0.0, lanes="tp2", cancel=2.0**-16):
    """A published checkpoint against its dequantised twin.

    Values within `rounding` (relative, and `cancel` times it of the largest, as sums cancel) and, if given, in one of
    `formats`; logits within `limit` on the reference, the host and a mesh of lanes, whose columns have the values of
    the whole; every tensor of the files in the account once.
    """
    c = Checkpoint.open(coded)
    program = port(c)
    for name, want in values.items():
        got = c.read(name)
        held = got.rows(slice(None)) if isinstance(got, Quantised) else got.astype(np.float32)
        want = want.float().numpy()
        assert np.all(np.abs(held - want) <= rounding * (np.abs(want) + cancel * np.abs(want).max())), name
        assert not formats or c.format(name) in formats
    wanted = truth(plain, list(range(40)))
    for device in ("reference", "host"):
        assert error(logits(coded, device), wanted) < limit
    mesh = build_mesh(program, lanes)
    for name in ("layers.0.self_attn.o_proj.weight", "layers.1.mlp.down_proj.weight"):
        own = name.replace("self_attn", "attn")
        if own in mesh.programs[0].tensors and f"model.{name}" in values:
            pieces = [x for p in mesh.programs for s in p.tensors[own].source for _, x in read(s, c.read)]
            rows = [x.rows(slice(None)) if isinstance(x, Quantised) else x.astype(np.float32) for x in pieces]
            whole = c.read(f"model.{name}")
            whole = whole.rows(slice(None)) if isinstance(whole, Quantised) else whole.astype(np.float32)
            np.testing.assert_array_equal(np.concatenate(rows, axis=1), whole)
    ex = MeshDevice(open_device("host")).load(mesh, c, StateSpec(4, 16))
    step = StepRequest(bind([Chunk(range(40), 0, range(4), range(40))], 16), logits=True)
    assert error(ex.step(step).logits, wanted) < limit
    listed = [t.name for t in account(coded).tensors]
    assert len(listed) == len(set(listed)) and set(listed) == set(load_file(coded / "model.safetensors"))
