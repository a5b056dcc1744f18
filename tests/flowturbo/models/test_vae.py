"""VAE folders as people have them: statistics of the latents, impossible numbers, and only the fp16 weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from export.graphs.engine_graphs import DecoderGraph, EncoderGraph
from export.graphs.onnx_files import OPSET
from export.graphs.tile_graph import HeadGraph
from export.lowbit.casting import cast_vae
from flowturbo.models.vae import load_vae
from flowturbo.onnx_tracing import trace_module
from runtime.system.errors import CheckpointError

STATISTICS = {"latents_mean": [0.5, -1.0, 0.0, 2.0], "latents_std": [2.0, 0.5, 1.0, 3.0]}


def change_config(vae: Path, folder: Path, change: Mapping[str, Any]) -> str:
    """Copy a VAE's folder with another config.json, and return its name."""
    shutil.copytree(vae, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    return str(folder)


@pytest.fixture
def latents() -> Tensor:
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def test_statistics_are_used_both_ways(vae: Path, tmp_path: Path, latents: Tensor) -> None:
    """Latents · std / scaling + mean goes to the decoder, as diffusers' pipelines have it, and encoding inverts that."""
    plain = load_vae(str(vae))
    loaded = load_vae(change_config(vae, tmp_path / "vae", {**STATISTICS, "scaling_factor": 0.5}))
    mean, std = (torch.tensor(STATISTICS[key]).reshape(1, 4, 1, 1) for key in ("latents_mean", "latents_std"))
    with torch.no_grad():
        raw: Any = plain.module
        expected = (raw.decode(latents * std / 0.5 + mean).sample / 2 + 0.5).clamp(0, 1)
        torch.testing.assert_close(loaded.decode(latents), expected)
        images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
        posterior = raw.encode(images * 2 - 1).latent_dist
        encoded_mean, encoded_std = loaded.encode(images)
        torch.testing.assert_close(encoded_mean, (posterior.mean - mean) / std * 0.5)
        torch.testing.assert_close(encoded_std, posterior.std / std * 0.5)
        torch.testing.assert_close(loaded.undo_scaling(encoded_mean), posterior.mean)


@pytest.mark.parametrize("graph_class", [DecoderGraph, HeadGraph])
def test_exported_decoders_use_the_statistics(
    vae: Path, tmp_path: Path, latents: Tensor, graph_class: type[nn.Module]
) -> None:
    loaded = load_vae(change_config(vae, tmp_path / "vae", STATISTICS))
    graph = cast_vae(loaded, graph_class, torch.float32).eval()
    outputs = ["images", "finite"] if graph_class is DecoderGraph else ["features"]
    trace_module(graph, {"latents": latents}, outputs, {"latents": {}}, opset=OPSET).save(str(tmp_path / "a.onnx"))
    session = onnxruntime.InferenceSession(str(tmp_path / "a.onnx"), providers=["CPUExecutionProvider"])
    exported = torch.from_numpy(session.run(None, {"latents": latents.numpy()})[0])
    with torch.no_grad():
        plain = cast_vae(load_vae(str(vae)), graph_class, torch.float32).eval()
        expected = loaded.decode(latents) if graph_class is DecoderGraph else graph(latents)
        without = plain(latents)
    torch.testing.assert_close(exported, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(exported, without[0] if isinstance(without, tuple) else without, atol=1e-2)
    half = cast_vae(loaded, graph_class, torch.bfloat16)
    assert half.vae.std == loaded.std  # type: ignore[union-attr]


def test_the_exported_encoder_uses_the_statistics(vae: Path, tmp_path: Path) -> None:
    plain, loaded = load_vae(str(vae)), load_vae(change_config(vae, tmp_path / "vae", STATISTICS))
    images = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        mean, _ = EncoderGraph(loaded, torch.float32)(images)
        other, _ = EncoderGraph(plain, torch.float32)(images)
    expected = (other / plain.scaling - torch.tensor(STATISTICS["latents_mean"]).reshape(1, 4, 1, 1)) * loaded.scaling
    torch.testing.assert_close(mean, expected / torch.tensor(STATISTICS["latents_std"]).reshape(1, 4, 1, 1))


def test_null_statistics_are_none(vae: Path, tmp_path: Path, latents: Tensor) -> None:
    nulls = {"latents_mean": None, "latents_std": None, "shift_factor": None}
    loaded = load_vae(change_config(vae, tmp_path / "vae", nulls))
    assert (loaded.mean, loaded.std, loaded.shift) == ((), (), 0.0)
    with torch.no_grad():
        assert torch.equal(loaded.decode(latents), load_vae(str(vae)).decode(latents))


@pytest.mark.parametrize(
    ("change", "said", "allowed"),
    [
        ({"scaling_factor": None}, "scaling_factor None", "finite number above 0"),
        ({"scaling_factor": 0}, "scaling_factor 0", "finite number above 0"),
        ({"scaling_factor": -0.2}, "scaling_factor -0.2", "finite number above 0"),
        ({"scaling_factor": float("nan")}, "scaling_factor nan", "finite number above 0"),
        ({"scaling_factor": "0.18"}, "scaling_factor '0.18'", "finite number above 0"),
        ({"scaling_factor": True}, "scaling_factor True", "finite number above 0"),
        ({"shift_factor": "x"}, "shift_factor 'x'", "finite number, or null"),
        ({"shift_factor": float("inf")}, "shift_factor inf", "finite number, or null"),
        ({"latents_mean": [0.0] * 4}, "latents_std None", "4 finite numbers above 0"),
        ({"latents_std": [1.0] * 4}, "latents_mean None", "4 finite numbers"),
        ({**STATISTICS, "latents_std": [1.0] * 3}, "latents_std [1.0, 1.0, 1.0]", "4 finite numbers above 0"),
        ({**STATISTICS, "latents_std": [1.0, 1.0, 0.0, 1.0]}, "latents_std [1.0, 1.0, 0.0, 1.0]", "above 0"),
        ({**STATISTICS, "latents_mean": [0, 0, "a", 0]}, "latents_mean [0, 0, 'a', 0]", "4 finite numbers"),
        ({**STATISTICS, "latents_mean": 1.0}, "latents_mean 1.0", "4 finite numbers"),
        ({**STATISTICS, "shift_factor": 0.1}, "shift_factor 0.1", "beside latents_mean"),
    ],
)
def test_impossible_numbers_are_refused_by_name(
    vae: Path, tmp_path: Path, change: dict[str, Any], said: str, allowed: str
) -> None:
    folder = change_config(vae, tmp_path / "vae", change)
    with pytest.raises(CheckpointError) as caught:
        load_vae(folder)
    assert folder in caught.value.given
    assert said in caught.value.given
    assert allowed in caught.value.allowed
    assert caught.value.remedy


@pytest.mark.parametrize(
    "change",
    [
        {"block_out_channels": None},
        {"_class_name": ["AutoencoderKL"]},
        {"down_block_types": [1]},
        {"_class_name": None},
    ],
)
def test_what_diffusers_stumbles_on_is_one_message(vae: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="could not be loaded from the folder") as caught:
        load_vae(change_config(vae, tmp_path / "vae", change))
    assert caught.value.allowed
    assert caught.value.remedy


def test_a_folder_with_only_a_variant_loads(vae: Path, tmp_path: Path, latents: Tensor) -> None:
    folder = tmp_path / "vae"
    plain = load_vae(str(vae))
    plain.module.half().save_pretrained(folder, variant="fp16")  # type: ignore[operator]
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json", "diffusion_pytorch_model.fp16.safetensors",
    ]  # fmt: skip
    loaded = load_vae(str(folder))
    assert {parameter.dtype for parameter in loaded.module.parameters()} == {torch.float32}
    with torch.no_grad():
        difference = np.abs(loaded.decode(latents).numpy() - load_vae(str(vae)).decode(latents).numpy())
    assert difference.max() < 5e-3
    (folder / "diffusion_pytorch_model.non_ema.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="the variants fp16, non_ema") as caught:
        load_vae(str(folder))
    assert caught.value.allowed
    assert caught.value.remedy
    shutil.copy(vae / "diffusion_pytorch_model.safetensors", folder)
    with torch.no_grad():
        assert torch.equal(load_vae(str(folder)).decode(latents), load_vae(str(vae)).decode(latents))
