"""A decoder in two parts for large pictures: one needs the whole picture, the other works tile by tile.

The head (first convolution, attention) works at the size of the latents, in little memory. The rest takes tiles.
Group normalisation looks at the whole picture, so tiles that are decoded apart get other colours (1 to 3 of 255 grey
levels on average with the demo's VAE). Here every norm takes mean and mean square as an input and returns its tile's
share of them, and `runtime/execution/tiling.py` repeats until the outputs agree with the inputs.

Letters: B images, C latent channels, E channels after the head, G groups of a norm, M groups of all norms of a tile,
S and T latent sides of the picture and of a tile.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from export.graphs.engine_graphs import to_picture
from flowturbo.models.vae import Vae


class _NormBoard:
    """The values that the norms of a decoder share while it runs."""

    moments: Tensor  # [2, B, M]: means and mean squares of the whole picture
    has_moments: Tensor  # [1]: 1 to use them, 0 to use the tile's
    core: Tensor  # [T, T]: 1 where a latent is this tile's, 0 where a neighbour counts it
    sums: dict[int, Tensor]  # by a norm's first group: [2, B, G]


class SharedNorm(nn.Module):
    """A GroupNorm over the whole picture of its tile, in float32 whatever goes in."""

    def __init__(self, norm: nn.GroupNorm, first: int, board: _NormBoard) -> None:
        super().__init__()
        self.groups, self.eps, self.first, self.board = norm.num_groups, norm.eps, first, board
        self.weight, self.bias = nn.Parameter(norm.weight.float()), nn.Parameter(norm.bias.float())

    def forward(self, x: Tensor) -> Tensor:  # [B, channels, H, W]
        channels, pixels = x.shape[1], x[0, 0].numel()
        grouped = x.float().reshape(-1, self.groups, channels // self.groups, pixels)
        square, side = grouped.square(), self.board.core.shape[0]
        repeats = round((pixels // side**2) ** 0.5)  # pixels of this norm per latent, along a side
        core = self.board.core[:, None, :, None].expand(side, repeats, side, repeats).reshape(pixels)
        share = self.board.core.numel() / (pixels * (channels // self.groups))
        sums = torch.stack([grouped @ core, square @ core]).sum(dim=3) * share  # [2, B, G]
        self.board.sums[self.first] = sums
        # Zero times the sums: who orders the graph must take them here, or it keeps every norm's input to the very end.
        tile_moments = torch.stack([grouped.mean(dim=(2, 3)), square.mean(dim=(2, 3))]) + 0.0 * sums
        picture_moments = self.board.moments[:, :, self.first : self.first + self.groups]
        mean, mean_square = tile_moments + self.board.has_moments * (picture_moments - tile_moments)
        scale = torch.rsqrt((mean_square - mean.square()).clamp(min=0) + self.eps)
        normed = (grouped - mean[:, :, None, None]) * scale[:, :, None, None]
        flat = normed.reshape(-1, channels, pixels) * self.weight[:, None] + self.bias[:, None]
        out: Tensor = flat.reshape(-1, *x.shape[1:]).to(x.dtype)
        return out


class HeadGraph(nn.Module):
    """Sampler's latents of the whole picture → the features that its tiles are decoded from."""

    def __init__(self, vae: Vae, dtype: torch.dtype) -> None:
        super().__init__()
        module: Any = vae.module
        self.before, self.conv_in, self.mid = module.post_quant_conv, module.decoder.conv_in, module.decoder.mid_block
        self.vae, self.dtype = vae, dtype

    def forward(self, latents: Tensor) -> Tensor:  # [B, C, S, S] -> [B, E, S, S]
        scaled = self.vae.undo_scaling(latents).to(self.dtype)
        if self.before is not None:
            scaled = self.before(scaled)
        features: Tensor = self.mid(self.conv_in(scaled), None)
        return features.float()


class TileGraph(nn.Module):
    """A tile of features → its picture in [0, 1], a check of it, and its share of every norm's moments."""

    def __init__(self, vae: Vae, dtype: torch.dtype) -> None:
        super().__init__()
        self._board, self.dtype = _NormBoard(), dtype
        decoder: Any = vae.module.decoder
        parts = copy.deepcopy(
            nn.ModuleList([*decoder.up_blocks, decoder.conv_norm_out, decoder.conv_act, decoder.conv_out])
        )
        self.parts = parts.to(dtype)
        replace_norms(self.parts, self._board)
        self.moments = count_norm_groups(vae)

    def forward(
        self,
        features: Tensor,  # [B, E, T, T]
        core: Tensor,  # [T, T]
        moments: Tensor,  # [2, B, M]
        has_moments: Tensor,  # [1]
    ) -> tuple[Tensor, Tensor, Tensor]:
        board = self._board
        board.moments, board.has_moments, board.core, board.sums = moments, has_moments, core, {}
        pixels = features.to(self.dtype)
        for part in self.parts:
            pixels = part(pixels)
        images, finite = to_picture(pixels.float())
        return images, finite, torch.cat([board.sums[first] for first in sorted(board.sums)], dim=2)


def replace_norms(module: nn.Module, board: _NormBoard) -> None:
    """Put a `SharedNorm` in place of every GroupNorm."""
    total = 0
    for part in list(module.modules()):
        for name, child in part.named_children():
            if isinstance(child, nn.GroupNorm):
                setattr(part, name, SharedNorm(child, total, board).eval().requires_grad_(False))
                total += child.num_groups


def count_norm_groups(vae: Vae) -> int:
    """Count M, the groups of all norms that a tile goes through."""
    decoder: Any = vae.module.decoder
    norms = [part for block in decoder.up_blocks for part in block.modules() if isinstance(part, nn.GroupNorm)]
    return sum(norm.num_groups for norm in [*norms, decoder.conv_norm_out])


def count_head_channels(vae: Vae) -> int:
    """Count E, the channels of a head's output."""
    decoder: Any = vae.module.decoder
    return int(decoder.conv_in.out_channels)
