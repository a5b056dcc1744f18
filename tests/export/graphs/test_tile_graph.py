"""A decoder in two parts, in PyTorch: norms that are told what they would see in the whole picture."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from export.graphs.engine_graphs import DecoderGraph
from export.graphs.tile_graph import HeadGraph, TileGraph, count_norm_groups
from flowturbo.models.vae import Vae, load_vae

SIDE = 16


@pytest.fixture(scope="module")
def loaded(vae: Path) -> Vae:
    return load_vae(str(vae))


@pytest.fixture(scope="module")
def latents() -> torch.Tensor:
    return torch.randn(2, 4, SIDE, SIDE, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def features(loaded: Vae, latents: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = HeadGraph(loaded, torch.float32)(latents)
    return found


@torch.no_grad()
def test_a_tile_that_is_the_picture_is_the_picture(loaded: Vae, latents: torch.Tensor, features: torch.Tensor) -> None:
    """With its own moments, and with those moments told, a tile of full size is what the decoder gives."""
    whole, _ = DecoderGraph(loaded, torch.float32)(latents)
    tile = TileGraph(loaded, torch.float32)
    core = torch.ones(SIDE, SIDE)
    own, finite, sums = tile(features, core, torch.zeros(2, 2, tile.moments), torch.zeros(1))
    torch.testing.assert_close(own, whole, rtol=0, atol=2e-6)
    assert bool((finite == 1).all())
    told, _, again = tile(features, core, sums / core.sum(), torch.ones(1))
    torch.testing.assert_close(told, whole, rtol=0, atol=2e-6)
    torch.testing.assert_close(again, sums, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_shares_of_cores_add_up(loaded: Vae, features: torch.Tensor) -> None:
    tile = TileGraph(loaded, torch.float32)
    left = torch.zeros(SIDE, SIDE)
    left[:, :5] = 1
    none = torch.zeros(2, 2, tile.moments), torch.zeros(1)
    parts = [tile(features, core, *none)[2] for core in (left, 1 - left)]
    torch.testing.assert_close(
        parts[0] + parts[1], tile(features, torch.ones(SIDE, SIDE), *none)[2], rtol=1e-4, atol=1e-3
    )


def test_moments_are_told_and_the_vae_stays_as_it_was(
    loaded: Vae, latents: torch.Tensor, features: torch.Tensor
) -> None:
    with torch.no_grad():
        before, _ = DecoderGraph(loaded, torch.float32)(latents)
        tile = TileGraph(loaded, torch.float32)
        assert tile.moments == count_norm_groups(loaded) > 0
        told = torch.ones(2, 2, tile.moments) * torch.tensor([0.0, 4.0])[:, None, None]
        other, _, _ = tile(features, torch.ones(SIDE, SIDE), told, torch.ones(1))
        assert float((other - before).abs().max()) > 1e-3
        after, _ = DecoderGraph(loaded, torch.float32)(latents)
    torch.testing.assert_close(after, before, rtol=0, atol=0)


def test_sixteen_bits_keep_norms_in_float32(loaded: Vae, latents: torch.Tensor, features: torch.Tensor) -> None:
    tile = TileGraph(loaded, torch.bfloat16)
    with torch.no_grad():
        pictures, _, sums = tile(features, torch.ones(SIDE, SIDE), torch.zeros(2, 2, tile.moments), torch.zeros(1))
        whole, _ = DecoderGraph(loaded, torch.float32)(latents)
    assert pictures.dtype == sums.dtype == torch.float32
    assert float((pictures - whole).abs().mean()) < 0.02
