"""The decoder's weights: made from a training model's parameters, fused and sliced, with storage shared where nothing changes.

Knows names and layouts; whoever fills them makes the parameters whole first (ZeRO-3) and folds adapters in. D hidden, H heads, K key/value
heads, hd head dimension, F intermediate, V vocabulary; of H, K and F only this rank's share under tensor parallelism.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from rlhf.inference.arena import Arena, Specs, make_arena
from rlhf.inference.families import Names, names_of
from rlhf.inference.parallel import Parallel
from rlhf.inference.shape import DecoderShape


class Source(Protocol):
    """Where weights come from, by their names in the training model."""

    def has(self, name: str) -> bool: ...

    def shareable(self, name: str) -> bool:
        """Whether the decoder may use this parameter's own storage: whole, unfolded, in the decoder's dtype, on its device."""
        ...

    def read(self, name: str) -> Tensor:
        """The whole parameter with its adapter folded in."""
        ...


@dataclass
class Linear:
    weight: Tensor  # (out, in), maybe a transposed view
    bias: Tensor | None  # (out,)


@dataclass
class Norm:
    weight: Tensor  # (D,)
    bias: Tensor | None  # (D,)


@dataclass
class Layer:
    norm1: Norm
    qkv: Linear  # ((H + 2K) hd, D)
    q_norm: Tensor | None  # (hd,)
    k_norm: Tensor | None  # (hd,)
    out: Linear  # (D, H hd)
    norm2: Norm
    up: Linear  # (F, D), gated: (2F, D), gate first
    down: Linear  # (D, F)


Cut = Callable[[Tensor], Tensor]
"""From a whole parameter to the piece that a tensor is made of."""


@dataclass(frozen=True)
class Recipe:
    """One tensor of the decoder: pieces of parameters, one under the other."""

    pieces: tuple[tuple[str, Cut | None], ...]
    """(parameter, cut); None: all of it as it is."""
    shape: tuple[int, ...]
    transposed: bool = False


class DecoderWeights:
    """Fills itself part by part: part 0 is what stands outside the layers, part i + 1 is layer i."""

    def __init__(self, shape: DecoderShape, source: Source, *, parallel: Parallel, dtype: torch.dtype, device: torch.device) -> None:
        self.shape = shape
        self.names = names_of(shape)
        self.parallel = parallel
        self.parts: list[dict[str, Recipe]] = [self._outside(source)]
        self.parts += [self._layer(source, f"{self.names.layer}{i}.") for i in range(shape.layers)]
        self.shared = {key for key, recipe in self._recipes() if _as_it_is(recipe) and source.shareable(recipe.pieces[0][0])}
        copied: Specs = {key: (recipe.shape, dtype) for key, recipe in self._recipes() if key not in self.shared}
        self.arena: Arena = make_arena(copied, device)
        self.tensors: dict[str, Tensor] = {}
        self.addresses: dict[str, int] = {}
        """Of the shared parameters at the last filling."""
        self.moved = False
        """A shared parameter has another address than at the last filling, so that captured graphs read the wrong place."""

    def _recipes(self) -> Iterator[tuple[str, Recipe]]:
        for i, part in enumerate(self.parts):
            for key, recipe in part.items():
                yield f"{i}.{key}", recipe

    # --- what is made of what ---

    def _outside(self, source: Source) -> dict[str, Recipe]:
        names, shape = self.names, self.shape
        embed = f"{names.embed}.weight"
        head = f"{names.head}.weight"
        width = shape.embed_width
        recipes = {"embed.weight": Recipe(((embed, None),), (shape.vocab, width))}
        recipes["head.weight"] = Recipe(((head if source.has(head) else embed, None),), (shape.vocab, width))
        if source.has(f"{names.head}.bias"):
            recipes["head.bias"] = Recipe(((f"{names.head}.bias", None),), (shape.vocab,))
        if names.positions is not None:
            rows = shape.max_positions + shape.position_offset
            recipes["positions.weight"] = Recipe(((f"{names.positions}.weight", None),), (rows, shape.hidden))
        for key, name, size in (
            ("project_in", names.project_in, (shape.hidden, width)),
            ("project_out", names.project_out, (width, shape.hidden)),
        ):
            if name is not None and source.has(f"{name}.weight"):
                recipes[f"{key}.weight"] = Recipe(((f"{name}.weight", None),), size)
        recipes |= self._vector(source, "embed_norm", names.embed_norm, shape.hidden)
        return recipes | self._vector(source, "final_norm", names.final_norm, shape.hidden)

    def _vector(self, source: Source, key: str, name: str | None, size: int) -> dict[str, Recipe]:
        """Weight and bias of a norm, where the model has it."""
        kinds = [kind for kind in ("weight", "bias") if name is not None and source.has(f"{name}.{kind}")]
        return {f"{key}.{kind}": Recipe(((f"{name}.{kind}", None),), (size,)) for kind in kinds}

    def _layer(self, source: Source, prefix: str) -> dict[str, Recipe]:
        names, shape, share = self.names, self.shape, self.parallel.share
        heads, kv_heads, mlp = (range(*share(n).indices(n)) for n in (shape.heads, shape.kv_heads, shape.intermediate))
        q, kv, f = len(heads) * shape.head_dim, len(kv_heads) * shape.head_dim, len(mlp)
        recipes: dict[str, Recipe] = {}
        qkv = self._qkv_cuts(names, slice(heads.start * shape.head_dim, heads.stop * shape.head_dim), slice(kv_heads.start, kv_heads.stop))
        up = self._up_cuts(names, slice(mlp.start, mlp.stop))
        for kind in ("weight", "bias"):
            width = (shape.hidden,) if kind == "weight" else ()
            for key, cuts, rows in (("qkv", qkv, q + 2 * kv), ("up", up, (2 if shape.gated else 1) * f)):
                if source.has(f"{prefix}{cuts[0][0]}.{kind}"):
                    pieces = tuple((f"{prefix}{name}.{kind}", self._upright(cut, kind)) for name, cut in cuts)
                    recipes[f"{key}.{kind}"] = Recipe(pieces, (rows, *width), self.names.transposed and kind == "weight")
        for key, name, inputs, columns in (
            ("out", names.out, q, shape.heads * shape.head_dim),
            ("down", names.down, f, shape.intermediate),
        ):
            recipes |= self._row_parallel(source, key, f"{prefix}{name}", inputs, columns)
        for key, vector, size in (
            ("norm1", names.norm1, shape.hidden), ("norm2", names.norm2, shape.hidden),
            ("q_norm", names.q_norm, shape.head_dim), ("k_norm", names.k_norm, shape.head_dim),
        ):  # fmt: skip
            recipes |= self._vector(source, key, None if vector is None else f"{prefix}{vector}", size)
        return recipes

    def _upright(self, cut: Cut | None, kind: str) -> Cut | None:
        """Turns Conv1D's (in, out) around before the cut."""
        if not self.names.transposed or kind == "bias" or cut is None:
            return cut
        return lambda whole: cut(whole.t())

    def _qkv_cuts(self, names: Names, q: slice, kv_heads: slice) -> list[tuple[str, Cut | None]]:
        shape = self.shape
        hd, whole = shape.head_dim, self.parallel.size == 1
        kv = slice(kv_heads.start * hd, kv_heads.stop * hd)
        if names.qkv_order == "separate":
            cuts = (q, kv, kv)
            return [(name, None if whole else _rows(cut)) for name, cut in zip(names.qkv, cuts, strict=True)]
        (name,) = names.qkv
        if names.qkv_order == "stacked":
            if whole:
                return [(name, None)]
            starts = (0, shape.heads * hd, (shape.heads + shape.kv_heads) * hd)
            return [(name, _rows(slice(at + cut.start, at + cut.stop))) for at, cut in zip(starts, (q, kv, kv), strict=True)]
        return [(name, _of_heads(i, kv_heads, shape.kv_heads, hd)) for i in range(3)]

    def _up_cuts(self, names: Names, mlp: slice) -> list[tuple[str, Cut | None]]:
        whole, f = self.parallel.size == 1, self.shape.intermediate
        if self.shape.gated and len(names.up) == 1 and not whole:
            return [(names.up[0], _rows(slice(at + mlp.start, at + mlp.stop))) for at in (0, f)]
        return [(name, None if whole else _rows(mlp)) for name in names.up]

    def _row_parallel(self, source: Source, key: str, name: str, inputs: int, columns: int) -> dict[str, Recipe]:
        """A matrix whose inputs are split: every rank holds some columns, the first rank the bias, the others zeros."""
        cut = None if self.parallel.size == 1 else _columns(self.parallel.share(columns))
        recipes = {
            f"{key}.weight": Recipe(((f"{name}.weight", self._upright(cut, "weight")),), (self.shape.hidden, inputs), self.names.transposed)
        }
        if source.has(f"{name}.bias"):  # read by every rank: under ZeRO-3 all must gather the same parameters
            recipes[f"{key}.bias"] = Recipe(
                ((f"{name}.bias", None if self.parallel.rank == 0 else torch.zeros_like),), (self.shape.hidden,)
            )
        return recipes

    # --- filling ---

    def parameters_of(self, part: int) -> list[str]:
        """The training parameters that a part reads."""
        return list(dict.fromkeys(name for recipe in self.parts[part].values() for name, _ in recipe.pieces))

    @torch.no_grad()
    def fill(self, part: int, source: Source) -> None:
        """Brings one part up to the source's values. The arena must be mapped."""
        for key, recipe in self.parts[part].items():
            full = f"{part}.{key}"
            if full in self.shared:
                tensor = source.read(recipe.pieces[0][0])
                tensor = tensor.t() if recipe.transposed else tensor
                self.moved |= self.addresses.get(full, tensor.data_ptr()) != tensor.data_ptr()
                self.addresses[full] = tensor.data_ptr()
                self.tensors[full] = tensor
            else:
                self.tensors[full] = self._copy(recipe, self.arena.tensors[full], source)

    def _copy(self, recipe: Recipe, target: Tensor, source: Source) -> Tensor:
        at = 0
        for name, cut in recipe.pieces:
            whole = source.read(name)
            piece = cut(whole) if cut is not None else whole.t() if recipe.transposed else whole
            target[at : at + len(piece)].copy_(piece)
            at += len(piece)
        assert at == len(target), f"{recipe.pieces[0][0]}: {at} rows, expected {len(target)}"
        return target

    def release(self) -> None:
        """Gives the copies' memory back, so that the next rollout fills every part again."""
        self.tensors = {}
        self.arena.unmap()

    def close(self) -> None:
        """Gives the copies' addresses back too."""
        self.release()
        self.arena.close()

    # --- as the decoder reads them ---

    def linear(self, part: int, key: str) -> Linear | None:
        weight = self.tensors.get(f"{part}.{key}.weight")
        return None if weight is None else Linear(weight, self.tensors.get(f"{part}.{key}.bias"))

    def norm(self, part: int, key: str) -> Norm | None:
        weight = self.tensors.get(f"{part}.{key}.weight")
        return None if weight is None else Norm(weight, self.tensors.get(f"{part}.{key}.bias"))

    def layer(self, index: int) -> Layer:
        part = index + 1
        linears = {key: self.linear(part, key) for key in ("qkv", "out", "up", "down")}
        norms = {key: self.norm(part, key) for key in ("norm1", "norm2")}
        heads = {key: self.tensors.get(f"{part}.{key}.weight") for key in ("q_norm", "k_norm")}
        return Layer(**linears, **norms, **heads)  # type: ignore[arg-type]


def _as_it_is(recipe: Recipe) -> bool:
    return len(recipe.pieces) == 1 and recipe.pieces[0][1] is None


def _rows(cut: slice) -> Cut:
    return lambda whole: whole[cut]


def _columns(cut: slice) -> Cut:
    return lambda whole: whole[:, cut]


def _of_heads(which: int, heads: slice, total: int, head_dim: int) -> Cut:
    """q, k or v (0, 1, 2) of some heads of a matrix in the order head by head."""

    def cut(whole: Tensor) -> Tensor:  # (total * 3 * hd, ...) -> (heads * hd, ...)
        return whole.view(total, 3, head_dim, *whole.shape[1:])[heads, which].flatten(0, 1)

    return cut
