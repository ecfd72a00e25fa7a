"""Rotary position embeddings on a 2-D grid of patches: the tables that attention rotates q and k by.

N patches, E head dim, H heads, M = E / 4 frequencies of each axis.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from vitfast.layers.tokens import Rope

ROPE_TYPES = ("cat", "dinov3", "mixed")
_CACHED_GRIDS = 16


class RotaryEmbedding(nn.Module):
    """Tables for one grid of patches, half of the frequencies for each axis (Su et al. 2021, arXiv:2104.09864).

    kind: "cat": patch numbers times temperature ** (-m / M), rescaled to ``ref_grid`` where given (EVA-02,
        arXiv:2303.11331); "dinov3": coordinates of patch centres in -1..1, periods temperature ** (m / M)
        (arXiv:2508.10104); "mixed": learned frequencies of both axes for each layer and head ``freqs``
        [2, layers, H, E / 2] (Heo et al. 2024, arXiv:2403.13298).
    grid_offset: added to the patch numbers. grid_indexing: "ij" gives rows the first half, "xy" columns.
    rotate_half: pair element i with i + E / 2 instead of 2i with 2i + 1.
    shift, jitter, rescale: in training, one draw for each call: shift of both axes, uniform in -shift..shift; factors of
        each axis, log-uniform in 1/jitter..jitter; one factor of both, log-uniform in 1/rescale..rescale.
    """

    def __init__(
        self,
        head_dim: int,
        *,
        kind: str = "cat",
        temperature: float = 10000.0,
        ref_grid: tuple[int, int] | None = None,
        grid_offset: float = 0.0,
        grid_indexing: str = "ij",
        rotate_half: bool = False,
        shift: float | None = None,
        jitter: float | None = None,
        rescale: float | None = None,
        depth: int = 1,
        num_heads: int = 1,
    ) -> None:
        super().__init__()
        if head_dim % 4:
            raise ValueError(f"rotary embeddings in 2-D need a head dim that 4 divides, got {head_dim}")
        self.head_dim = head_dim
        self.kind = kind
        self.temperature = temperature
        self.ref_grid = ref_grid
        self.grid_offset = grid_offset
        self.grid_indexing = grid_indexing
        self.rotate_half = rotate_half
        self.shift, self.jitter, self.rescale = shift, jitter, rescale
        self._cache: dict[tuple, Rope] = {}
        if kind == "mixed":
            self.freqs = nn.Parameter(_random_directions(head_dim, depth, num_heads, temperature))

    def forward(self, grid: tuple[int, int], device: torch.device) -> Rope:
        """fp32 tables of grid = (rows, columns): [N, E / 2]; "mixed" [layers, N, H, E].

        The same grid gives the same tensors again, outside of compiled code and where nothing is learned or drawn.
        """
        augmented = self.training and not (self.shift is self.jitter is self.rescale is None)
        if augmented or self.kind == "mixed" or torch.compiler.is_compiling():
            return self._tables(self._coordinates(grid, device, augmented))
        key = (grid, device)
        if key not in self._cache:
            if len(self._cache) >= _CACHED_GRIDS:
                self._cache.clear()
            with torch.inference_mode(False), torch.no_grad():  # later calls may need gradients through q and k
                tables = self._tables(self._coordinates(grid, device, augmented))
            if type(tables.cos) is not Tensor:  # fake tensors of a tracer must not outlive it
                return tables
            self._cache[key] = tables
        return self._cache[key]

    def _coordinates(self, grid: tuple[int, int], device: torch.device, augmented: bool) -> Tensor:
        """Two coordinates of each patch, [N, 2]."""
        axes = []
        for size, reference in zip(grid, self.ref_grid or (None, None), strict=True):
            if self.kind == "dinov3":
                axis = (torch.arange(0.5, size, device=device, dtype=torch.float32) + self.grid_offset) / size
            else:
                offset = self.grid_offset if self.kind == "cat" else 0.0
                axis = torch.arange(size, device=device, dtype=torch.float32) + offset
                if reference is not None:
                    axis = axis / size * reference
            axes.append(axis)
        rows, columns = torch.meshgrid(*axes, indexing="ij")
        coordinates = torch.stack([rows, columns] if self.grid_indexing == "ij" else [columns, rows], -1).flatten(0, 1)
        if self.kind == "dinov3":
            coordinates = 2.0 * coordinates - 1.0
        return self._augment(coordinates) if augmented else coordinates

    def _augment(self, coordinates: Tensor) -> Tensor:
        if self.shift is not None:
            coordinates = coordinates + coordinates.new_empty(2).uniform_(-self.shift, self.shift)
        for factor, axes in ((self.jitter, 2), (self.rescale, 1)):
            if factor is not None:
                limit = math.log(factor)
                coordinates = coordinates * coordinates.new_empty(axes).uniform_(-limit, limit).exp()
        return coordinates

    def _tables(self, coordinates_N2: Tensor) -> Rope:
        exponents = torch.arange(self.head_dim // 4, device=coordinates_N2.device, dtype=torch.float32)
        exponents = exponents / (self.head_dim // 4)
        if self.kind == "mixed":
            freqs = self.freqs.float().unsqueeze(2)  # [2, layers, 1, H, E / 2]
            first, second = coordinates_N2.view(-1, 2, 1, 1).unbind(1)
            angles = first * freqs[0] + second * freqs[1]  # [layers, N, H, E / 2]
        elif self.kind == "dinov3":
            angles = (2 * math.pi * coordinates_N2.unsqueeze(-1) / self.temperature**exponents).flatten(1)
        else:
            angles = (coordinates_N2.unsqueeze(-1) * (1.0 / self.temperature**exponents)).flatten(1)
        cos, sin = angles.cos(), angles.sin()
        if self.kind != "mixed":
            return Rope(cos, sin, not self.rotate_half)  # one angle for each pair
        return Rope(cos.repeat_interleave(2, -1), sin.repeat_interleave(2, -1), interleaved=True)


def _random_directions(head_dim: int, depth: int, num_heads: int, temperature: float) -> Tensor:
    """Start of the learned frequencies: axis-aligned pairs, turned by a random angle in each layer and head."""
    sizes = 1.0 / temperature ** (torch.arange(0, head_dim, 4, dtype=torch.float32) / head_dim)
    angles = torch.rand(depth, num_heads, 1) * 2 * math.pi
    along, across = angles, angles + math.pi / 2
    x = torch.cat([sizes * along.cos(), sizes * across.cos()], -1)
    y = torch.cat([sizes * along.sin(), sizes * across.sin()], -1)
    return torch.stack([x, y])
