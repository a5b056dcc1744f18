"""Train the demo model from nothing, in the hours that are given: python -m flowturbo.demo.train run.

`scripts/train-demo` calls this. Every stage is a command that is there already: this module writes its options, turns
hours into steps, and goes on where an earlier call stopped. `OUT/train-demo.json` holds what is done.
"""

from __future__ import annotations

import math
import shutil
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import click
import torch

from flowturbo.cli import evaluate
from flowturbo.cli import train as training
from flowturbo.data.photographs import Photographs, list_photographs
from flowturbo.demo import classifier_features, measure, pack
from flowturbo.models.vae import load_vae, wrap_vae
from flowturbo.training.training_state import list_checkpoints
from flowturbo.training.vae_task import load_average
from runtime.cli.command_base import PATH, Group, echo_json
from runtime.cli.progress_display import show_progress
from runtime.system.errors import RequestError, TrainingError
from runtime.system.files import make_folder, write_atomically, write_json
from runtime.system.hardware import detect_cpu
from runtime.system.json_codec import read_versioned, to_json
from runtime.system.progress import SILENT, Progress

RECORD_FILE = "train-demo.json"
RECORD_SCHEMA = 1
RESOLUTION = 64
DECAY_SHARE = 0.2
"""Share of a stage's steps over which its learning rate falls to 0."""
NUM_PARTS = 5
"""Calls in which a stage trains before its rate decays; after each one the steps are computed again."""
MEASURED_SHARE = 0.05
"""Share of a stage's hours after which its speed is trusted: other work may slow the first steps down."""
CHECKPOINT_SECONDS = 300.0
LONGER = 1.05
"""A finished stage trains on when its share of the hours has grown by this factor."""
RATE_BOUNDARY = "before-decay.safetensors"
"""The checkpoint from which a longer budget goes on, at the full learning rate."""


@dataclass(frozen=True)
class DemoSize:
    """What is trained, as options of the commands.

    Attributes:
        autoencoder, decoder, predictor, refiner: options of `flowturbo-train` for each of them; a decoder has the
            autoencoder's options too.
        warmup: steps over which a learning rate rises.
        probe: steps after which the speed is known.
        epochs: of the classifier that gives the features of the measurements.
        measure: options of `flowturbo.demo.measure`.
    """

    predictor: str
    autoencoder: str = "--crop 48 --channels 64,96,128 --latent-channels 8 --batch-size 32 --lr 1e-3 --ema 0.999"
    decoder: str = ""
    refiner: str = "--batch-size 128 --lr 1e-3 --ema 0.999"
    warmup: int = 200
    probe: int = 24
    epochs: int = 14
    measure: str = "--guidance 4"


_PREDICTOR = (
    "--no-learned-sigma --times logit-normal --times-mean -0.5 --label-std 0.5 --batch-size 256 --optimizer muon "
    "--lr 2e-3 --muon-lr 2e-3 --weight-decay 0.01 --ema 0.9995"
)
SIZES = {
    "small": DemoSize(f"--patch 4 --width 256 --depth 8 --heads 4 {_PREDICTOR}"),
    "base": DemoSize(f"--patch 2 --width 320 --depth 8 --heads 5 {_PREDICTOR}"),
}


@dataclass(frozen=True)
class Stage:
    """A command, and what it needs.

    Attributes:
        name: of the stage, and of its folder if it trains.
        command: the click command that does it.
        options: the options, but for those of a training's length.
        needs: stages that it is made from. When one of them changes, this one is made again.
        share: of the hours; 0 for a stage that does not train by steps.
        goes_on: whether a training goes on when what it is made from has changed; otherwise it starts again.
        folder: what is removed before the stage is made again, if it does not train.
    """

    name: str
    command: click.Command
    options: tuple[str, ...]
    needs: tuple[str, ...] = ()
    share: float = 0.0
    goes_on: bool = False
    folder: Path | None = None


@dataclass(frozen=True)
class StageRecord:
    """What is done of a stage.

    Attributes:
        inputs: version of each stage that it is made from.
        steps, seconds: steps when this was written, and the time that they took. Steps of a run that was begun without
            this record are not timed.
        started: time at which the last call began, in seconds since 1970; 0 before the first.
        rate: steps per second of the last call; 0 before the first.
        decay_start, total_steps: where the learning rate starts to fall, and the end; 0 before that is decided.
        budget_seconds: the stage's share of the hours when that was decided.
        version: number of the finished result; 0 before the first.
        psnr_db: of an autoencoder, on validation photographs.
    """

    inputs: dict[str, int] = field(default_factory=dict)
    steps: int = 0
    seconds: float = 0.0
    started: float = 0.0
    rate: float = 0.0
    decay_start: int = 0
    total_steps: int = 0
    budget_seconds: float = 0.0
    finished: bool = False
    version: int = 0
    psnr_db: float | None = None


@dataclass(frozen=True)
class DemoRecord:
    """The file `OUT/train-demo.json`."""

    schema: int
    size: str
    stages: dict[str, StageRecord]


@dataclass(frozen=True)
class DemoSettings:
    """Options of `run`.

    Attributes:
        data: folder with `train/` and `val/`, class folders in each.
        out: folder of all runs; the files for the package are in `out/package`.
        budget_hours: for all stages together.
        size: name of an entry of `SIZES`.
        device: "auto", "cpu" or "cuda".
        from_stage: the stages before this one stay as they are, and it is taken up again.
    """

    data: Path
    out: Path
    budget_hours: float
    size: str = "small"
    device: str = "auto"
    from_stage: str | None = None


def list_stages(settings: DemoSettings, size: DemoSize) -> list[Stage]:
    """Return the stages in order."""
    data, out = settings.data.resolve(), settings.out.resolve()  # the latents know the autoencoder by its path
    package, commands = out / "package", training.main.commands
    vae, predictor, refiner = out / "vae" / "vae", out / "sit" / "final.safetensors", out / "refiner/final.safetensors"
    device = ["--device", settings.device]
    loop = ["--precision", choose_precision(settings.device), "--keep", "3", "--warmup", str(size.warmup)]
    photographs = ["--data", data / "train", "--resolution", str(RESOLUTION)]
    latents = ["--data", out / "latents"]

    def write_options(*words: object) -> tuple[str, ...]:
        return tuple(map(str, words))

    def describe_decoder(kind: str, share: float, lr: str, init: Path, source: str) -> Stage:
        words = [*photographs, *size.autoencoder.split(), "--lr", lr, *size.decoder.split()]
        options = write_options(*words, "--preset", kind, "--init", init, "--out", out / f"vae-{kind}", *device, *loop)
        return Stage(f"vae-{kind}", commands["vae"], options, (source,), share)

    return [
        Stage(
            "vae",
            commands["vae"],
            write_options(*photographs, *size.autoencoder.split(), "--out", out / "vae", *device, *loop),
            share=0.30,
        ),
        describe_decoder("ema", 0.07, "7e-4", vae, "vae"),
        describe_decoder("mse", 0.03, "4e-4", out / "vae-ema" / "vae", "vae-ema"),
        Stage(
            "latents",
            commands["cache-latents"],
            write_options(*photographs, "--vae", vae, "--out", out / "latents", *device),
            ("vae",),
            folder=out / "latents",
        ),
        Stage(
            "sit",
            commands["sit"],
            write_options(*latents, *size.predictor.split(), "--out", out / "sit", *device, *loop),
            ("latents",),
            share=0.50,
        ),
        Stage(
            "refiner",
            commands["refiner"],
            write_options(
                *latents, "--predictor", predictor, *size.refiner.split(), "--out", out / "refiner", *device, *loop
            ),
            ("sit",),
            share=0.05,
            goes_on=True,
        ),
        Stage(
            "extractor",
            classifier_features.main,
            write_options(
                *("--data", data / "train", "--classifier", out / "measure" / "classifier.safetensors"),
                *("--epochs", str(size.epochs), "--out", package / "features.onnx"),
            ),
        ),
        Stage(
            "reference",
            evaluate.main.commands["reference"],
            write_options(
                *("--data", data / "val", "--features", package / "features.onnx", "--resolution", str(RESOLUTION)),
                *("--name", "validation photographs", "--out", package / "reference.npz"),
            ),
            ("extractor",),
        ),
        Stage(
            "pack",
            pack.main,
            write_options(
                *("--predictor", predictor, "--refiner", refiner, "--guidance", "4", "--out", package),
                *("--vae-ema", out / "vae-ema" / "vae", "--vae-mse", out / "vae-mse" / "vae"),
            ),
            ("vae-ema", "vae-mse", "sit", "refiner"),
        ),
        Stage(
            "measure",
            measure.main,
            write_options(
                *("--data", data, "--out", out / "measure", "--predictor", package / "predictor.safetensors"),
                *("--vae", package / "vae-ema", *size.measure.split()),
            ),
            ("pack", "extractor"),
        ),
    ]


def choose_precision(device: str) -> str:
    """Return "bf16" where the GPU, or the CPU's AMX, multiplies bfloat16 faster than float32; else "fp32"."""
    if device != "cpu" and torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if "amx_bf16" in detect_cpu().features else "fp32"


class DemoTraining:
    """All stages, and the record of what is done of them."""

    def __init__(self, settings: DemoSettings, size: DemoSize, progress: Progress = SILENT) -> None:
        """Check what can be checked before hours of work.

        Raises:
            DataError: `train/` or `val/` of the data has no photographs.
            TrainingError: the folder holds a training of another size.
            RequestError: there is no such stage, or one before it is not finished.
        """
        self.settings, self.size, self.progress = settings, size, progress
        for part in ("train", "val"):
            list_photographs(settings.data / part)
        self.path = make_folder(settings.out) / RECORD_FILE
        make_folder(settings.out / "package")
        self.stages = list_stages(settings, size)
        self.records = self._read_records()
        names = [stage.name for stage in self.stages]
        if settings.from_stage is not None:
            if settings.from_stage not in names:
                raise RequestError(
                    f"--from-stage {settings.from_stage}", allowed=", ".join(names), remedy="name one of these"
                )
            earlier = names[: names.index(settings.from_stage)]
            if unfinished := [name for name in earlier if not self._record(name).finished]:
                raise RequestError(
                    f"--from-stage {settings.from_stage}, but {unfinished[0]} is not finished in {settings.out}",
                    allowed="a stage after finished ones",
                    remedy="leave --from-stage out: the training goes on where it stopped",
                )
            self.stages = self.stages[len(earlier) :]

    def run(self) -> Path:
        """Run all stages and return the folder of the files for the package.

        Raises:
            TrainingError: a stage failed; its own message is on stderr.
        """
        for number, stage in enumerate(self.stages, 1):
            inputs = {name: self._record(name).version for name in stage.needs}
            title = f"[{number}/{len(self.stages)}] {stage.name}"
            if stage.share:
                self._train(stage, inputs, title)
            else:
                self._make(stage, inputs, title)
        return self.settings.out / "package"

    def _make(self, stage: Stage, inputs: dict[str, int], title: str) -> None:
        record = self._record(stage.name)
        if record.finished and record.inputs == inputs and stage.name != self.settings.from_stage:
            self.progress.write(f"{title}: done before")
            return
        self.progress.write(title)
        if stage.folder is not None and record.inputs not in ({}, inputs):
            shutil.rmtree(stage.folder, ignore_errors=True)
        record = replace(record, inputs=inputs, finished=False)
        self._save(stage.name, record)
        self._call(stage, ())
        self._save(stage.name, replace(record, finished=True, version=record.version + 1))

    def _train(self, stage: Stage, inputs: dict[str, int], title: str) -> None:
        """Train for the stage's hours: a short call for the speed, some at the full rate, and one of decay."""
        folder, record = self.settings.out / stage.name, self._record(stage.name)
        budget = stage.share * self.settings.budget_hours * 3600
        if record.inputs not in ({}, inputs) and not stage.goes_on and folder.exists():
            old = folder.with_name(f"{folder.name}.old")
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
            self.progress.write(f"{title}: starts again, since {', '.join(stage.needs)} changed; the old run is {old}")
        done = _count_steps(folder)
        if not done:
            record = StageRecord(version=record.version)
        if record.finished:
            # More hours go to the networks; a better autoencoder would need all of them made again.
            may_extend = stage.name in ("sit", "refiner", self.settings.from_stage)
            is_longer = may_extend and budget > LONGER * record.budget_seconds
            if record.inputs == inputs and not is_longer:
                self.progress.write(f"{title}: done before, {record.total_steps} steps{_format_psnr(record)}")
                return
            done = _go_back(folder, record.decay_start)
            record = replace(record, steps=done, decay_start=0, total_steps=0, finished=False)
        elif record.started and done > record.steps:  # a killed call has trained on after it was recorded
            last_time = list_checkpoints(folder)[-1][1].stat().st_mtime
            record = replace(record, steps=done, seconds=record.seconds + max(0.0, last_time - record.started))
        record = replace(record, inputs=inputs)
        while not record.total_steps:
            seconds_left = max(0.0, budget - record.seconds)
            steps_left = math.ceil(seconds_left * record.rate)
            decay_start = round((1 - DECAY_SHARE) * (done + steps_left))
            if not record.rate:
                goal = done + self.size.probe
                self.progress.write(f"{title}: measures its speed in {self.size.probe} steps")
            elif done >= decay_start and record.seconds >= MEASURED_SHARE * budget:
                # A fifth of all steps, but no more than the hours allow: a run may be older than this script's record.
                decay = math.ceil(done * DECAY_SHARE / (1 - DECAY_SHARE))
                decay = min(decay, max(steps_left, math.ceil(MEASURED_SHARE * done)))
                record = replace(record, decay_start=done, total_steps=done + decay, budget_seconds=budget)
                _copy_checkpoint(folder / _checkpoint_name(done), folder / RATE_BOUNDARY)
                break
            else:
                if done >= decay_start:
                    goal = done + math.ceil(MEASURED_SHARE * steps_left)
                else:
                    goal = min(decay_start, done + math.ceil((done + steps_left) / NUM_PARTS))
                self.progress.write(
                    f"{title}: {done} of about {done + steps_left} steps, {record.rate:.2f} steps/s, "
                    f"{seconds_left / 3600:.2f} hours left"
                )
            record = replace(record, steps=done, started=time.time())
            self._save(stage.name, record)
            rate, seconds = self._run_steps(stage, done, goal, record.rate)
            record = replace(record, steps=goal, seconds=record.seconds + seconds, rate=rate)
            done = goal
        self.progress.write(f"{title}: the learning rate falls from step {record.decay_start} to {record.total_steps}")
        record = replace(record, steps=done, started=time.time())
        self._save(stage.name, record)
        decay = record.total_steps - record.decay_start
        _, seconds = self._run_steps(stage, done, record.total_steps, record.rate, decay)
        record = replace(record, steps=record.total_steps, seconds=record.seconds + seconds)
        if stage.name.startswith("vae"):
            record = replace(record, psnr_db=measure_psnr(folder / "vae", self.settings.data))
        self._save(stage.name, replace(record, finished=True, version=record.version + 1))
        self.progress.write(f"{title}: {record.total_steps} steps{_format_psnr(record)}")

    def _run_steps(self, stage: Stage, done: int, goal: int, rate: float, decay: int = 0) -> tuple[float, float]:
        """Train to step `goal`; return the steps per second without the start, and all seconds."""
        every = max(1, min(math.ceil((goal - done) / 4), round(CHECKPOINT_SECONDS * rate) or goal))
        length = ["--max-steps", goal, "--decay", decay, "--checkpoint-every", every]
        if stage.name in ("sit", "refiner"):
            length += ["--sample-every", goal]  # one grid, at the end
        start_time = time.time()
        self._call(stage, (*map(str, length), "--resume"))
        seconds = time.time() - start_time
        written = [
            (step, path.stat().st_mtime) for step, path in list_checkpoints(self.settings.out / stage.name)
            if path.stat().st_mtime >= start_time
        ]  # fmt: skip
        if len(written) > 1 and written[-1][1] > written[0][1]:
            rate = (written[-1][0] - written[0][0]) / (written[-1][1] - written[0][1])
        elif goal > done:
            rate = (goal - done) / seconds
        return rate, seconds

    def _call(self, stage: Stage, length: tuple[str, ...]) -> None:
        code = stage.command.main([*stage.options, *length], prog_name=stage.name, standalone_mode=False)
        if isinstance(code, int) and code:
            raise TrainingError(
                f"the stage {stage.name} ended with code {code}; its message is above",
                remedy="call the same command again when the cause is removed: it goes on where it stopped",
            )

    def _record(self, name: str) -> StageRecord:
        return self.records.get(name, StageRecord())

    def _save(self, name: str, record: StageRecord) -> None:
        self.records[name] = record
        write_json(self.path, to_json(DemoRecord(RECORD_SCHEMA, self.settings.size, self.records)))

    def _read_records(self) -> dict[str, StageRecord]:
        if not self.path.exists():
            return {}
        record = read_versioned(
            self.path,
            DemoRecord,
            RECORD_SCHEMA,
            name="record of train-demo",
            remedy="name another --out",
            error_type=TrainingError,
        )
        if record.size != self.settings.size:
            raise TrainingError(
                f"{self.settings.out} holds a training of --size {record.size}, not {self.settings.size}",
                allowed=f"--size {record.size}, or a new folder",
                remedy="name another --out; its vae/ and vae-*/ may be copied there",
            )
        return dict(record.stages)


def _count_steps(folder: Path) -> int:
    return max((steps for steps, _ in list_checkpoints(folder)), default=0)


def _checkpoint_name(steps: int) -> str:
    return f"step-{steps:08d}.safetensors"


def _format_psnr(record: StageRecord) -> str:
    return "" if record.psnr_db is None else f", validation PSNR {record.psnr_db:.2f} dB"


def _copy_checkpoint(source: Path, target: Path) -> None:
    with write_atomically(target) as aside:
        shutil.copyfile(source, aside)


def _go_back(folder: Path, decay_start: int) -> int:
    """Return a run to where its learning rate started to fall, if that is kept; return the steps it has then."""
    boundary = folder / RATE_BOUNDARY
    if boundary.exists():
        _copy_checkpoint(boundary, folder / _checkpoint_name(decay_start))
        for steps, path in list_checkpoints(folder):
            if steps > decay_start:
                path.unlink()
    return _count_steps(folder)


def measure_psnr(vae: Path, data: Path, num: int = 512) -> float:
    """Return the PSNR in dB of `num` validation photographs at 64 pixels: always the same ones, of all classes.

    Args:
        vae: folder in diffusers layout, or of a run of `flowturbo-train vae`: the average of its last checkpoint.
        data: folder with `val/`.
    """
    photographs = Photographs(list_photographs(data / "val"), RESOLUTION)
    autoencoder = wrap_vae(load_average(vae)) if list_checkpoints(vae) else load_vae(str(vae))
    return measure.measure_reconstruction_psnr(autoencoder, photographs, min(num, len(photographs)))


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
def main() -> None:
    """Train the demo model."""


@main.command()
@click.option("--data", required=True, type=PATH, help="Folder with train/ and val/, in ILSVRC's layout.")
@click.option("--out", default="runs/demo", show_default=True, type=PATH, help="Folder of all runs.")
@click.option("--budget-hours", required=True, type=click.FloatRange(0, min_open=True), help="For all stages together.")
@click.option("--size", default="small", show_default=True, type=click.Choice(list(SIZES)), help="Of the SiT.")
@click.option("--device", default="auto", show_default=True, type=click.Choice(["auto", "cpu", "cuda"]))
@click.option(
    "--from-stage", help="Leave the stages before this one as they are; train it on with more hours, or make it again."
)
def run(data: Path, out: Path, budget_hours: float, size: str, device: str, from_stage: str | None) -> None:
    """Train everything from nothing. The same command goes on where it stopped, also with more hours.

    More hours go to the SiT and the refiner. To train a finished autoencoder on, add --from-stage vae: all that is
    made from it is made again then.
    """
    settings = DemoSettings(data, out, budget_hours, size, device, from_stage)
    with show_progress() as progress:
        package = DemoTraining(settings, SIZES[size], progress).run()
        progress.write(f"the files for the package are in {package}")


@main.command()
@click.option("--vae", required=True, type=PATH, help="Folder in diffusers layout, or of a run that is going on.")
@click.option("--data", required=True, type=PATH, help="Folder with val/.")
@click.option(
    "--num", default=512, show_default=True, type=click.IntRange(1), help="Photographs; the selection is fixed."
)
def psnr(vae: Path, data: Path, num: int) -> None:
    """Measure what an autoencoder keeps of validation photographs, in dB."""
    echo_json({"vae": str(vae), "num": num, "psnr_db": measure_psnr(vae, data, num)})


if __name__ == "__main__":
    main()
