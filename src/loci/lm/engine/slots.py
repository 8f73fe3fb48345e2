"""Keys and values in slots that are there before they are needed.

Letters  row: one sequence; head: a key/value head; slot: a place for one token; size: numbers of a head.
Ours     each row has its own length: tokens lie at its first `lengths[row]` slots, what a step stages lies behind them,
         and a shorter row's spare slots are masked by the reader. Keeping a path of a tree moves it to the front in
         place. Growing doubles the slots, so that a text of n tokens costs O(n) copies in all; the cache of
         `transformers` copies everything at every step.

Spare slots hold zeros or what was there before, never NaN: a masked slot has the weight 0, and 0 * NaN is NaN.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from loci.errors import BadInput

# Slots to begin with: room for a short prompt and its answer.
FIRST_SLOTS = 256


class SlotCache:
    """Keys and values of all layers and rows.

    Args:
        slots: tokens per row that fit without growing.
    """

    def __init__(
        self,
        *,
        layers: int,
        heads: int,
        size: int,
        dtype: torch.dtype,
        device: torch.device,
        rows: int = 1,
        slots: int = FIRST_SLOTS,
    ) -> None:
        shape = (layers, rows, heads, slots, size)
        self.keys: Float[Tensor, "layer row head slot size"] = torch.zeros(shape, dtype=dtype, device=device)
        self.values: Float[Tensor, "layer row head slot size"] = torch.zeros(shape, dtype=dtype, device=device)
        self.lengths = [0] * rows
        self._staged = 0

    @property
    def rows(self) -> int:
        return len(self.lengths)

    @property
    def slots(self) -> int:
        return self.keys.shape[3]

    @property
    def used(self) -> int:
        """Slots of the longest row, what is staged included: what attention has to read."""
        return max(self.lengths, default=0) + self._staged

    @property
    def nbytes(self) -> int:
        return self.keys.untyped_storage().nbytes() + self.values.untyped_storage().nbytes()

    def begin(self, rows: int) -> None:
        """Forget everything; the next sequences are empty. Slots are kept where the number of rows stays the same."""
        if rows != self.keys.shape[1] or self._whole_rows != rows:
            layers, _, heads, slots, size = self.keys.shape
            shape = (layers, rows, heads, slots, size)
            self.keys, self.values = self.keys.new_zeros(shape), self.values.new_zeros(shape)
        self.lengths, self._staged = [0] * rows, 0

    @property
    def _whole_rows(self) -> int:
        """Rows that the storage has room for, those that left included."""
        layers, _, heads, slots, size = self.keys.shape
        return self.keys.untyped_storage().nbytes() // (self.keys.itemsize * layers * heads * slots * size)

    def reserve(self, slots: int) -> None:
        """Make room for this many tokens per row, by doubling."""
        if slots <= self.slots:
            return
        more = self.slots
        while more < slots:
            more *= 2
        layers, rows, heads, _, size = self.keys.shape
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = old.new_zeros((layers, rows, heads, more, size))
            new[:, :, :, : self.used] = old[:, :, :, : self.used]
            setattr(self, name, new)

    def stage(self, nodes: int) -> None:
        """Open `nodes` slots behind each row's tokens; `write` fills them, layer by layer. What was staged is lost."""
        self._staged = 0
        self.reserve(max(self.lengths) + nodes)
        self._staged = nodes

    def write(
        self, layer: int, keys: Float[Tensor, "row node head size"], values: Float[Tensor, "row node head size"]
    ) -> None:
        """Fill the staged slots of one layer."""
        first = self.lengths[0]
        if all(length == first for length in self.lengths):
            slots = slice(first, first + self._staged)
            self.keys[layer, :, :, slots] = keys.transpose(1, 2)
            self.values[layer, :, :, slots] = values.transpose(1, 2)
            return
        for row, length in enumerate(self.lengths):
            slots = slice(length, length + self._staged)
            self.keys[layer, row, :, slots] = keys[row].transpose(0, 1)
            self.values[layer, row, :, slots] = values[row].transpose(0, 1)

    def write_at(
        self,
        layer: int,
        keys: Float[Tensor, "row node head size"],
        values: Float[Tensor, "row node head size"],
        slots: Int64[Tensor, "row node"],
    ) -> None:
        """The same with the places as a tensor, so that one recording of the work serves every length."""
        rows = torch.arange(self.rows, device=slots.device)[:, None]
        self.keys[layer][rows, :, slots] = keys
        self.values[layer][rows, :, slots] = values

    def read(self, layer: int) -> tuple[Float[Tensor, "row head slot size"], Float[Tensor, "row head slot size"]]:
        """Views of one layer's keys and values, as many slots as the longest row uses, the staged ones included."""
        return self.keys[layer, :, :, : self.used], self.values[layer, :, :, : self.used]

    def commit(self, paths: Sequence[Sequence[int]]) -> None:
        """Keep these staged nodes of each row, in this order, and drop the others."""
        if len(paths) != self.rows:
            raise BadInput(f"{len(paths)} paths were given for {self.rows} rows.")
        for row, path in enumerate(paths):
            if any(not 0 <= node < self._staged for node in path):
                raise BadInput(f"the path {list(path)} leaves the {self._staged} nodes that are staged.")
            still = next((place for place, node in enumerate(path) if place != node), len(path))
            if still < len(path):
                length = self.lengths[row]
                index = torch.tensor([length + node for node in path[still:]], device=self.keys.device)
                slots = slice(length + still, length + len(path))
                for part in (self.keys, self.values):
                    part[:, row, :, slots] = part[:, row].index_select(2, index)  # a copy first: the places overlap
        self._staged = 0
        for row, path in enumerate(paths):
            self.lengths[row] += len(path)

    def fill(self, lengths: Sequence[int]) -> None:
        """Keep the first of the staged nodes of each row: a batch of prompts, padded to one width."""
        self.commit([range(length) for length in lengths])

    def truncate(self, row: int, length: int) -> None:
        """Forget a row's tokens from `length` on."""
        if not 0 <= length <= self.lengths[row]:
            raise BadInput(f"row {row} has {self.lengths[row]} tokens and cannot be cut to {length}.")
        self.lengths[row], self._staged = length, 0

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all rows but these, which become rows 0, 1, ... in this order. The memory is kept until the cache
        grows or begins anew."""
        if any(not 0 <= row < self.rows for row in rows):
            raise BadInput(f"rows {list(rows)} of a batch of {self.rows} cannot be kept.")
        if list(rows) != list(range(len(rows))):
            used, index = max((self.lengths[row] for row in rows), default=0), torch.tensor(list(rows))
            for layer in range(self.keys.shape[0]):  # layer by layer: the copy that overlap demands stays small
                for part in (self.keys, self.values):
                    part[layer, : len(rows), :, :used] = part[layer, index.to(part.device), :, :used]
        self.keys, self.values = self.keys[:, : len(rows)], self.values[:, : len(rows)]
        self.lengths, self._staged = [self.lengths[row] for row in rows], 0
