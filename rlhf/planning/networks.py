"""A network as counts: its matrices, vectors and tables, read from a model's `shape`.

Counts are exact: `tests/planning/test_network_sizes.py` compares them with `parameters` of every file in conf/model. Knows families and their
config keywords; knows no engine. D hidden, H heads, K key/value heads, F intermediate, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from rlhf.config import UserError, nearest
from rlhf.settings import ModelConfig


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """A linear layer."""

    name: str
    rows: int
    """Outputs."""
    columns: int
    """Inputs."""
    bias: bool
    copied: bool = False
    """The decoder holds a copy of its own even where training keeps the whole matrix: rows are fused or reordered
    (rlhf/inference/weights.py)."""

    @property
    def weights(self) -> int:
        return self.rows * self.columns

    @property
    def count(self) -> int:
        return self.weights + (self.rows if self.bias else 0)

    def adapter(self, rank: int) -> int:
        """Parameters of a LoRA pair."""
        return rank * (self.rows + self.columns)


@dataclass(frozen=True, kw_only=True)
class Network:
    """A decoder-only transformer, as far as memory and time care."""

    family: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    embed_width: int
    """Of the token table, and of what the backbone gives."""
    matrices: tuple[Matrix, ...]
    """Of one layer."""
    norms: int
    """Elements of one layer's norms."""
    tables: tuple[int, ...]
    """Elements of the token table, then of the position table if there is one."""
    projections: tuple[Matrix, ...]
    """Between the table and the layers (OPT-350M)."""
    outside: int
    """Elements of norms outside the layers."""
    head: Matrix | None
    """None: tied to the token table."""
    rms: bool
    activation: Literal["relu", "gelu", "gelu_new", "gelu_fused", "gated"]
    fused_attention: bool
    """transformers has a kernel that keeps no T x T matrix for it (scaled_dot_product_attention)."""
    rotates_fused: bool
    """q and k are rotated out of one product of q, k and v."""
    fast_rollout: bool
    """The hybrid engine has an entry for the family."""
    dropouts: int
    """Dropout masks of a layer, in hidden sizes, where dropout acts."""

    @property
    def layer(self) -> int:
        """Parameters of one layer."""
        return sum(matrix.count for matrix in self.matrices) + self.norms

    @property
    def backbone(self) -> int:
        return self.layers * self.layer + sum(self.tables) + sum(m.count for m in self.projections) + self.outside

    def parameters(self, kind: Literal["causal", "scalar"]) -> int:
        """A causal LM with its head, a tied one counted once; a scalar model with its bias-free row."""
        if kind == "scalar":
            return self.backbone + self.embed_width
        return self.backbone + (self.head.count if self.head else 0)

    def tensors(self, kind: Literal["causal", "scalar"]) -> int:
        """How many parameters there are as tensors: engines take time for each, however small."""
        linear = sum(n * (2 if m.bias else 1) for m, n in self.adapted)
        head = 1 if kind == "scalar" else 0 if self.head is None else 2 if self.head.bias else 1
        return linear + self.layers * self._norm_tensors(self.norms) + self._norm_tensors(self.outside) + len(self.tables) + head

    def _norm_tensors(self, elements: int) -> int:
        """Weights and biases of norms are as wide as the network, but for a pair over heads."""
        return elements // self.hidden + (2 if elements % self.hidden else 0)

    @property
    def adapted(self) -> tuple[tuple[Matrix, int], ...]:
        """What `all-linear` adapts, each with how often it occurs: all linear layers but the head."""
        return (*((m, self.layers) for m in self.matrices), *((m, 1) for m in self.projections))

    @property
    def multiplied(self) -> int:
        """Weights that every token is multiplied with in the backbone: two operations each and token."""
        return self.layers * sum(m.weights for m in self.matrices) + sum(m.weights for m in self.projections)

    @property
    def kv_width(self) -> int:
        """Elements of keys and values of one token in one layer."""
        return 2 * self.kv_heads * self.head_dim

    @property
    def largest_tensor(self) -> int:
        return max(*self.tables, *(m.weights for m in self.matrices))


Shape = Mapping[str, Any]


def network(model: ModelConfig, role: str) -> Network:
    """The counts of a role's model.

    Raises:
        UserError: the family is unknown, or a key of the shape is missing.
    """
    key = f"{role}.model"
    if model.family not in FAMILIES:
        raise UserError(
            f"{key}.family={model.family} has no known shape{nearest(model.family, FAMILIES)}: planning knows {', '.join(FAMILIES)}"
        )
    try:
        return FAMILIES[model.family](model.shape)
    except KeyError as error:
        raise UserError(f"{key}.shape.{error.args[0]} is missing, so that the size of {model.name} is not known") from error


def check_count(model: ModelConfig, role: str) -> None:
    """
    Raises:
        UserError: `parameters` contradicts the shape.
    """
    counted = network(model, role).parameters("causal")
    if model.parameters != counted:
        key = f"{role}.model"
        raise UserError(f"{key}.parameters={model.parameters} contradicts {key}.shape, which makes {counted} ({model.name})")


def _network(shape: Shape, **values: Any) -> Network:
    hidden, heads = shape["hidden_size"], shape["num_attention_heads"]
    plain = {
        "layers": shape["num_hidden_layers"], "hidden": hidden, "heads": heads, "kv_heads": heads, "head_dim": hidden // heads,
        "vocab": shape["vocab_size"], "embed_width": hidden, "projections": (), "outside": 2 * hidden, "head": None, "rms": False,
        "fused_attention": True, "rotates_fused": False, "fast_rollout": True, "dropouts": 2,
    }  # fmt: skip
    return Network(**(plain | values))


def _matrices(
    hidden: int, intermediate: int, *, bias: bool, mlp_bias: bool, separate: bool, out_bias: bool | None = None
) -> tuple[Matrix, ...]:
    """Attention with as many key as query heads, and a plain MLP.

    Args:
        separate: q, k and v are matrices of their own, which the decoder fuses.
    """
    out_bias = bias if out_bias is None else out_bias
    qkv = tuple(Matrix(name=n, rows=hidden, columns=hidden, bias=bias, copied=True) for n in ("q", "k", "v"))
    return (
        *(qkv if separate else (Matrix(name="qkv", rows=3 * hidden, columns=hidden, bias=bias),)),
        Matrix(name="out", rows=hidden, columns=hidden, bias=out_bias),
        Matrix(name="up", rows=intermediate, columns=hidden, bias=mlp_bias),
        Matrix(name="down", rows=hidden, columns=intermediate, bias=mlp_bias),
    )


def _opt(shape: Shape) -> Network:
    d, f, width, v = shape["hidden_size"], shape["ffn_dim"], shape["word_embed_proj_dim"], shape["vocab_size"]
    between = [("project_in", d, width), ("project_out", width, d)] if width != d else []
    return _network(
        shape, family="opt", intermediate=f, embed_width=width, norms=4 * d, activation=_activation(shape["activation_function"]),
        matrices=_matrices(d, f, bias=True, mlp_bias=True, separate=True),
        tables=(v * width, (shape["max_position_embeddings"] + 2) * d),
        projections=tuple(Matrix(name=n, rows=r, columns=c, bias=False) for n, r, c in between),
        outside=2 * d if shape["do_layer_norm_before"] else 0,
    )  # fmt: skip


def _gpt2(shape: Shape) -> Network:
    d, v = shape["hidden_size"], shape["vocab_size"]
    f = shape.get("n_inner") or 4 * d
    return _network(
        shape, family="gpt2", intermediate=f, norms=4 * d, activation=_activation(shape["activation_function"]),
        matrices=_matrices(d, f, bias=True, mlp_bias=True, separate=False), tables=(v * d, shape["max_position_embeddings"] * d),
    )  # fmt: skip


def _gpt_neo(shape: Shape) -> Network:
    d, v = shape["hidden_size"], shape["vocab_size"]
    f = shape.get("intermediate_size") or 4 * d
    return _network(
        shape, family="gpt_neo", intermediate=f, norms=4 * d, activation=_activation(shape["activation_function"]),
        matrices=_matrices(d, f, bias=False, out_bias=True, mlp_bias=True, separate=True),
        tables=(v * d, shape["max_position_embeddings"] * d), fused_attention=False, fast_rollout=False,
    )  # fmt: skip


def _gpt_neox(shape: Shape) -> Network:
    d, f, v = shape["hidden_size"], shape["intermediate_size"], shape["vocab_size"]
    bias = shape.get("attention_bias", True)
    return _network(
        shape, family="gpt_neox", intermediate=f, norms=4 * d, activation=_activation(shape["hidden_act"]), tables=(v * d,),
        matrices=_reordered(_matrices(d, f, bias=bias, mlp_bias=True, separate=False)),
        head=Matrix(name="head", rows=v, columns=d, bias=False), rotates_fused=True,
    )  # fmt: skip


def _parallel(family: str, *, separate: bool) -> Callable[[Shape], Network]:
    """GPT-J and CodeGen: attention and MLP side by side behind one norm. CodeGen's q, k and v are one matrix, and rotated out of its product."""

    def build(shape: Shape) -> Network:
        d, v = shape["hidden_size"], shape["vocab_size"]
        f = shape.get("n_inner") or 4 * d
        return _network(
            shape, family=family, intermediate=f, norms=2 * d, activation=_activation(shape["activation_function"]), tables=(v * d,),
            matrices=_matrices(d, f, bias=False, mlp_bias=True, separate=separate),
            head=Matrix(name="head", rows=v, columns=d, bias=True), fused_attention=False, rotates_fused=not separate, fast_rollout=False,
        )  # fmt: skip

    return build


def _bloom(shape: Shape) -> Network:
    d, v = shape["hidden_size"], shape["vocab_size"]
    return _network(
        shape, family="bloom", intermediate=4 * d, norms=4 * d, activation="gelu_fused", tables=(v * d,), outside=4 * d,
        matrices=_reordered(_matrices(d, 4 * d, bias=True, mlp_bias=True, separate=False)), fused_attention=False,
    )  # fmt: skip


def _reordered(matrices: tuple[Matrix, ...]) -> tuple[Matrix, ...]:
    """q, k and v head by head, which the decoder stacks anew."""
    return (Matrix(name="qkv", rows=matrices[0].rows, columns=matrices[0].columns, bias=matrices[0].bias, copied=True), *matrices[1:])


def _llama_like(family: str, *, qkv_bias: bool = False, fused: bool = False, head_norms: bool = False) -> Callable[[Shape], Network]:
    """LLaMA and what came of it."""

    def build(shape: Shape) -> Network:
        d, f, v, heads = shape["hidden_size"], shape["intermediate_size"], shape["vocab_size"], shape["num_attention_heads"]
        kv = shape.get("num_key_value_heads") or heads
        hd = shape.get("head_dim") or d // heads
        bias, mlp = qkv_bias or shape.get("attention_bias", False), shape.get("mlp_bias", False)
        sizes = [("qkv", (heads + 2 * kv) * hd)] if fused else [("q", heads * hd), ("k", kv * hd), ("v", kv * hd)]
        up = [("gate_up", 2 * f)] if fused else [("gate", f), ("up", f)]
        matrices = [Matrix(name=n, rows=r, columns=d, bias=bias, copied=not fused) for n, r in sizes]
        matrices.append(Matrix(name="out", rows=d, columns=heads * hd, bias=shape.get("attention_bias", False)))
        matrices += [Matrix(name=n, rows=r, columns=d, bias=mlp, copied=not fused) for n, r in up]
        matrices.append(Matrix(name="down", rows=d, columns=f, bias=mlp))
        head = None if shape["tie_word_embeddings"] else Matrix(name="head", rows=v, columns=d, bias=False)
        return _network(
            shape, family=family, intermediate=f, kv_heads=kv, head_dim=hd, norms=2 * d + (2 * hd if head_norms else 0),
            matrices=tuple(matrices), tables=(v * d,), outside=d, head=head, rms=True, activation="gated", rotates_fused=fused, dropouts=0,
        )  # fmt: skip

    return build


def _activation(name: str) -> str:
    """What decides how much autograd keeps: one tensor, two, or the pieces of a formula written out."""
    return {"relu": "relu", "gelu_new": "gelu_new"}.get(name, "gelu")


FAMILIES: dict[str, Callable[[Shape], Network]] = {
    "opt": _opt,
    "gpt2": _gpt2,
    "gpt_neo": _gpt_neo,
    "gpt_neox": _gpt_neox,
    "gptj": _parallel("gptj", separate=True),
    "codegen": _parallel("codegen", separate=False),
    "bloom": _bloom,
    "llama": _llama_like("llama"),
    "mistral": _llama_like("mistral"),
    "qwen2": _llama_like("qwen2", qkv_bias=True),
    "qwen3": _llama_like("qwen3", head_norms=True),
    "phi3": _llama_like("phi3", fused=True),
}
"""transformers' `model_type` -> how to count it."""
