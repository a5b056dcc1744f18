"""The training of the demo model: all stages from nothing, a resumed call, more hours, and what cannot be done."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from recorded_progress import RecordedProgress
from training_data import write_photographs

from flowturbo.checkpoints import load_network
from flowturbo.demo.train import (
    RECORD_FILE,
    SIZES,
    DemoSettings,
    DemoSize,
    DemoTraining,
    Stage,
    StageRecord,
    list_stages,
    main,
)
from flowturbo.evaluation.quality.populations import load_pack
from flowturbo.models.vae import load_vae
from flowturbo.training.training_state import list_checkpoints
from runtime.system.errors import DataError, RequestError, TrainingError

TINY = DemoSize(
    "--patch 8 --width 16 --depth 1 --heads 2 --no-learned-sigma --times logit-normal --optimizer muon --batch-size 2",
    autoencoder="--crop 16 --channels 16,16,16 --latent-channels 8 --batch-size 2 --lr 1e-3 --ema 0.9",
    refiner="--batch-size 2",
    warmup=1,
    probe=4,
    epochs=1,
    measure="--num 2 --steps 2 --guidance 2",
)
HOURS = 1e-4


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("photographs")
    for part, count in (("train", 32), ("val", 6)):
        write_photographs(root / part, ("n02099601", "n02086240"), count, 64)
    return root


class KilledTraining(DemoTraining):
    """A training that dies in its fourth call, after steps that the record does not know of."""

    calls = 0

    def _call(self, stage: Stage, length: tuple[str, ...]) -> None:
        super()._call(stage, length)
        self.calls += 1
        if self.calls == 4:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> DemoSettings:
    """A finished training that was killed in its second stage."""
    settings = DemoSettings(data, tmp_path_factory.mktemp("demo") / "with a space", HOURS, device="cpu")
    with pytest.raises(KeyboardInterrupt):
        KilledTraining(settings, TINY).run()
    stages = read_stages(settings)
    assert stages["vae"]["finished"]
    assert not stages["vae-ema"]["finished"]
    assert stages["vae-ema"]["steps"] < list_checkpoints(settings.out / "vae-ema")[-1][0]
    DemoTraining(settings, TINY).run()
    return settings


def read_stages(settings: DemoSettings) -> dict[str, dict[str, Any]]:
    stages: dict[str, dict[str, Any]] = json.loads((settings.out / RECORD_FILE).read_text())["stages"]
    return stages


def test_all_files_of_the_package_are_there(trained: DemoSettings) -> None:
    package = trained.out / "package"
    predictor = load_network(package / "predictor.safetensors", "predictor")
    assert predictor.metadata["classes"]["207"] == "golden retriever"
    assert (predictor.metadata["guidance"], predictor.metadata["vae_factor"]) == (4, 4)
    assert load_network(package / "refiner.safetensors", "refiner").model.config.depth == 1
    assert {load_vae(str(package / f"vae-{kind}")).channels for kind in ("ema", "mse")} == {8}
    assert load_pack(package / "reference.npz").origin.count == 12
    assert json.loads((trained.out / "measure" / "measure.json").read_text())["images"] == 4


def test_the_record_says_what_was_done(trained: DemoSettings) -> None:
    stages = read_stages(trained)
    assert list(stages) == [stage.name for stage in list_stages(trained, TINY)]
    assert all(stage["finished"] for stage in stages.values())
    for name in ("vae", "vae-ema", "vae-mse", "sit", "refiner"):
        steps = stages[name]["steps"]
        assert steps == stages[name]["total_steps"] == list_checkpoints(trained.out / name)[-1][0]
        assert stages[name]["rate"] > 0
    assert all(isinstance(stages[name]["psnr_db"], float) for name in ("vae", "vae-ema", "vae-mse"))


def test_a_second_call_does_nothing(trained: DemoSettings) -> None:
    before, progress = read_stages(trained), RecordedProgress()
    DemoTraining(trained, TINY, progress).run()
    assert read_stages(trained) == before
    assert len(progress.lines) == len(before)
    assert all("done before" in line for line in progress.lines)


def test_more_hours_train_the_networks_on_and_pack_them_again(trained: DemoSettings) -> None:
    before, progress = read_stages(trained), RecordedProgress()
    longer = replace(trained, budget_hours=trained.budget_hours * 30)
    DemoTraining(longer, TINY, progress).run()
    after = read_stages(trained)
    same = [name for name in before if before[name] == after[name]]
    assert same == ["vae", "vae-ema", "vae-mse", "latents", "extractor", "reference"]
    assert after["sit"]["total_steps"] > before["sit"]["total_steps"]
    assert after["measure"]["version"] == before["measure"]["version"] + 1
    # It went on from before the decay: no step is in the metrics twice, and none is missing.
    metrics = (trained.out / "sit" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in metrics] == list(range(after["sit"]["total_steps"]))
    assert any("steps/s" in line for line in progress.lines)


def test_an_autoencoder_that_trains_on_makes_everything_again(data: Path, trained: DemoSettings) -> None:
    """By the plan alone: what needs it starts again, what does not stays."""
    training = DemoTraining(replace(trained, from_stage="vae"), TINY)
    training._save("vae", replace(training._record("vae"), version=training._record("vae").version + 1))
    progress = training.progress = RecordedProgress()
    training.run()
    again = [line for line in progress.lines if "starts again" in line]
    assert [line.split()[1] for line in again] == ["vae-ema:", "vae-mse:", "sit:"]
    assert list_checkpoints(trained.out / "sit.old")
    assert "vae: done before" in progress.lines[0]


def test_psnr_of_a_folder_and_of_a_run(data: Path, trained: DemoSettings) -> None:
    values = []
    for folder in ("vae/vae", "vae"):
        words = ["psnr", "--vae", str(trained.out / folder), "--data", str(data), "--num", "7"]
        result = CliRunner().invoke(main, words)
        assert result.exit_code == 0, result.output
        values.append(json.loads(result.stdout)["psnr_db"])
    assert values[0] == pytest.approx(values[1], abs=0.01)


def test_what_cannot_be_trained_is_said_at_once(data: Path, tmp_path: Path) -> None:
    settings = DemoSettings(data, tmp_path / "out", HOURS)
    with pytest.raises(DataError, match="no data folder"):
        DemoTraining(replace(settings, data=data / "train"), TINY)
    with pytest.raises(RequestError, match="--from-stage dogs") as unknown:
        DemoTraining(replace(settings, from_stage="dogs"), TINY)
    assert "vae, vae-ema, vae-mse, latents, sit" in unknown.value.allowed
    with pytest.raises(RequestError, match="but vae is not finished"):
        DemoTraining(replace(settings, from_stage="sit"), TINY)
    DemoTraining(settings, TINY)._save("vae", StageRecord())
    with pytest.raises(TrainingError, match="of --size small, not base"):
        DemoTraining(replace(settings, size="base"), TINY)


def test_a_failed_stage_stops_the_training(data: Path, tmp_path: Path) -> None:
    size = replace(TINY, autoencoder=f"{TINY.autoencoder} --crop 1000")
    with pytest.raises(TrainingError, match="stage vae ended with code 1"):
        DemoTraining(DemoSettings(data, tmp_path / "out", HOURS), size).run()


@pytest.mark.parametrize("name", list(SIZES))
def test_every_size_gives_commands_that_exist(data: Path, tmp_path: Path, name: str) -> None:
    for stage in list_stages(DemoSettings(data, tmp_path, HOURS), SIZES[name]):
        for word in stage.options:
            if word.startswith(str(tmp_path)):
                Path(word).mkdir(parents=True, exist_ok=True)
        stage.command.make_context(stage.name, list(stage.options))


def test_the_command_says_what_is_missing(tmp_path: Path) -> None:
    words = ["run", "--data", str(tmp_path / "none"), "--out", str(tmp_path / "out"), "--budget-hours", "1"]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 1
    assert "no data folder" in result.output
    assert not (tmp_path / "out").exists()
