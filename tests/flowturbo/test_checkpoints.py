"""Checkpoints: every known form is read, nothing in a file is executed, and what does not fit is named."""

from __future__ import annotations

import json
import os
import pickle
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from golden import HEADS, Golden, StateDict, load_golden_state, measure_relative_difference, write_training_checkpoint
from safetensors.torch import load_file, save_file

from export.graphs.engine_graphs import make_deployable
from flowturbo.checkpoints import Role, infer_config, load_network, save_network
from flowturbo.models.sit import SiT, build_sit_config
from runtime.system.errors import CheckpointError

ROLES: tuple[Role, ...] = ("predictor", "refiner")


@pytest.fixture
def state() -> StateDict:
    return load_golden_state("golden_s", "predictor")


def same(model: SiT, state: StateDict) -> bool:
    return all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items() if key != "pos_embed")


def refusal(path: Path, role: Role = "predictor", **options: Any) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        load_network(path, role, **options)
    assert str(path) in caught.value.given
    assert caught.value.allowed or caught.value.remedy
    return caught.value


def saved(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


@pytest.mark.parametrize("role", ROLES)
def test_the_shape_is_read_off_the_tensors(role: Role, checkpoints: Path, golden: Golden) -> None:
    depth, width, heads, latent, patch, classes, sigma = (int(value) for value in golden.arrays["config"])
    name = golden.name
    config = load_network(checkpoints / f"{name}-{role}.pt", role, heads=HEADS[name]).model.config
    assert (config.width, config.heads, config.latent_size, config.patch, config.classes) == (
        width,
        heads,
        latent,
        patch,
        classes,
    )
    assert config.depth == (depth if role == "predictor" else 1)
    assert config.learned_sigma == bool(sigma)
    assert (config.in_channels, config.out_channels) == ((4, 4) if role == "predictor" else (8, 4))
    assert config.mlp_width == 4 * width


@pytest.mark.parametrize("name", ["SiT-S/2", "SiT-B/4", "SiT-L/8", "SiT-XL/1"])
def test_heads_of_released_models_are_known(name: str) -> None:
    config = build_sit_config(name)
    with torch.device("meta"):
        assert infer_config(Path("x.pt"), SiT(config).state_dict()) == config


def test_heads_that_cannot_be_seen_are_asked_for(checkpoints: Path) -> None:
    path = checkpoints / "golden_s-predictor.pt"
    error = refusal(path)
    assert "width 96" in error.given
    assert "--heads" in error.remedy
    assert "5 does not divide" in refusal(path, heads=5).given


def test_a_training_checkpoint_gives_its_averaged_weights(tmp_path: Path, state: StateDict) -> None:
    raw = {key: tensor + 1 for key, tensor in state.items()}
    path = write_training_checkpoint(tmp_path / "0400000.pt", ema=state, model=raw)
    assert same(load_network(path, "predictor", heads=6).model, state)
    assert same(load_network(path, "predictor", heads=6, weights="model").model, raw)


def test_a_training_checkpoint_without_average(tmp_path: Path, state: StateDict) -> None:
    assert same(load_network(saved(tmp_path / "a.pt", {"model": state, "steps": 3}), "predictor", heads=6).model, state)


def test_names_of_a_parallel_run(tmp_path: Path, state: StateDict) -> None:
    path = saved(tmp_path / "a.pt", {f"module.{key}": tensor for key, tensor in state.items()})
    assert same(load_network(path, "predictor", heads=6).model, state)


def test_a_checkpoint_in_the_old_torch_format(tmp_path: Path, state: StateDict) -> None:
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert same(load_network(tmp_path / "old.pt", "predictor", heads=6).model, state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_any_precision_are_read_as_float32(tmp_path: Path, state: StateDict, dtype: torch.dtype) -> None:
    path = saved(tmp_path / "a.pt", {key: tensor.to(dtype) for key, tensor in state.items()})
    model = load_network(path, "predictor", heads=6).model
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}


def repa(state: StateDict) -> StateDict:
    """A REPA checkpoint: projector heads beside the network."""
    heads = {"projectors.0.0.weight": torch.zeros(8, 96), "projectors.0.0.bias": torch.zeros(8)}
    return {**state, **heads}


def test_repa_heads_are_named_and_dropped_and_its_time_is_turned(
    tmp_path: Path, golden_s: Golden, state: StateDict
) -> None:
    network = load_network(
        saved(tmp_path / "repa.pt", {"ema": repa(state), "model": repa(state), "steps": 1}), "predictor", heads=6
    )
    assert network.dropped == ("projectors.0.0.bias", "projectors.0.0.weight")
    assert network.model.config.time_direction == "data-to-noise"
    x, t, y = (golden_s.read_tensor(name) for name in "xty")
    assert measure_relative_difference(network.model(x, t, y), -golden_s.predictor(x, 1 - t, y)) < 1e-5


def test_the_direction_of_time_can_be_named(tmp_path: Path, checkpoints: Path, state: StateDict) -> None:
    plain = load_network(checkpoints / "golden_s-predictor.pt", "predictor", heads=6, time_direction="data-to-noise")
    assert plain.model.config.time_direction == "data-to-noise"
    path = saved(tmp_path / "repa.pt", repa(state))
    assert (
        load_network(path, "predictor", heads=6, time_direction="noise-to-data").model.config.time_direction
        == "noise-to-data"
    )


def test_our_own_files_carry_what_shapes_do_not_tell(tmp_path: Path, golden_s: Golden) -> None:
    path, facts = tmp_path / "mine.safetensors", {"classes": {"207": "golden retriever"}, "guidance": 2.5, "vae": "ema"}
    turned = SiT(replace(golden_s.predictor.config, time_direction="data-to-noise"))
    turned.load_state_dict(golden_s.predictor.state_dict())
    save_network(path, turned, role="predictor", extra=facts)
    network = load_network(path, "predictor")  # neither heads nor direction named
    assert network.model.config == turned.config
    assert {key: network.metadata[key] for key in facts} == facts
    assert same(network.model, dict(golden_s.predictor.state_dict()))
    assert load_network(path, "predictor", heads=4).model.config.heads == 4


def test_safetensors_of_others(tmp_path: Path, state: StateDict) -> None:
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, tmp_path / "a.safetensors")
    assert same(load_network(tmp_path / "a.safetensors", "predictor", heads=6).model, state)


def test_saving_is_whole_or_not_at_all(tmp_path: Path, golden_s: Golden) -> None:
    save_network(tmp_path / "a.safetensors", golden_s.refiner, role="refiner")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors"]
    assert set(load_file(tmp_path / "a.safetensors")) == set(golden_s.refiner.state_dict())


class Malicious:
    """Runs a command when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("form", ["torch", "old torch", "pickle"])
def test_nothing_in_a_file_is_executed(tmp_path: Path, state: StateDict, form: str) -> None:
    mark, path = tmp_path / "executed", tmp_path / "evil.pt"
    content = {"ema": state, "args": Malicious(mark)}
    if form == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "torch")
    error = refusal(path, heads=6)
    assert not mark.exists()
    if form != "pickle":
        assert "could run code" in error.given
        assert "system" in error.given
        assert "argparse.Namespace" in error.allowed
        assert "python -c" in error.remedy


class Unknown:
    """A class that this package does not know; harmless, but not on the list."""


def test_unknown_classes_are_refused_with_the_command_that_converts(tmp_path: Path, state: StateDict) -> None:
    path = saved(tmp_path / "theirs.pt", {"ema": state, "config": Unknown()})
    error = refusal(path)
    assert "Unknown" in error.given
    command = error.remedy.split('python -c "')[1].removesuffix('"')
    here = Path.cwd()
    os.chdir(tmp_path)
    try:
        exec(command)  # what the message tells the user to run, where they trust the file
    finally:
        os.chdir(here)
    assert same(load_network(tmp_path / "weights.pt", "predictor", heads=6).model, state)


@pytest.mark.parametrize(("role", "other"), [("predictor", "refiner"), ("refiner", "predictor")])
def test_a_network_named_as_the_other_one(checkpoints: Path, role: Role, other: Role) -> None:
    error = refusal(checkpoints / f"golden_s-{role}.pt", other, heads=6)
    assert f"is a {role}" in error.given
    assert f"name a {other} here" in error.remedy and f"a {role} is asked for" in error.remedy


def altered(key: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[StateDict], StateDict]:
    return lambda state: {**state, key: change(state[key])}


BAD_STATES: list[tuple[str, Callable[[StateDict], StateDict], str]] = [
    ("nan", altered("blocks.1.mlp.fc1.bias", lambda t: t * torch.nan), "NaN or infinity in blocks.1.mlp.fc1.bias"),
    ("infinity", altered("final_layer.linear.weight", lambda t: t / 0), "NaN or infinity in final_layer.linear.weight"),
    (
        "missing",
        lambda s: {k: v for k, v in s.items() if k != "blocks.2.attn.qkv.bias"},
        "missing: blocks.2.attn.qkv.bias",
    ),
    ("unknown", lambda s: {**s, "blocks.0.attn.q_norm.weight": torch.ones(16)}, "unknown: blocks.0.attn.q_norm.weight"),
    ("shape", altered("blocks.0.attn.proj.bias", lambda t: t[:-1]), "of another shape: blocks.0.attn.proj.bias"),
    ("no SiT", lambda s: {"conv.weight": torch.ones(3, 3)}, "is not a SiT: no x_embedder.proj.weight"),
    ("patch", altered("x_embedder.proj.weight", lambda t: t.repeat(1, 1, 2, 2)[..., :3, :3]), "patch size 3"),
    ("channels", altered("x_embedder.proj.weight", lambda t: t[:, :3]), "reads 3 channels"),
    ("not square", altered("pos_embed", lambda t: t[:, :60]), "60 positions"),
    ("no tensors", lambda s: {"epoch": 3}, "holds no tensors"),  # type: ignore[dict-item]
    ("empty", lambda s: {}, "holds no tensors"),
]


@pytest.mark.parametrize(
    ("change", "message"), [(c, m) for _, c, m in BAD_STATES], ids=[name for name, *_ in BAD_STATES]
)
def test_what_does_not_fit_is_named(
    tmp_path: Path, state: StateDict, change: Callable[[StateDict], StateDict], message: str
) -> None:
    assert message in refusal(saved(tmp_path / "bad.pt", change(state)), heads=6).given


def test_no_block_at_all(tmp_path: Path, state: StateDict) -> None:
    refusal(saved(tmp_path / "bad.pt", {k: v for k, v in state.items() if not k.startswith("blocks.")}), heads=6)


@pytest.mark.parametrize(
    "content", [b"", b"just text, no checkpoint\n", b"PK\x03\x04 cut off", b"\x80\x02}q\x00.", bytes(1000), b"{}" + bytes(100)],
    ids=["empty", "text", "cut zip", "empty dict", "zeros", "json"],
)  # fmt: skip
@pytest.mark.parametrize("ending", [".pt", ".safetensors"])
def test_files_that_are_no_checkpoints(tmp_path: Path, content: bytes, ending: str) -> None:
    path = tmp_path / f"bad{ending}"
    path.write_bytes(content)
    refusal(path)


@pytest.mark.parametrize("fraction", [0.01, 0.5, 0.98])
def test_a_cut_file(tmp_path: Path, state: StateDict, checkpoints: Path, fraction: float) -> None:
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, tmp_path / "whole.safetensors")
    for whole in (checkpoints / "golden_s-predictor.pt", tmp_path / "whole.safetensors"):
        content = whole.read_bytes()
        path = tmp_path / f"cut{whole.suffix}"
        path.write_bytes(content[: int(len(content) * fraction)])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert "cut short" in refusal(path).given


def test_no_file_and_a_folder(tmp_path: Path) -> None:
    assert "no checkpoint" in refusal(tmp_path / "nowhere.pt").given
    assert "no checkpoint" in refusal(tmp_path).given


@pytest.mark.parametrize(
    "metadata",
    [
        {"flowturbo": "not json"},
        {"flowturbo": "[]"},
        {"flowturbo": '{"config": {"depth": 1}}'},
        {"flowturbo": '{"config": {"colour": 1}}'},
    ],
)
def test_metadata_that_was_damaged(tmp_path: Path, state: StateDict, metadata: dict[str, str]) -> None:
    path = tmp_path / "a.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, path, metadata=metadata)
    assert "metadata" in refusal(path, heads=6).given


@pytest.mark.parametrize("patch", [1, 2, 4])
def test_cutting_unused_variance_channels_changes_nothing(patch: int) -> None:
    torch.manual_seed(0)
    model = SiT(build_sit_config("SiT-S/2", latent_size=8, classes=3)).eval()
    config = replace(model.config, depth=1, width=32, heads=2, mlp_width=0, patch=patch)
    model = SiT(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.copy_(0.2 * torch.randn_like(parameter))
    x, t, y = torch.randn(2, 4, 8, 8), torch.rand(2), torch.tensor([0, 3])
    expected = model(x, t, y)
    pruned = make_deployable(model)
    assert not pruned.config.learned_sigma
    assert pruned.final_layer.linear.weight.shape[0] == 4 * patch**2
    assert measure_relative_difference(pruned(x, t, y), expected) < 1e-5
    assert model.config.learned_sigma  # the original is as it was
    assert measure_relative_difference(model(x, t, y), expected) == 0


def test_our_own_training_checkpoints_load(tmp_path: Path, golden_s: Golden) -> None:
    model = golden_s.predictor
    state = model.state_dict()
    tensors = {f"ema.{key}": value.clone() for key, value in state.items()}
    tensors |= {f"model.{key}": torch.zeros_like(value) for key, value in state.items()}
    config = {"model": model.config.to_json(), "provenance": {"vae_factor": 4}}
    save_file(tensors, tmp_path / "step.safetensors", {"flowturbo-training": json.dumps({"step": 1, "config": config})})
    averaged = load_network(tmp_path / "step.safetensors", "predictor")
    assert averaged.metadata["vae_factor"] == 4
    torch.testing.assert_close(averaged.model.state_dict(), state)
    raw = load_network(tmp_path / "step.safetensors", "predictor", weights="model").model
    assert not raw.final_layer.linear.weight.any()


def test_a_file_that_knows_its_heads_keeps_them(tmp_path: Path, checkpoints: Path) -> None:
    model = load_network(checkpoints / "golden_s-predictor.pt", "predictor", heads=3).model
    save_network(tmp_path / "three.safetensors", model, role="predictor")
    assert load_network(tmp_path / "three.safetensors", "predictor", likely_heads=6).model.config.heads == 3
