"""The network: released sizes, positions, and the conventions that checkpoints differ in."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from golden import Golden, measure_relative_difference

from flowturbo.checkpoints import resize_network
from flowturbo.models.sit import (
    MODEL_NAMES,
    PATCH_SIZES,
    SiT,
    SiTConfig,
    build_refiner_config,
    build_sincos_positions,
    build_sit_config,
    find_num_heads,
)

SMALL = SiTConfig(depth=2, width=32, heads=2, patch=2, latent_size=8, classes=5)


def drawn(config: SiTConfig, seed: int = 0) -> SiT:
    """Every weight random: a new SiT gives zeros, as adaLN-zero starts it."""
    torch.manual_seed(seed)
    model = SiT(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.copy_(0.2 * torch.randn_like(parameter))
    return model


def inputs(config: SiTConfig, rows: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    x = torch.randn(rows, config.in_channels, config.latent_size, config.latent_size)
    return x, torch.rand(rows), torch.randint(0, config.classes + 1, (rows,))


def parameters_on_paper(config: SiTConfig) -> int:
    """Counted from the paper's description of the network, layer by layer."""
    d, p, c = config.width, config.patch**2, config.out_channels * (2 if config.learned_sigma else 1)

    def linear(inside: int, outside: int) -> int:
        return (inside + 1) * outside

    embedders = linear(p * config.in_channels, d) + linear(256, d) + linear(d, d) + (config.classes + 1) * d
    block = linear(d, 3 * d) + linear(d, d) + linear(d, 4 * d) + linear(4 * d, d) + linear(d, 6 * d)
    return embedders + config.depth * block + linear(d, p * c) + linear(d, 2 * d)


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_sizes_of_the_released_models(name: str) -> None:
    config = build_sit_config(name)
    with torch.device("meta"):
        model = SiT(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters_on_paper(config)
    assert model.pos_embed.shape == (1, (32 // config.patch) ** 2, config.width)


@pytest.mark.parametrize(("name", "millions"), [("SiT-S/2", 33), ("SiT-B/2", 130), ("SiT-L/2", 458), ("SiT-XL/2", 675)])
def test_published_sizes(name: str, millions: int) -> None:
    with torch.device("meta"):
        model = SiT(build_sit_config(name))
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6) == millions


def test_the_refiner_is_about_a_twentieth_of_the_predictor() -> None:
    config = build_sit_config("SiT-XL/2")
    with torch.device("meta"):
        sizes = [sum(p.numel() for p in SiT(c).parameters()) for c in (build_refiner_config(config), config)]
    assert 0.04 < sizes[0] / sizes[1] < 0.06
    assert build_refiner_config(config).is_refiner
    assert not config.is_refiner


@pytest.mark.parametrize("name", ["SiT-M/2", "SiT-B/3", "B/2", ""])
def test_unknown_names_list_the_known(name: str) -> None:
    with pytest.raises(ValueError, match="SiT-XL/2"):
        build_sit_config(name)


@pytest.mark.parametrize("patch", PATCH_SIZES)
@pytest.mark.parametrize("learned_sigma", [False, True])
def test_every_patch_size_keeps_the_shape(patch: int, learned_sigma: bool) -> None:
    config = replace(SMALL, patch=patch, learned_sigma=learned_sigma)
    x, t, y = inputs(config)
    assert drawn(config)(x, t, y).shape == (3, 4, 8, 8)
    refiner = drawn(build_refiner_config(config))
    assert refiner(torch.cat([x, x], dim=1), t, y).shape == (3, 4, 8, 8)


@pytest.mark.parametrize("patch", [1, 2, 4])
def test_patches_are_a_convolution(patch: int) -> None:
    config = replace(SMALL, patch=patch)
    embed, x = drawn(config).x_embedder, inputs(config)[0]
    convolved = embed.proj(x).flatten(2).transpose(1, 2)
    torch.testing.assert_close(embed(x), convolved, rtol=1e-5, atol=1e-5)


def test_a_patch_lands_where_it_came_from() -> None:
    """Tokens laid out as (row, column, channel) in a patch, as the released final layers have them."""
    model = drawn(replace(SMALL, learned_sigma=False))
    tokens = torch.arange(16.0 * 16).reshape(1, 16, 16)  # 4 × 4 tokens of 2·2·4 numbers
    image = model._unpatchify(tokens)
    for row, column, channel in [(0, 0, 0), (3, 5, 2), (7, 7, 3), (6, 1, 1)]:
        token = row // 2 * 4 + column // 2
        inside = (row % 2 * 2 + column % 2) * 4 + channel
        assert image[0, channel, row, column] == tokens[0, token, inside]


def test_a_new_network_gives_zero() -> None:
    x, t, y = inputs(SMALL)
    assert not SiT(SMALL)(x, t, y).any()


def test_forward_is_conditioning_and_trunk(golden: Golden) -> None:
    x, t, y = (golden.read_tensor(name) for name in "xty")
    mods = golden.predictor.conditioning(t, y)
    assert mods.shape == (len(x), golden.predictor.config.modulations)
    torch.testing.assert_close(golden.predictor.trunk(x, mods), golden.predictor(x, t, y), rtol=0, atol=0)


def test_attention_written_out_is_the_same() -> None:
    model, (x, t, y) = drawn(SMALL), inputs(SMALL)
    fused = model(x, t, y)
    for block in model.blocks:
        block.attn.is_unfused = True
    assert measure_relative_difference(model(x, t, y), fused) < 1e-5


def test_a_network_whose_time_runs_backwards_is_flipped_inside() -> None:
    """REPA's networks go from data (0) to noise (1) and give noise − data: v(x, t) = −net(x, 1 − t)."""
    forwards = drawn(SMALL)
    backwards = SiT(replace(SMALL, time_direction="data-to-noise")).eval()
    backwards.load_state_dict(forwards.state_dict())
    x, t, y = inputs(SMALL)
    torch.testing.assert_close(backwards(x, t, y), -forwards(x, 1 - t, y), rtol=1e-5, atol=1e-6)
    assert measure_relative_difference(backwards(x, t, y).detach(), forwards(x, t, y)) > 0.1


@pytest.mark.parametrize(("side", "width"), [(8, 64), (8, 96), (3, 8)])
def test_positions_are_the_released_formula(side: int, width: int) -> None:
    """Channels: sin and cos of the column, then sin and cos of the row, frequencies 10000^(−4k/D)."""
    found = build_sincos_positions(side, width)[0].numpy()
    quarter = width // 4
    for row, column in [(0, 0), (1, 2), (side - 1, 1)]:
        for k in (0, quarter // 2, quarter - 1):
            omega = 10000.0 ** (-4 * k / width)
            expected = [np.sin(column * omega), np.cos(column * omega), np.sin(row * omega), np.cos(row * omega)]
            values = found[row * side + column]
            np.testing.assert_allclose(
                [values[k], values[quarter + k], values[2 * quarter + k], values[3 * quarter + k]], expected, atol=1e-6
            )


def test_positions_are_the_checkpoints(golden: Golden) -> None:
    torch.testing.assert_close(golden.predictor.pos_embed, golden.read_tensor("predictor/pos_embed"), rtol=0, atol=2e-6)


@pytest.mark.parametrize("latent_size", [4, 8, 24, 32])
def test_another_resolution_has_its_own_positions_and_the_same_weights(golden_s: Golden, latent_size: int) -> None:
    model = resize_network(golden_s.predictor, latent_size)
    assert model.config == golden_s.predictor.config.with_latent_size(latent_size)
    torch.testing.assert_close(model.pos_embed, build_sincos_positions(latent_size // 2, 96), rtol=0, atol=0)
    assert (
        model.blocks[0].attn.qkv.weight.data_ptr() == golden_s.predictor.blocks[0].attn.qkv.weight.data_ptr()
    )  # no second copy
    out = model(torch.zeros(1, 4, latent_size, latent_size), torch.zeros(1), torch.zeros(1, dtype=torch.long))
    assert out.shape == (1, 4, latent_size, latent_size)
    assert golden_s.predictor.config.latent_size == 16
    assert resize_network(golden_s.predictor, 16) is golden_s.predictor


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 5}, "heads 5"),
        ({"width": 30, "heads": 2}, "multiple of 4"),
        ({"latent_size": 9}, "latent size 9"),
        ({"patch": 16}, "patch 16"),
    ],
)
def test_shapes_that_cannot_be(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **change)


def test_configuration_goes_to_json_and_back() -> None:
    config = replace(SMALL, time_direction="data-to-noise", mlp_width=80)
    assert SiTConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    with pytest.raises(ValueError, match="colour"):
        SiTConfig.from_json(config.to_json() | {"colour": 1})


def test_heads_of_released_widths() -> None:
    assert {width: find_num_heads(width) for width in (384, 768, 1024, 1152)} == {384: 6, 768: 12, 1024: 16, 1152: 16}
    assert find_num_heads(96) is None
