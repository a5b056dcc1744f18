"""What a build takes from checkpoints, assumes, prints and records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from golden import load_golden_state

from export.build import build
from export.build_request import BuildRequest, find_index, resolve_request
from export.cli.export import main
from export.model import load_model
from runtime.directory.manifest import read_manifest
from runtime.directory.records import ModelRecord
from runtime.pipeline import Pipeline
from runtime.request import resolve_request as resolve_pictures
from runtime.system.errors import CheckpointError, RequestError
from runtime.system.json_codec import from_json, to_json

TABLE = "y_embedder.embedding_table.weight"


def write_checkpoint(folder: Path, content: Any) -> Path:
    torch.save(content, folder / "net.pt")
    return folder / "net.pt"


def request_build(path: Path, **options: Any) -> BuildRequest:
    defaults: dict[str, Any] = {"vaes": ["none"], "heads": 4, "targets": ["cpu"], "max_batch": 2}
    return resolve_request(predictor=path, **(defaults | options))


def load_state() -> dict[str, torch.Tensor]:
    return load_golden_state("golden_nosigma", "predictor")


def test_the_weights_that_were_taken_are_recorded(tmp_path: Path) -> None:
    state = load_state()
    path = write_checkpoint(tmp_path, {"model": state, "model_ema": {k: v * 0.5 for k, v in state.items()}})
    averaged, raw = request_build(path), request_build(path, weights="model")
    assert averaged.key != raw.key
    for request, key, head in ((averaged, "model_ema", 0.5), (raw, "model", 1.0)):
        model = load_model(request)
        record = model.make_record(request)
        assert f"`{key}`" in record.weights["predictor"]
        assert any(f"`{key}`" in note and "were taken" in note for note in model.notes)
        weight = model.predictor.model.final_layer.linear.weight
        torch.testing.assert_close(weight, head * state["final_layer.linear.weight"])
    with pytest.raises(RequestError, match="ema, model"):
        request_build(path, weights="best")


def test_a_model_without_a_null_label_is_built_and_refuses_guidance(tmp_path: Path) -> None:
    rows = load_state()[TABLE].shape[0]
    path = write_checkpoint(tmp_path, load_state())
    build(request_build(path, num_classes=rows), tmp_path / "engines")
    manifest = read_manifest(tmp_path / "engines")
    assert not manifest.model.has_null_label and sorted(manifest.model.classes) == list(range(rows))
    assert manifest.defaults.guidance == 1
    with pytest.raises(RequestError, match="without a null label") as caught:
        resolve_pictures(manifest, rows - 1, {"guidance": 4.0})
    assert caught.value.allowed.startswith("1") and "--negative-class" in caught.value.remedy
    assert (
        resolve_pictures(manifest, 0, {"guidance": 2.0, "negative": rows - 1}).conditions[0].negative_label == rows - 1
    )
    with Pipeline.load(tmp_path / "engines") as pipeline:
        result = pipeline.run(pipeline.request(rows - 1))
        assert result.latents.shape[0] == 1


def test_one_row_is_one_class_without_guidance(tmp_path: Path) -> None:
    state = load_state()
    path = write_checkpoint(tmp_path, {**state, TABLE: state[TABLE][:1].clone()})
    model = load_model(request_build(path))
    record = model.make_record(request_build(path))
    assert (list(record.classes), record.null_label, record.has_null_label) == ([0], 0, False)
    assert any("without guidance" in note for note in model.notes)


def test_a_resolution_that_was_assumed_is_said(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, {k: v for k, v in load_state().items() if k != "pos_embed"})
    assert any("256 px are assumed" in note for note in load_model(request_build(path)).notes)
    assert not any("assumed, latents" in note for note in load_model(request_build(path, resolutions=[64])).notes)


def test_learned_positions_are_built_at_their_own_resolution_only(tmp_path: Path) -> None:
    state = load_state()
    torch.manual_seed(0)
    path = write_checkpoint(tmp_path, {**state, "pos_embed": torch.randn_like(state["pos_embed"])})
    model = load_model(request_build(path))
    assert model.resolve_resolutions(()) == model.resolve_resolutions((64,)) == (64,)
    with pytest.raises(RequestError, match="positions of its own") as caught:
        model.resolve_resolutions((64, 128))
    assert caught.value.allowed.startswith("64") and "--resolution" in caught.value.remedy


def test_a_checkpoint_that_is_no_sit_is_a_message_and_no_traceback(tmp_path: Path) -> None:
    state = load_state()
    key = "blocks.0.attn.qkv.weight"
    path = write_checkpoint(tmp_path, {**state, key: (state[key] * 99).to(torch.int8)})
    command = ["build-engines", "--predictor", str(path), "--heads", "4", "--vae", "none", "--target", "cpu"]
    result = CliRunner().invoke(main, [*command, "--out", str(tmp_path / "engines")])
    assert result.exit_code == 1 and "is quantised" in result.output + (result.stderr or "")
    assert not (tmp_path / "engines").exists()


def test_a_folder_of_shards_is_hashed_as_a_whole(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="which is a folder") as caught:
        request_build(tmp_path)
    assert "index.json" in caught.value.allowed and find_index(tmp_path) is None


def test_records_of_older_directories_read(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, load_state())
    request = request_build(path)
    data = to_json(load_model(request).make_record(request))
    del data["weights"], data["has_null_label"]
    record = from_json(ModelRecord, data)
    assert record.has_null_label and record.weights == {}
