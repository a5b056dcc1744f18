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

import numpy as np
import pytest
import torch
from golden import HEADS, Golden, StateDict, load_golden_state, measure_relative_difference, write_training_checkpoint
from safetensors.torch import load_file, save_file

from export.graphs.engine_graphs import make_deployable
from flowturbo.checkpoint_shards import hash_checkpoint
from flowturbo.checkpoints import Role, infer_config, load_network, resize_network, save_network
from flowturbo.models.sit import SiT, SiTConfig, build_sit_config
from runtime.system.errors import CheckpointError, RequestError

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


# Wherever the network lies


def prefixed(state: StateDict, prefix: str) -> StateDict:
    return {prefix + key: tensor for key, tensor in state.items()}


def averaged(state: StateDict) -> StateDict:
    """Other weights, as an average of them would be; positions are no weights."""
    return {key: tensor if key == "pos_embed" else tensor * 0.5 for key, tensor in state.items()}


LAYOUTS: dict[str, tuple[Callable[[StateDict], Any], str]] = {
    "compiled": (lambda s: prefixed(s, "_orig_mod."), "raw"),
    "parallel and compiled": (lambda s: {"model": prefixed(s, "module._orig_mod.")}, "raw"),
    "compiled and parallel": (lambda s: prefixed(s, "_orig_mod.module."), "raw"),
    "compiled blocks": (lambda s: {k.replace("blocks.1.", "blocks.1._orig_mod."): v for k, v in s.items()}, "raw"),
    "FSDP, full": (lambda s: {k.replace("blocks.", "_fsdp_wrapped_module.blocks."): v for k, v in s.items()}, "raw"),
    "compiled EMA": (lambda s: {"model": s, "ema": prefixed(averaged(s), "_orig_mod."), "args": {"a": 1}}, "ema"),
    "Lightning": (lambda s: {"state_dict": prefixed(s, "model."), "epoch": 3, "global_step": 10}, "raw"),
    "Lightning with EMA": (
        lambda s: {"state_dict": {**prefixed(s, "net."), **prefixed(averaged(s), "ema_net.")}},
        "ema",
    ),
    "Lightning with a VAE": (
        lambda s: {"state_dict": {**prefixed(s, "model."), "first_stage.conv.weight": torch.ones(1)}},
        "raw",
    ),
    "any prefix": (lambda s: prefixed(s, "diffusion.backbone."), "raw"),
    "model_state_dict": (lambda s: {"model_state_dict": s, "optimizer_state_dict": {}}, "raw"),
    "net and net_ema": (lambda s: {"net": s, "net_ema": averaged(s)}, "ema"),
    "params and params_ema": (lambda s: {"params": s, "params_ema": averaged(s)}, "ema"),
    "model and model_ema": (lambda s: {"model": s, "model_ema": averaged(s)}, "ema"),
    "model and ema_model": (lambda s: {"ema_model": averaged(s), "model": s}, "ema"),
    "model and ema_state_dict": (lambda s: {"model": s, "ema_state_dict": averaged(s)}, "ema"),
    "two averages": (lambda s: {"net": s, "model_ema2": s, "model_ema1": averaged(s)}, "ema"),
    "nested EMA": (lambda s: {"model": s, "ema": {"state_dict": averaged(s), "decay": 0.9999}}, "ema"),
    "empty EMA": (lambda s: {"model": s, "ema": {}}, "raw"),
    "EMA without names": (lambda s: {"model": s, "ema": {"shadow_params": list(averaged(s).values())}}, "raw"),
    "AveragedModel": (lambda s: {**prefixed(averaged(s), "module."), "n_averaged": torch.tensor(3)}, "ema"),
    "a list": (lambda s: [s, 3], "raw"),
    "deep": (lambda s: {"a": {"b": ({"c": s},)}}, "raw"),
    "tied": (lambda s: {**s, "alias": s["x_embedder.proj.bias"]}, "raw"),
    "NumPy numbers": (
        lambda s: {"model": s, "loss": np.float32(3), "step": np.int64(7), "best": np.bool_(True)},
        "raw",
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_network_is_found_wherever_it_lies(tmp_path: Path, state: StateDict, layout: str) -> None:
    write, kind = LAYOUTS[layout]
    network = load_network(saved(tmp_path / "a.pt", write(state)), "predictor", heads=6)
    assert same(network.model, averaged(state) if kind == "ema" else state)
    assert ("averaged" in network.weights) == (kind == "ema")
    if layout.startswith(("empty EMA", "EMA without")):
        assert any("`ema`" in note and "unaveraged" in note for note in network.notes)


@pytest.mark.parametrize("ema", ["ema", "model_ema", "ema_model", "ema_state_dict", "net_ema", "params_ema"])
def test_the_wanted_weights_are_taken_and_said(tmp_path: Path, state: StateDict, ema: str) -> None:
    path = saved(tmp_path / "a.pt", {"model": state, ema: averaged(state)})
    chosen = load_network(path, "predictor", heads=6)
    assert f"`{ema}`" in chosen.weights and any("`model`" in note for note in chosen.notes)
    raw = load_network(path, "predictor", heads=6, weights="model")
    assert same(raw.model, state) and "`model`" in raw.weights


def test_weights_that_are_not_there_are_not_replaced_in_silence(tmp_path: Path, state: StateDict) -> None:
    error = refusal(saved(tmp_path / "a.pt", {"model": state}), heads=6, weights="ema")
    assert "no averaged weights" in error.given and "`model`" in error.given and "--weights model" in error.remedy
    refusal(saved(tmp_path / "b.pt", {"ema": state}), heads=6, weights="model")
    assert same(load_network(saved(tmp_path / "c.pt", state), "predictor", heads=6, weights="ema").model, state)


def test_two_networks_that_nothing_tells_apart(tmp_path: Path, state: StateDict) -> None:
    error = refusal(saved(tmp_path / "a.pt", {"student": state, "teacher": averaged(state)}), heads=6)
    assert "`student`" in error.given and "`teacher`" in error.given and error.remedy


def test_the_dicts_of_a_file_without_a_network_are_listed(tmp_path: Path, state: StateDict) -> None:
    part = {key: tensor for key, tensor in state.items() if not key.startswith("y_embedder")}
    error = refusal(saved(tmp_path / "a.pt", {"inner": {"net": part}, "opt": {"m": torch.ones(2)}}), heads=6)
    assert "no y_embedder.embedding_table.weight" in error.given
    assert "`inner.net`" in error.given and "`opt`" in error.given


def test_adapters_and_flat_shards_are_named(tmp_path: Path, state: StateDict) -> None:
    lora = refusal(saved(tmp_path / "a.pt", {**state, "blocks.0.attn.qkv.lora_A.weight": torch.zeros(4, 96)}), heads=6)
    assert "LoRA" in lora.given and "merge" in lora.remedy
    flat = refusal(saved(tmp_path / "b.pt", {"_fsdp_wrapped_module._flat_param": torch.zeros(100)}), heads=6)
    assert "FSDP" in flat.given and "merge" in flat.remedy


def test_a_checkpoint_in_shards(tmp_path: Path, state: StateDict) -> None:
    names = list(state)
    files = {name: f"model-0000{1 + (i % 2)}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        save_file({n: state[n].contiguous() for n in names if files[n] == file}, tmp_path / file)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": files}))
    for path in (tmp_path, index):
        assert same(load_network(path, "predictor", heads=6).model, state)
    one_hash = hash_checkpoint(tmp_path)
    assert one_hash == hash_checkpoint(index)
    (tmp_path / files[names[0]]).unlink()
    assert "missing" in refusal(index, heads=6).given
    index.write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    assert "beside the index" in refusal(index).allowed
    index.write_text("[]")
    assert "is not an index" in refusal(index).given


def test_a_whole_module_is_converted_by_the_command_in_the_message(
    tmp_path: Path, golden_s: Golden, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = refusal(saved(tmp_path / "module.pt", golden_s.predictor))
    assert error.remedy.startswith("ask for its tensors")  # before anything unsafe
    monkeypatch.chdir(tmp_path)
    exec(error.remedy.split('python -c "')[1].removesuffix('"'))
    converted = load_network(tmp_path / "weights.pt", "predictor", heads=6)
    assert same(converted.model, dict(golden_s.predictor.state_dict()))


# What shapes do not tell


def test_positions_of_the_file_are_used_where_they_are_not_sin_cos(tmp_path: Path, state: StateDict) -> None:
    torch.manual_seed(0)
    learned = {**state, "pos_embed": torch.randn_like(state["pos_embed"])}
    network = load_network(saved(tmp_path / "learned.pt", learned), "predictor", heads=6)
    assert torch.equal(network.model.pos_embed, learned["pos_embed"])
    assert any("positions" in note for note in network.notes)
    assert resize_network(network.model, 16) is network.model
    with pytest.raises(CheckpointError, match="positions of its own") as caught:
        resize_network(network.model, 8)
    assert "16" in caught.value.allowed and "--resolution" in caught.value.remedy
    for dtype in (torch.float16, torch.bfloat16):  # the rounding of a file is no learning
        rounded = saved(tmp_path / "rounded.pt", {**state, "pos_embed": state["pos_embed"].to(dtype)})
        plain = load_network(rounded, "predictor", heads=6).model
        assert torch.equal(plain.pos_embed, SiT.build_positions(plain.config))
    own = tmp_path / "own.safetensors"
    save_network(own, network.model, role="predictor")
    assert torch.equal(load_network(own, "predictor").model.pos_embed, learned["pos_embed"])


def with_rows(state: StateDict, rows: int) -> StateDict:
    table = state["y_embedder.embedding_table.weight"]
    return {**state, "y_embedder.embedding_table.weight": table[:1].repeat(rows, 1)}


@pytest.mark.parametrize(
    ("rows", "num_classes", "classes", "has_null_label"),
    [(10, None, 9, True), (10, 10, 10, False), (10, 9, 9, True), (1000, None, 1000, False), (1, None, 1, False), (2, 2, 2, False)],
)  # fmt: skip
def test_a_label_table_with_and_without_a_null_label(
    tmp_path: Path, state: StateDict, rows: int, num_classes: int | None, classes: int, has_null_label: bool
) -> None:
    path = saved(tmp_path / "a.pt", with_rows(state, rows))
    network = load_network(path, "predictor", heads=6, num_classes=num_classes)
    config = network.model.config
    assert (config.classes, config.has_null_label) == (classes, has_null_label)
    assert any("label table" in note for note in network.notes) == (num_classes is None)
    assert SiTConfig.from_json(config.to_json()) == config
    assert ("has_null_label" in config.to_json()) != has_null_label  # older versions go on reading all others
    assert network.model(torch.zeros(1, 4, 16, 16), torch.zeros(1), torch.tensor([classes - 1])).shape[1] == 4
    assert config.find_null_label(1.0) < rows
    if not has_null_label:
        with pytest.raises(RequestError, match="null label"):
            config.find_null_label(4.0)


def test_a_number_of_classes_that_the_table_does_not_have(tmp_path: Path, state: StateDict) -> None:
    error = refusal(saved(tmp_path / "a.pt", with_rows(state, 10)), heads=6, num_classes=12)
    assert "10 rows" in error.given and "9 and a null label" in error.allowed and "--num-classes" in error.remedy


def test_missing_positions_and_heads_of_a_known_width_are_said(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = SiT(replace(build_sit_config("SiT-S/8", latent_size=32), depth=1))
    state = {key: tensor for key, tensor in model.state_dict().items() if key != "pos_embed"}
    network = load_network(saved(tmp_path / "a.pt", state), "predictor")
    assert not network.has_positions and network.model.config.latent_size == 32
    assert any("6 attention heads" in note and "SiT-S" in note for note in network.notes)


# Files of other kinds


def quantise(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor * 1000).round().clamp(-127, 127).to(torch.int8)


@pytest.mark.parametrize("ending", [".pt", ".safetensors"])
def test_quantised_files_are_refused_by_name(tmp_path: Path, state: StateDict, ending: str) -> None:
    path, key = tmp_path / f"a{ending}", "blocks.0.attn.qkv.weight"
    for content in ({**state, key: quantise(state[key])}, {**state, "blocks.0.attn.qkv.weight_scale": torch.ones(1)}):
        content = {name: tensor.contiguous() for name, tensor in content.items()}
        save_file(content, path) if ending == ".safetensors" else torch.save(content, path)
        error = refusal(path, heads=6)
        assert "is quantised" in error.given and "blocks.0.attn.qkv" in error.given and "float16" in error.allowed


def test_a_damaged_safetensors_file_keeps_its_reason(tmp_path: Path, state: StateDict) -> None:
    path = tmp_path / "a.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, path)
    path.write_bytes(path.read_bytes() + bytes(64))
    error = refusal(path, heads=6)
    assert "damaged safetensors" in error.given and "not fully covered" in error.given.lower().replace("_", " ")


@pytest.mark.parametrize(
    ("content", "kind"),
    [(b"version https://git-lfs.github.com/spec/v1\noid", "LFS"), (b"<!DOCTYPE html><html>", "web page"), (b"GGUF\x03", "GGUF")],
)  # fmt: skip
def test_files_that_look_like_something_else_are_named(tmp_path: Path, content: bytes, kind: str) -> None:
    path = tmp_path / "a.pt"
    path.write_bytes(content)
    assert kind in refusal(path).given


def test_key_tensors_of_other_dimensions(tmp_path: Path, state: StateDict) -> None:
    path = saved(tmp_path / "a.pt", {**state, "x_embedder.proj.weight": torch.zeros(96, 16)})
    assert "x_embedder.proj.weight has the shape" in refusal(path, heads=6).given
    path = saved(tmp_path / "b.pt", {**state, "pos_embed": torch.zeros(64)})
    refusal(path, heads=6)


def test_hostile_containers_end_soon(tmp_path: Path, state: StateDict) -> None:
    loop: dict[str, Any] = {"model": state}
    loop["again"] = [loop] * 50
    assert same(load_network(saved(tmp_path / "loop.pt", loop), "predictor", heads=6).model, state)
    nested: list[Any] = [1]
    for _ in range(7):
        nested = [nested] * 20
    assert "holds no tensors" in refusal(saved(tmp_path / "nested.pt", nested)).given
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": index.name}}))
    refusal(index)


def test_blocks_that_are_missing_and_tensors_without_numbers(tmp_path: Path, state: StateDict) -> None:
    far = {**state, "blocks.900000.mlp.fc1.bias": torch.zeros(1)}
    assert "missing: blocks.3" in refusal(saved(tmp_path / "a.pt", far), heads=6).given
    key = "blocks.0.mlp.fc1.bias"
    for tensor in (torch.zeros(384, device="meta"), torch.zeros(384).to_sparse()):
        assert key in refusal(saved(tmp_path / "b.pt", {**state, key: tensor}), heads=6).given
