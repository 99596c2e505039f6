"""Decoder: the description of a model, which ports fill in and write.py turns into a Program."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from intaglio.models.config import Config, PortError
from intaglio.models.decoder.mixers import Mixer
from intaglio.models.decoder.rope import Table, parameters, table

# Norms of a layer: site -> name in checkpoints. Families use the same name for different norms.
PRE = {"attn.norm": "input_layernorm", "mlp.norm": "post_attention_layernorm"}
POST = {"attn.post_norm": "post_attention_layernorm", "mlp.post_norm": "post_feedforward_layernorm"}
SANDWICH = {"attn.norm": "input_layernorm", "mlp.norm": "pre_feedforward_layernorm", **POST}
ONE = {"attn.norm": "input_layernorm"}
GLM = {
    "attn.norm": "input_layernorm", "attn.post_norm": "post_self_attn_layernorm",
    "mlp.norm": "post_attention_layernorm", "mlp.post_norm": "post_mlp_layernorm",
}  # fmt: skip
SUM = {"attn.add_norm": "attention_norm", "mlp.add_norm": "mlp_norm"}  # after each residual addition (2017)
BEFORE = {"attn.norm": "attention_norm", "mlp.norm": "mlp_norm"}  # before each branch
# Sources of the experts' gate, up and down, in the notation of program/source.py.
NAMED = ("experts.{run}.gate_proj.weight", "experts.{run}.up_proj.weight", "experts.{run}.down_proj.weight")
NAMED_BIASES = ("experts.gate_proj_bias", "experts.up_proj_bias", "experts.down_proj_bias")
UNGATED = ("", "experts.{run}.up_proj.weight", "experts.{run}.down_proj.weight")
NUMBERED = ("experts.{run}.w1.weight", "experts.{run}.w3.weight", "experts.{run}.w2.weight")
STACKED = ("experts.gate_up_proj|r0:{i}/{2i}", "experts.gate_up_proj|r{i}:{2i}/{2i}", "experts.down_proj")
UNGATED_STACKED = ("", "experts.up_proj", "experts.down_proj")
TRANSPOSED = ("experts.gate_up_proj|T|r0:{i}/{2i}", "experts.gate_up_proj|T|r{i}:{2i}/{2i}", "experts.down_proj|T")


@dataclass(frozen=True)
class Layer:
    """Description of one layer of a Decoder: the properties in which layers may differ.

    Attributes:
        rope: name of the rope table; "": no rope.
        window: attention window in tokens; 0: full attention.
        chunk: length in tokens of the chunks of positions; a query attends only to its own chunk. 0: no chunks.
        sparse: True if the MLP is a mixture of experts.
        scale: factor by which the Decoder's attention scale is multiplied.
        o_bias: True if o_proj has a bias in this layer even if the Decoder's o_bias is False.
        kv_heads: heads of keys and values; 0: as many as the Decoder says.
        head_dim: columns of a head; 0: as many as the Decoder says.
        values_are_keys: True if there is no projection of values: the keys, before norm and rope, are also the values.
        sinks: True if this layer has attention sinks; used only if the Decoder's `sinks` is set.
        without: names of norms, such as attn.norm, that this layer does not have.
        width: inner width of the dense MLP; 0: the Decoder's `intermediate`.
        mixer: description of a recurrent block or short convolution that the layer has instead of attention; None:
            attention.
        beside: True if the layer has attention beside the mixer, and their results are added (Falcon-H1).
        attention: True if the layer has attention or a mixer.
        mlp: True if the layer has an MLP or experts.
        mix: two factors. The residual is multiplied by the first, attention's result by the second, before the two are
            added.
        shares_index: True if this layer's sparse attention has no indexer (see Latent). It uses the positions chosen by
            the nearest earlier layer with an indexer.
        cache_of: number of the earlier layer whose keys and values this layer reads; None: it has its own.
        sparsity: fraction of the MLP's gate values to set to 0 in each row (Gemma 3n); 0: none. Values below mean + n *
            (standard deviation of the row) become 0, where n is the standard normal quantile of the fraction.
        pooled: number of consecutive tokens (a run) that compressed attention pools into one key, called an entry; 0:
            no entries, only the window.
        indexed: True if each run is pooled together with the run before it, and an indexer chooses the entries (see
            Compressed).
        hashed: True if a table says which experts each token id goes to (see Mixture.table).
        shared: (owner, use) if the layer runs a shared block before its mixer (Zamba, see Decoder.shared), else None.
            owner: number of the layer under whose names the checkpoint stores the block's weights. use: number of
            earlier layers that run a shared block; it selects this layer's adapters.
    """

    rope: str = "rope"
    window: int = 0
    chunk: int = 0
    sparse: bool = False
    scale: float = 1.0
    o_bias: bool = False
    kv_heads: int = 0
    head_dim: int = 0
    values_are_keys: bool = False
    sinks: bool = True
    without: tuple[str, ...] = ()
    width: int = 0
    mixer: Mixer | None = None
    beside: bool = False
    attention: bool = True
    mlp: bool = True
    mix: tuple[float, float] = (1.0, 1.0)
    shares_index: bool = False
    cache_of: int | None = None
    sparsity: float = 0.0
    pooled: int = 0
    indexed: bool = False
    hashed: bool = False
    shared: tuple[int, int] | None = None


@dataclass(frozen=True, kw_only=True)
class Shared:
    """Description of a block whose weights several layers share (Zamba, Zamba2).

    The block is attention and an MLP, without residuals. The input of the block is the layer's input and the
    embeddings, side by side: 2 * hidden columns. The block's result goes through a linear layer that each layer has for
    itself, and is added to the layer's input. The sum is the input of the layer's mixer.

    Attributes:
        block: name of the block's module in a layer of the checkpoint.
        rank: rank of the low-rank adapters (LoRA) that each layer adds to the MLP; 0: none.
        qkv_rank: rank of the adapters that each layer adds to the projections of queries, keys and values; 0: none.
        bias: True if the MLP's linear layers have biases.
        fused: True if the checkpoint stores the MLP's gate and up projections as one module, gate_up_proj; False if as
            gate_proj and up_proj.
    """

    block: str
    rank: int = 0
    qkv_rank: int = 0
    bias: bool = False
    fused: bool = True


@dataclass(frozen=True)
class AltUp:
    """Sizes of AltUp (Baykal et al. 2023).

    There are several residual streams, of which a layer computes one and predicts the others.

    Attributes:
        streams: number of streams.
        active: number, from 0, of the stream that layers compute.
        scaled: True if the active stream is multiplied by learned factors before the branch of per-layer inputs.
    """

    streams: int
    active: int = 0
    scaled: bool = True


@dataclass(frozen=True)
class Indexer:
    """Sizes of the indexer of sparse attention (DeepSeek-V3.2), which chooses the positions that each query attends to.

    Attributes:
        heads: number of the indexer's heads.
        head_dim: columns of a head. Rope rotates its first columns, as many as the layer's rope table covers.
        top: number of positions chosen for each query.
        style: how rope pairs columns, "half" or "interleaved".
    """

    heads: int
    head_dim: int
    top: int
    style: str = "half"


@dataclass(frozen=True)
class Latent:
    """Sizes of multi-head latent attention (DeepSeek-V2).

    Attributes:
        q_rank: columns of the compressed query; 0: queries are not compressed.
        rank: columns of the K/V latent.
        nope: columns of a head that rope does not rotate.
        rope: columns of a head that rope rotates.
        value: columns of a head's value.
        eps: epsilon of the norms of the latents.
        indexer: sizes of the indexer that chooses the positions that queries attend to; None: queries attend to all
            positions. An indexer needs compressed queries.
    """

    q_rank: int
    rank: int
    nope: int
    rope: int
    value: int
    eps: float = 1e-6
    indexer: Indexer | None = None


@dataclass(frozen=True)
class Compressed:
    """Sizes of compressed attention (DeepSeek-V4). Its other sizes are in Decoder and Layer.

    Attributes:
        q_rank: columns of the compressed query.
        groups: number of groups of heads. Before the output projection, the results of each group's heads are projected
            together.
        rank: columns of that projection's result, per group.
        indexer: sizes of the indexer that layers with Layer.indexed have; None: no layer has one.
    """

    q_rank: int
    groups: int
    rank: int
    indexer: Indexer | None = None


@dataclass(frozen=True)
class Hyper:
    """Sizes of hyper-connections (DeepSeek-V4), see hyper.py: several residual streams, mixed by matrices.

    Attributes:
        streams: number of streams.
        iterations: number of times that the columns of a mixing matrix are normalised; its rows are normalised in
            between.
        eps: a small number that is added to the sums by which the matrix is divided, and to the weights of a block's
            input.
        head: beginning of the checkpoint's names of the weights that join the streams before the output head.
    """

    streams: int
    iterations: int
    eps: float
    head: str = "hc_head"


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """Description of a mixture of experts: sizes of experts and router, and names of their tensors in the checkpoint.

    Attributes:
        count: number of experts.
        top: experts per token.
        width: inner width of an expert.
        sources: templates for source(): where the checkpoint has the weights of gate, up and down. The first is "" if
            experts have no gate; an expert then computes down(activation(up(x))).
        biases: templates for source(): where the checkpoint has the biases of gate, up and down; None: no biases.
        block: name of the module that holds the experts.
        router: name of the router's linear layer.
        router_bias: True if the router has a bias.
        correction: name of a bias that is added to the router's scores when experts are chosen, but not to their
            weights; "": none.
        correction_optional: True if a checkpoint may lack that bias, which is then 0.
        table: name of the table that lists the experts of each token id, for layers with Layer.hashed; these have no
            correction.
        route: further attributes of the op Route, by name.
        glu: further attributes of the op Experts, by name, such as the limits of the gated activation.
        shared: inner width of the shared expert, which takes every token; 0: none.
        shared_source: name of the shared expert's module.
        shared_gate: name of a linear layer; the shared expert's result is multiplied by the sigmoid of its output. "":
            none.
        shared_bias: True if the shared expert's linear layers have biases.
        join: expression for the op Map that joins the result of the routed experts (a) and the result of the shared
            expert (b). Not used if shared_gate is set: then the expression is a + b * sigmoid(gate).
        latent: columns of the routed experts' input and result. The linear layer fc1_latent_proj projects x to this
            width, and fc2_latent_proj projects the experts' result back to `hidden` columns. 0: no such projections;
            the experts read x.
        latent_bias: True if these two projections have biases.
        factors: name of a vector [count] by which the router's weights of chosen experts are multiplied; "": none.
        beside: True if layers with experts have the dense MLP too. The results of both are normed and added. The
            experts read the residual through a norm of their own. The router reads the residual normed with the weight
            `router_scale` and divided by sqrt(hidden).
        router_scale: name of the weight of the router's norm; used only if `beside` is set.
    """

    count: int
    top: int
    width: int
    sources: tuple[str, str, str]
    biases: tuple[str, str, str] | None = None
    block: str = "mlp"
    router: str = "gate"
    router_bias: bool = False
    correction: str = ""
    correction_optional: bool = False
    table: str = ""
    route: Mapping[str, Any] = field(default_factory=dict)
    glu: Mapping[str, Any] = field(default_factory=dict)
    shared: int = 0
    shared_source: str = "shared_experts"
    shared_gate: str = ""
    shared_bias: bool = False
    join: str = "a + b"  # how the results of the routed experts (a) and of the shared one (b) are joined
    latent: int = 0
    latent_bias: bool = False
    factors: str = ""
    beside: bool = False
    router_scale: str = ""

    def source(self, template: str) -> str:
        """The place of the experts' weights in the checkpoint, as text: tensor names and, where needed, slices.

        program/source.py explains the notation. The result is `template` with its marks replaced. `{run}` becomes the
        range of expert numbers, such as `{0..7}`. `{i}` becomes the inner width of an expert and `{2i}` twice that
        width; they bound slices in checkpoints that store gate and up in one tensor.

        template: an element of `sources` or `biases`, such as "experts.{run}.up_proj.weight".
        """
        run = f"{{0..{self.count - 1}}}"
        return template.replace("{run}", run).replace("{i}", str(self.width)).replace("{2i}", str(2 * self.width))


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """Description of a decoder-only transformer as plain data. write() makes a Program from it.

    Sizes are numbers of columns or heads; `context` is in tokens. A softcap of 0 means none. Most attributes are
    explained by a comment in the code, the others here.

    Attributes:
        norms: {name of a layer's norm in the Program, such as attn.norm: name of its module in a layer of the
            checkpoint}; see PRE.
        qk_norm: how queries and keys are normed: "" (no norm), "head" (each head), "late" (each head, after rope),
            "flat" (all heads as one row) or "unit" (each head after rope, without a weight, only in layers with rope).
        temper: growth of the attention scale with the query's position (see Attend.temper, also for temper_every and
            temper_from); 0: none. It applies to layers without rope or, with temper_all, to all layers.
        sources: how the checkpoint's names of tensors differ from Llama's: {part of the name in Llama: the same part in
            the checkpoint}. A part is one or more whole segments between dots, such as `mlp.up_proj`. If the tensor is
            stored in another form, the value is a source in the notation of program/source.py. The replacements are
            applied in order.
    """

    vocabulary: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    context: int
    layers: tuple[Layer, ...]
    ropes: Mapping[str, Table]
    activation: str  # a function of the op Map, or xielu
    eps: float
    tied: bool
    scale: float
    norms: Mapping[str, str]
    # attention and MLP read the same residual and are added to it; without a norm "mlp.norm" the MLP reads attention's
    parallel: bool = False
    norm: str = "rms"
    norm_offset: float = 0.0
    norm_weight: bool = True
    qk_norm: str = ""
    clip_qkv: float = 0.0  # queries, keys and values are clipped to +- this; 0: not
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    gated: bool = True  # False: down(activation(up(x)))
    fused: tuple[str, ...] = ()  # qkv_proj and gate_up_proj, if the checkpoint stores them as one tensor
    norm_bias: bool = False
    head_dense: int = 0  # width of head_dense, which with activation and norm (head_norm) is before the head; 0: none
    head_dense_bias: bool = True
    head_activation: str = ""  # that activation, if it is not the MLP's
    head_bias: bool = False
    sinks: bool = False
    alibi: tuple[float, ...] = ()  # the slope of each head's linear bias by distance; (): none
    value_dim: int = 0  # columns of a head's values, if it is not head_dim
    value_scale: float = 1.0
    value_norm: bool = False  # each head of the values is normed, without a weight
    temper: float = 0.0
    temper_every: int = 1
    temper_from: int = 1
    temper_all: bool = False  # layers with rope temper their queries too
    mixture: Mixture | None = None
    latent: Latent | None = None
    differential: bool = False  # attention is the difference of two softmaxes (DiffLlama)
    compressed: Compressed | None = None
    hyper: Hyper | None = None
    block: str = "mlp"  # name of the module of the dense MLP
    attn_softcap: float = 0.0
    final_softcap: float = 0.0
    root_scaled: bool = False  # embeddings are multiplied by sqrt(hidden), rounded to the embedding's format
    embed_scale: float = 1.0
    positions: int = 0  # rows of a learned table of positions, embed_positions, added to the embeddings; 0: none
    sinusoid: tuple[float, ...] = ()  # frequencies of sines and cosines added to the embeddings instead of such a table
    sinusoid_first: int = 0  # their number for position 0
    token_types: int = 0  # rows of a table embed_types, whose row 0 is added to the embeddings; 0: none
    embed_width: int = 0  # columns of the embedding, which embed_proj brings to `hidden`; 0: it has that many
    embed_bias: bool = True  # embed_proj has a bias
    embed_norm: str = ""  # the module of a norm of the embeddings
    embed_norm_first: bool = False  # it comes before positions are added, not after
    per_layer: int = 0  # columns of a second embedding, embed_tokens_per_layer, that each layer has of its own; 0: none
    per_layer_rows: int = 0  # rows of that table
    shared: Shared | None = None  # the block that layers with Layer.shared have before their mixer
    altup: AltUp | None = None  # several residual streams; needs per_layer
    laurel: int = 0  # rank of a linear shortcut beside attention, which is added to its result (LAuReL); 0: none
    layer_scalar: bool = False  # each layer's result is multiplied by the one value of layer_scalar
    attn_gate: str = ""  # the linear whose sigmoid multiplies the attention's result, before o_proj
    attn_gate_by_head: bool = False  # it has one value for each head
    attn_scale: float = 1.0  # on attention's result beside a mixer
    mixer_scale: float = 1.0  # on the mixer's result beside attention
    glu_limit: float = 0.0  # caps the gate of MLPs, and their up-projection to +- this; 0: not
    gate_scale: float = 1.0  # on the gate of the MLP, before the activation
    mlp_scale: float = 1.0  # on the MLP's result
    mlp_mix: tuple[float, float] = (1.0, 1.0)  # factors on the residual and on the MLP's result where they are added
    normed_residual: bool = False  # the residual is what the norm before attention, or before the MLP, yields
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    prefix: str = "model."
    cache: str = ""  # format of the K/V cache; "": f32 if the embedding is, else bf16
    # scales of an E4M3 cache's keys and values by layer: one, or one per K/V head
    cache_scales: Mapping[int, tuple[tuple[float, ...], tuple[float, ...]]] = field(default_factory=dict)
    table: str = ""  # the module that holds the embedding, if it is not embed_tokens
    final_norm: str = "norm"  # the module of the norm before the head; empty: none
    head: str = ""  # the module of the head, if it is not lm_head beside the inner model
    sources: Mapping[str, str] = field(default_factory=dict)

    def source(self, name: str) -> str:
        """The checkpoint's name for a tensor or module, made from the name that it has in Llama.

        The replacements in `sources` are applied in order; if none of them applies, the result is `name`. For a tensor
        stored in another form, the result also says how to cut it out, such as "c_attn.weight|r0:1/3" (notation of
        program/source.py). Whether the checkpoint has the tensor is not checked.
        """
        for part, found in self.sources.items():
            name = re.sub(rf"(?<![^.]){re.escape(part)}(?![^.])", found.replace("\\", r"\\"), name, count=1)
        return name

    @property
    def head_source(self) -> str:
        """The name of the output head's module in the checkpoint, such as lm_head.

        If the head is tied to the embedding, the checkpoint may have no such module.
        """
        outer = "" if self.prefix.startswith("model.") else self.prefix.removesuffix("model.")
        return self.head or outer + "lm_head"


def sizes(c: Config, act: str = "hidden_act", eps: str = "rms_norm_eps") -> dict[str, Any]:
    """Read arguments of Decoder from the keys of config.json that most model families use. Returns {argument: value}.

    Args:
        c: the config.
        act: the key that names the activation function.
        eps: the key with the epsilon of the norms.

    Raises PortError for a missing or wrong value, if num_attention_heads is not a multiple of num_key_value_heads, and
    if head_dim is missing and hidden_size is not a multiple of num_attention_heads.
    """
    hidden, heads = c.whole("hidden_size"), c.whole("num_attention_heads")
    kv_heads = c.whole("num_key_value_heads", heads)
    if heads % kv_heads:
        raise PortError(f"config.json: num_attention_heads={heads} is not a multiple of num_key_value_heads={kv_heads}")
    if c.get("head_dim") is None and hidden % heads:
        raise PortError(
            f"config.json: hidden_size={hidden} is not a multiple of num_attention_heads={heads}; give head_dim"
        )
    head_dim = c.whole("head_dim", hidden // heads)
    return {
        "vocabulary": c.whole("vocab_size"),
        "hidden": hidden,
        "intermediate": c.whole("intermediate_size"),
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "context": c.whole("max_position_embeddings"),
        "activation": c.activation(act),
        "eps": c.real(eps),
        "tied": c.flag("tie_word_embeddings"),
        "scale": head_dim**-0.5,
    }


def layer_norm_sizes(c: Config, eps: str) -> dict[str, Any]:
    """Returns {argument: value}, arguments of Decoder for models like GPT-2.

    These models have LayerNorms, biases, an MLP without a gate, and no rope. They have as many K/V heads as query
    heads, and hidden_size / heads columns per head. The keys num_key_value_heads and head_dim are therefore set to None
    in `c`. Raises PortError for a missing or wrong value.

    Args:
        c: the config, which is changed.
        eps: the key with the epsilon of the norms.
    """
    c.table |= {"num_key_value_heads": None, "head_dim": None}
    return sizes(c, eps=eps) | {
        "norm": "layer", "norm_bias": True, "gated": False, "ropes": {}, "qkv_bias": True, "o_bias": True,
        "mlp_bias": True, "layers": (Layer(""),) * c.whole("num_hidden_layers"),
    }  # fmt: skip


def window(c: Config, kind: str) -> int:
    """The attention window of a layer of the type `kind`, in tokens; 0 means full attention.

    For the type sliding_attention it is the config's sliding_window, for every other type 0. Raises PortError if it is
    needed and missing.
    """
    return c.whole("sliding_window") if kind == "sliding_attention" else 0


def uniform_layers(c: Config, s: Mapping[str, Any], context: int) -> dict[str, Any]:
    """The arguments `layers` and `ropes` of Decoder for a model with a single rope table, as a dict.

    All layers use this table. `layers` is a tuple of Layers; a layer has an attention window if the config's key
    layer_types says so. `ropes` is {"rope": the rope table}. Raises PortError for settings that are not supported.

    Args:
        c: the config.
        s: arguments of Decoder that sizes() returned; only head_dim is read.
        context: maximum tokens of a sequence.
    """
    ropes = {"rope": table(c, parameters(c), s["head_dim"], context)}
    return {"ropes": ropes, "layers": tuple(Layer(window=window(c, kind)) for kind in c.layer_types())}


def sparse(d: Decoder, where: Callable[[int], bool] = lambda i: True) -> Decoder:
    """A copy of the Decoder `d`: layer `i` has a mixture of experts if `where(i)` is true, else a dense MLP."""
    return replace(d, layers=tuple(replace(layer, sparse=where(i)) for i, layer in enumerate(d.layers)))
