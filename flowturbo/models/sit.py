"""SiT: the scalable interpolant transformer (Ma et al. 2024, arXiv 2401.08740), and FlowTurbo's velocity refiner.

The refiner (Zhao et al. 2024, arXiv 2409.18128) is the same network with one block and the latent and a velocity
stacked as input channels, so one class serves both. Parameter names follow the released checkpoints.

A forward pass is two parts, and the deployed engines are cut at the same place:

    mods     = model.conditioning(t, y)     [N, M]   everything that depends on time and label
    velocity = model.trunk(x, mods)         [N, C, H, W]

Letters: N rows, C latent channels, H = W latent side, T tokens, D width, M = modulations per row.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowturbo.evaluation.speed.macs import SIT_SIZES, TIME_EMBEDDING_SIZE
from runtime.system.errors import RequestError

TimeDirection = Literal["noise-to-data", "data-to-noise"]

NORM_EPS = 1e-6


@dataclass(frozen=True)
class SiTConfig:
    """Shape of a SiT; goes to and from JSON unchanged.

    Attributes:
        depth, width, heads, patch: of the transformer; `patch` divides `latent_size`.
        latent_size: side of the square latent this instance runs at.
        in_channels: latent channels read: C for a predictor, 2C for a refiner.
        out_channels: latent channels predicted (C).
        classes: labels 0 … classes − 1; the null label for guidance is `classes`.
        has_null_label: whether the label table has a row for the null label; without one there is no guidance.
        learned_sigma: the final layer also has C unused variance channels.
        mlp_width: hidden units of a block's MLP; 4 × width in every released model.
        time_direction: "noise-to-data" (SiT: t = 0 is noise) or "data-to-noise" (REPA); the module always
            takes and returns the former, so a "data-to-noise" network is flipped inside.
    """

    depth: int
    width: int
    heads: int
    patch: int
    latent_size: int
    in_channels: int = 4
    out_channels: int = 4
    classes: int = 1000
    learned_sigma: bool = True
    mlp_width: int = 0
    time_direction: TimeDirection = "noise-to-data"
    has_null_label: bool = True

    def __post_init__(self) -> None:
        for name in ("depth", "width", "heads", "patch", "latent_size", "classes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, below 1")
        if self.mlp_width == 0:
            object.__setattr__(self, "mlp_width", 4 * self.width)
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        if self.width % 4:
            raise ValueError(f"width {self.width} is not a multiple of 4, which sin-cos positions need")
        if self.latent_size % self.patch:
            raise ValueError(f"latent size {self.latent_size} is not a multiple of patch {self.patch}")

    @property
    def is_refiner(self) -> bool:
        """Whether it reads a latent and a velocity."""
        return self.in_channels == 2 * self.out_channels

    def find_null_label(self, scale: float) -> int:
        """Return the label of the unguided branch; where there is none, any, because nothing is guided at scale 1.

        Raises:
            RequestError: another scale without a null label.
        """
        if not self.has_null_label and scale != 1:
            raise RequestError(
                f"guidance {scale:g} for a network without a null label",
                allowed="1: it was trained with classes only",
                remedy="--guidance 1",
            )
        return self.classes if self.has_null_label else self.classes - 1

    @property
    def modulations(self) -> int:
        """M: six vectors a block and two for the final layer."""
        return (6 * self.depth + 2) * self.width

    def with_latent_size(self, latent_size: int) -> SiTConfig:
        """Return the configuration at another latent side."""
        return replace(self, latent_size=latent_size)

    def to_json(self) -> dict[str, object]:
        """Return the fields as JSON data; `has_null_label` only where it is False, which older versions cannot read."""
        data = asdict(self)
        if self.has_null_label:
            del data["has_null_label"]
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> SiTConfig:
        """Return the configuration in JSON data.

        Raises:
            ValueError: an unknown key, or an impossible shape.
            TypeError: a missing key, or a value of another type.
        """
        unknown = set(data) - {f.name for f in fields(cls)}
        if unknown:
            raise ValueError(f"unknown SiT configuration keys: {', '.join(sorted(unknown))}")
        return cls(**data)


PATCH_SIZES = (1, 2, 4, 8)
MODEL_NAMES = tuple(f"SiT-{size}/{patch}" for size in SIT_SIZES for patch in PATCH_SIZES)


def build_sit_config(name: str, latent_size: int = 32, **changes: Any) -> SiTConfig:
    """Return the configuration of a released size, e.g. ``build_sit_config("SiT-XL/2")``.

    Raises:
        ValueError: the name is none of `MODEL_NAMES`.
    """
    if name not in MODEL_NAMES:
        raise ValueError(f"unknown model {name!r}; known: {', '.join(MODEL_NAMES)}")
    size, patch = name.removeprefix("SiT-").split("/")
    depth, width, heads = SIT_SIZES[size]
    return SiTConfig(depth, width, heads, int(patch), latent_size, **changes)


def find_num_heads(width: int) -> int | None:
    """Return the heads of the released model of this width, which shapes do not tell; None for other widths."""
    return next((heads for _, w, heads in SIT_SIZES.values() if w == width), None)


def build_refiner_config(predictor: SiTConfig) -> SiTConfig:
    """Return the refiner that FlowTurbo pairs with `predictor`: depth 1, input [x, v]."""
    return replace(predictor, depth=1, in_channels=2 * predictor.out_channels)


def build_sincos_positions(side: int, width: int) -> Tensor:
    """Return the fixed sine-cosine positions of a side × side token grid: [1, side², width], float32.

    The first half of the channels encodes the column, the second the row, as the released models have it.
    """
    omega = 1.0 / 10000.0 ** (torch.arange(width // 4, dtype=torch.float64) / (width / 4.0))
    angle = torch.arange(side, dtype=torch.float64)[:, None] * omega  # [side, D/4]
    axis = torch.cat([angle.sin(), angle.cos()], dim=1)  # [side, D/2]
    column = axis[None, :, :].expand(side, side, -1)
    row = axis[:, None, :].expand(side, side, -1)
    return torch.cat([column, row], dim=2).reshape(1, side * side, width).float()


class TimestepEmbedder(nn.Module):
    """Flow time to a vector: sinusoids, always in float32 (cos of a half-precision angle is noise), then an MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(TIME_EMBEDDING_SIZE, width), nn.SiLU(), nn.Linear(width, width))

    @property
    def dtype(self) -> torch.dtype:
        """What the MLP computes in."""
        return next(self.mlp.parameters()).dtype

    def forward(self, t: Tensor) -> Tensor:  # [N] -> [N, D]
        half = TIME_EMBEDDING_SIZE // 2
        frequency = torch.exp(-math.log(10000.0) / half * torch.arange(half, dtype=torch.float32, device=t.device))
        angle = t.float()[:, None] * frequency
        sinusoids = torch.cat([angle.cos(), angle.sin()], dim=1)
        embedding: Tensor = self.mlp(sinusoids.to(self.dtype))
        return embedding


class LabelEmbedder(nn.Module):
    """Class label to a vector: a row for every class and, as the last one, for the null label of guidance."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(rows, width)

    def forward(self, y: Tensor) -> Tensor:  # [N] -> [N, D]
        embeddings: Tensor = self.embedding_table(y)
        return embeddings


class PatchEmbed(nn.Module):
    """Non-overlapping patches to tokens. The weight has a convolution's shape, the arithmetic is one matrix product."""

    def __init__(self, channels: int, patch: int, width: int) -> None:
        super().__init__()
        self.patch = patch
        self.proj = nn.Conv2d(channels, width, patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:  # [N, C, H, W] -> [N, T, D]
        p = self.patch
        c, side = x.shape[1], x.shape[2] // p
        patches = x.reshape(-1, c, side, p, side, p).permute(0, 2, 4, 1, 3, 5).reshape(-1, side * side, c * p * p)
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


class Attention(nn.Module):
    """Multi-head self-attention.

    `is_unfused` spells it as two matrix products and a softmax, the form that every engine builder fuses; the
    exporter sets it. `float32_softmax` keeps that softmax in float32 in a network of 16 bits.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.is_unfused = False
        self.float32_softmax = False

    def forward(self, x: Tensor) -> Tensor:  # [N, T, D]
        tokens, width = x.shape[1], x.shape[2]
        qkv = self.qkv(x).reshape(-1, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]  # [N, heads, T, D / heads]
        mixed = self._attend_unfused(q, k, v) if self.is_unfused else F.scaled_dot_product_attention(q, k, v)
        projected: Tensor = self.proj(mixed.transpose(1, 2).reshape(-1, tokens, width))
        return projected

    def _attend_unfused(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # The scale sits on q: scores formed first could leave the range of float16.
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        weights = scores.softmax(dim=-1, dtype=torch.float32 if self.float32_softmax else None).to(v.dtype)
        mixed: Tensor = weights @ v
        return mixed


class Mlp(nn.Module):
    """The block's two linear layers and GELU."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
        return out


def apply_adaln(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm without weights, always in float32, then adaLN's scale and shift: x [N, T, D], the others [N, D]."""
    normed = F.layer_norm(x.float(), (x.shape[-1],), eps=NORM_EPS).to(x.dtype)
    return normed * (1 + scale[:, None]) + shift[:, None]


class AdaLN(nn.Sequential):
    """SiLU and a linear layer: the modulations of one block."""

    def __init__(self, width: int, vectors: int) -> None:
        super().__init__(nn.SiLU(), nn.Linear(width, vectors * width))


class Block(nn.Module):
    """Attention and MLP, each after a modulated norm and behind a gate."""

    def __init__(self, config: SiTConfig) -> None:
        super().__init__()
        self.attn = Attention(config.width, config.heads)
        self.mlp = Mlp(config.width, config.mlp_width)
        self.adaLN_modulation = AdaLN(config.width, 6)

    def forward(self, x: Tensor, mods: Tensor) -> Tensor:  # x [N, T, D], mods [N, 6D]
        shift1, scale1, gate1, shift2, scale2, gate2 = mods.chunk(6, dim=1)
        x = x + gate1[:, None] * self.attn(apply_adaln(x, shift1, scale1))
        x = x + gate2[:, None] * self.mlp(apply_adaln(x, shift2, scale2))
        return x


class FinalLayer(nn.Module):
    """Tokens to patches of velocity."""

    def __init__(self, config: SiTConfig) -> None:
        super().__init__()
        channels = config.out_channels * (2 if config.learned_sigma else 1)
        self.linear = nn.Linear(config.width, config.patch**2 * channels)
        self.adaLN_modulation = AdaLN(config.width, 2)

    def forward(self, x: Tensor, mods: Tensor) -> Tensor:  # x [N, T, D], mods [N, 2D] -> [N, T, p²·C]
        shift, scale = mods.chunk(2, dim=1)
        out: Tensor = self.linear(apply_adaln(x, shift, scale))
        return out


class SiT(nn.Module):
    """The network: velocity of the linear path at (x, t) for label y.

    A refiner is called with ``torch.cat([x, v], 1)`` and predicts the *change* of v.
    """

    pos_embed: Tensor

    def __init__(self, config: SiTConfig) -> None:
        super().__init__()
        self.config = config
        self.x_embedder = PatchEmbed(config.in_channels, config.patch, config.width)
        self.t_embedder = TimestepEmbedder(config.width)
        self.y_embedder = LabelEmbedder(config.classes + config.has_null_label, config.width)
        self.register_buffer("pos_embed", self.build_positions(config))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.final_layer = FinalLayer(config)
        self._initialise()

    @staticmethod
    def build_positions(config: SiTConfig) -> Tensor:
        """Return the position embedding of a configuration: [1, T, D]."""
        return build_sincos_positions(config.latent_size // config.patch, config.width)

    def _initialise(self) -> None:
        """adaLN-zero: every block starts as the identity and the output at zero (DiT, Peebles & Xie 2023)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.data.flatten(1))
        if self.x_embedder.proj.bias is not None:
            nn.init.zeros_(self.x_embedder.proj.bias)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        for weight in self.t_embedder.mlp.parameters():
            if weight.ndim == 2:
                nn.init.normal_(weight, std=0.02)
        for part in [*self.blocks, self.final_layer]:
            nn.init.zeros_(part.adaLN_modulation[1].weight)
            nn.init.zeros_(part.adaLN_modulation[1].bias)
        nn.init.zeros_(self.final_layer.linear.weight)
        nn.init.zeros_(self.final_layer.linear.bias)

    def conditioning(self, t: Tensor, y: Tensor) -> Tensor:
        """Return modulations of every block and the final layer: t [N] flow time, y [N] labels -> [N, M]."""
        if self.config.time_direction == "data-to-noise":
            t = 1.0 - t
        c = self.t_embedder(t) + self.y_embedder(y)  # [N, D]
        return torch.cat([part.adaLN_modulation(c) for part in [*self.blocks, self.final_layer]], dim=1)

    def trunk(self, x: Tensor, mods: Tensor) -> Tensor:
        """Return the velocity [N, C, H, W] of x [N, in_channels, H, W] under mods [N, M]."""
        tokens = self.x_embedder(x) + self.pos_embed.to(mods.dtype)
        size = 6 * self.config.width
        for i, block in enumerate(self.blocks):
            tokens = block(tokens, mods[:, i * size : (i + 1) * size])
        out = self._unpatchify(self.final_layer(tokens, mods[:, len(self.blocks) * size :]))
        return -out if self.config.time_direction == "data-to-noise" else out

    def _unpatchify(self, tokens: Tensor) -> Tensor:  # [N, T, p²·(C or 2C)] -> [N, C, H, W]
        p, side = self.config.patch, self.config.latent_size // self.config.patch
        channels = tokens.shape[2] // p**2
        images = tokens.reshape(-1, side, side, p, p, channels).permute(0, 5, 1, 3, 2, 4)
        return images.reshape(-1, channels, side * p, side * p)[:, : self.config.out_channels]

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Return the velocity [N, C, H, W] at x [N, in_channels, H, W], flow time t [N], labels y [N]."""
        return self.trunk(x, self.conditioning(t, y))
