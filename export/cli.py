"""`flowturbo-export`: build-engines, inspect, verify, doctor."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from export.build import Built, Say, build, build_from
from export.gate import GateLimits
from export.gate import summary as gate_summary
from export.options import layer_options
from export.precision import PRECISIONS
from export.request import DEFAULT_MAX_BATCH, MAX_BATCH, resolve_request, resolve_targets
from export.samplers import add_samplers, keeping_of
from runtime.cli.common import Group, echo_json, on_terminal
from runtime.errors import RequestError
from runtime.manifest import TARGETS, Manifest, ProofRecord, read_manifest
from runtime.records import to_json
from runtime.saved import described
from runtime.version import VERSION


@click.group(cls=Group)
@click.version_option(VERSION)
def main() -> None:
    """Checkpoints to engines, and the proof that nothing changed on the way."""


@main.command("build-engines")
@click.option(
    "--predictor",
    type=click.Path(path_type=Path),
    help="SiT checkpoint (.pt or .safetensors).  [default: the demo model]",
)
@click.option("--refiner", help="FlowTurbo refiner checkpoint, or none.")
@click.option("--vae", "vaes", multiple=True, help="ema, mse, taesd, a folder, a hub id, or none; may be repeated.")
@click.option(
    "--resolution",
    "resolutions",
    multiple=True,
    type=int,
    help="Pixels a side; may be repeated.  [default: as trained]",
)
@click.option("--heads", type=int, help="Attention heads, where the width does not tell.")
@click.option(
    "--time-direction",
    type=click.Choice(["noise-to-data", "data-to-noise"]),
    help="data-to-noise for REPA checkpoints.",
)
@click.option(
    "--target",
    "targets",
    multiple=True,
    default=("auto",),
    show_default=True,
    type=click.Choice([*TARGETS, "auto"]),
    help="What will run the engines; may be repeated.",
)
@click.option(
    "--precision",
    default="auto",
    show_default=True,
    type=click.Choice(PRECISIONS),
    help="auto: cpu fp32, openvino bf16 with AMX, GPUs fp16. int8 needs --calibration; int8-weights and int4-weights "
    "save memory.",
)
@click.option(
    "--sampler",
    "samplers",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Keep this sampler of flowturbo-calibrate in the directory; may be repeated.",
)
@click.option("--default-schedule", help="What flowturbo-run uses: blocks, or the name of a kept sampler.")
@layer_options
@click.option(
    "--max-batch",
    type=click.IntRange(1, MAX_BATCH),
    help=f"Largest batch of one engine call.  [default: {DEFAULT_MAX_BATCH}]",
)
@click.option("--static-batch", is_flag=True, help="Engines for exactly max-batch images.")
@click.option("--encoder/--no-encoder", default=False, show_default=True, help="Build the VAE's encoder too.")
@click.option(
    "--tile", type=int, help="Also decoders for tiles of so many pixels, for large pictures in little memory."
)
@click.option(
    "--from",
    "source",
    type=click.Path(path_type=Path),
    help="Take ONNX files and proof from this directory: needs no torch.",
)
@click.option(
    "--against",
    type=click.Path(path_type=Path),
    help="With --from: judge quantised engines beside the wider ones in this directory, on this device.",
)
@click.option("--out", type=click.Path(path_type=Path), help="Engine directory to make.  [default: engines, or --from]")
@click.option("--low-memory", is_flag=True, help="Small builder workspace, for boards of 8 GB and less.")
@click.option("--rebuild", is_flag=True, help="Build even if nothing changed.")
@click.option("--force", is_flag=True, help="Keep engines that miss their tolerance; go on without those that fail.")
@click.option("--allow-foreign", is_flag=True, help="Accept engines of another device from --from.")
@click.option("--json", "as_json", is_flag=True, help="Print the manifest and nothing else on stdout.")
def build_engines(
    predictor: Path | None,
    refiner: str | None,
    vaes: tuple[str, ...],
    resolutions: tuple[int, ...],
    heads: int | None,
    time_direction: str | None,
    targets: tuple[str, ...],
    precision: str,
    samplers: tuple[Path, ...],
    default_schedule: str | None,
    calibration: Path | None,
    choice: Path | None,
    gate_images: int | None,
    gate_psnr: float | None,
    max_batch: int | None,
    static_batch: bool,
    encoder: bool,
    tile: int | None,
    source: Path | None,
    against: Path | None,
    out: Path | None,
    low_memory: bool,
    rebuild: bool,
    force: bool,
    allow_foreign: bool,
    as_json: bool,
) -> None:
    """Export, compile and prove: flowturbo-export build-engines --out engines

    With no checkpoint named, the demo model. Unchanged inputs rebuild nothing; an interrupted build goes on.
    """
    started = time.monotonic()
    target = out or source or Path("engines")
    is_demo = predictor is None and source is None
    keeping = keeping_of(target, samplers, default_schedule, with_demo=is_demo, force=force)
    settings: dict[str, Any] = {"keeping": keeping, "rebuild": rebuild, "force": force, "low_memory": low_memory}
    for option, given, does in (
        ("--allow-foreign", allow_foreign, "keeps the engines that are in the --from directory"),
        ("--against", against is not None, "judges engines that are built from the --from directory"),
    ):
        if given and source is None:
            raise RequestError(f"{option} without --from", remedy=f"leave it out: it {does}")
    limits = {"images": gate_images, "psnr_db": gate_psnr}
    settings["gate"] = GateLimits(**{name: limit for name, limit in limits.items() if limit is not None})  # type: ignore[arg-type]
    with _progress(quiet=as_json) as say:
        if source is not None:
            traced = (predictor, refiner, heads, time_direction, max_batch, tile, *vaes, *resolutions)
            limited = () if against is not None else limits.values()
            tracing = (*traced, calibration, choice, *limited)
            if any(option is not None for option in tracing) or static_batch or encoder:
                raise RequestError(
                    "--from together with checkpoints or options of their export",
                    allowed="--target, --precision, --against (with --gate-images and --gate-psnr), --out, "
                    "--low-memory, --rebuild, --force, --allow-foreign",
                    remedy="what the directory was exported with stays; build from checkpoints to change it",
                )
            built = build_from(
                source,
                target,
                resolve_targets(targets, precision),
                say=say,
                allow_foreign=allow_foreign,
                against=against,
                **settings,
            )
        else:
            request = resolve_request(
                predictor=predictor,
                refiner=refiner,
                vaes=vaes,
                resolutions=resolutions,
                heads=heads,
                time_direction=time_direction,
                targets=targets,
                precision=precision,
                max_batch=DEFAULT_MAX_BATCH if max_batch is None else max_batch,
                static_batch=static_batch,
                encoder=encoder,
                tile=tile,
                calibration=calibration,
                choice=choice,
            )
            built = build(request, target, say=say, **settings)
    if as_json:
        echo_json(to_json(built.manifest))
    else:
        _summary(built, target, started)


@main.command("add-sampler")
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("files", nargs=-1, type=click.Path(path_type=Path))
@click.option("--default-schedule", help="What flowturbo-run uses: blocks, or the name of a kept sampler.")
@click.option("--force", is_flag=True, help="Also samplers that were calibrated for another model.")
def add_sampler(folder: Path, files: tuple[Path, ...], default_schedule: str | None, force: bool) -> None:
    """Keep samplers of flowturbo-calibrate in an engine directory; nothing is built again."""
    manifest = add_samplers(folder, keeping_of(folder, files, default_schedule, force=force))
    click.echo(f"{folder} has {', '.join(saved.name for saved in manifest.samplers) or 'no saved sampler'}")


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="The manifest with every graph's inputs and outputs.")
def inspect(folder: Path, as_json: bool) -> None:
    """What is in an engine directory."""
    manifest = read_manifest(folder)
    if as_json:
        echo_json(inspected(manifest))
        return
    console = _console()
    sizes = ", ".join(f"{resolution} px" for resolution in manifest.resolutions)
    console.print(f"{folder}: {sizes}, flowturbo {manifest.flowturbo}, {manifest.created}")
    console.print(f"classes: {_class_list(manifest)}")
    defaults = manifest.defaults
    sampler = defaults.schedule or f"{defaults.solver}-{defaults.steps}"
    console.print(f"default: {sampler}, guidance {defaults.guidance:g}, VAEs {', '.join(manifest.vaes) or 'none'}")
    if manifest.samplers:
        console.print(f"saved samplers: {', '.join(map(described, manifest.samplers))}")
    console.print(_engine_table(manifest))
    console.print(_proof_table(manifest.proofs))
    for gate in manifest.gates:
        console.print(gate_summary(gate))
    for note in manifest.notes:
        console.print(f"note: {note}")


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--allow-foreign", is_flag=True, help="Try engines that another device or release built.")
@click.option("--json", "as_json", is_flag=True, help="The comparisons as JSON.")
def verify(folder: Path, allow_foreign: bool, as_json: bool) -> None:
    """Prove a directory again: every hash, every graph, a whole trajectory and picture."""
    from export.verify import verify as prove_again

    manifest = read_manifest(folder)
    with _progress(quiet=as_json) as say:
        records, skipped = prove_again(folder, manifest, say, allow_foreign)
    if as_json:
        echo_json({"proofs": to_json(records), "not_executed": skipped})
        return
    _console().print(_proof_table(tuple(records)))
    for line in skipped:
        click.echo(line)
    click.echo(f"verified: {len(manifest.files)} files unaltered, {len(records)} comparisons within tolerance")


@main.command()
@click.option("--json", "as_json", is_flag=True, help="The report as JSON.")
def doctor(as_json: bool) -> None:
    """What this machine has, what would be used, and what to install."""
    from export.doctor import doctor_report, render_report

    report = doctor_report()
    if as_json:
        echo_json(report)
    else:
        render_report(report, _console())


def inspected(manifest: Manifest) -> dict[str, Any]:
    """The manifest, each graph with its inputs and outputs."""
    data: dict[str, Any] = to_json(manifest)
    for record, graph in zip(data["graphs"], manifest.graphs, strict=True):
        spec = manifest.spec(graph.graph, graph.resolution)
        record["inputs"] = {name: to_json(tensor) for name, tensor in spec.inputs.items()}
        record["outputs"] = {name: to_json(tensor) for name, tensor in spec.outputs.items()}
    return data


@contextmanager
def _progress(quiet: bool) -> Iterator[Say]:
    """A status line with what is being done on a terminal, plain lines elsewhere, nothing under --json."""
    if quiet:
        yield lambda text: None
    elif on_terminal():
        with Console(stderr=True).status("starting") as status:
            yield lambda text: status.update(text)
    else:
        yield _Lines()


class _Lines:
    """Progress as plain lines, one per stage: what ticks in parentheses is for a terminal."""

    def __init__(self) -> None:
        self._last = ""

    def __call__(self, text: str) -> None:
        stage = text.partition(" (")[0]
        if stage != self._last:
            click.echo(stage, err=True)
        self._last = stage


def _summary(built: Built, out: Path, started: float) -> None:
    manifest = built.manifest
    if not built.rebuilt:
        click.echo(f"{out} is up to date (nothing changed; --rebuild builds it all the same)")
        return
    for target in manifest.targets():
        click.echo(_proof_line(target, [proof for proof in manifest.proofs if proof.target == target]))
    for gate in manifest.gates:
        click.echo(gate_summary(gate))
    for note in manifest.notes:
        click.echo(f"note: {note}")
    for target in manifest.targets():
        if builds := [engine.built for engine in manifest.engines if engine.target == target and engine.built]:
            seconds, peak = sum(b["seconds"] for b in builds), max(b["peak_rss_bytes"] for b in builds)
            click.echo(
                f"{target}: {len(builds)} engines in {seconds:.0f} s, peak memory of a build {peak / 2**30:.1f} GiB"
            )
    size = sum(file.bytes for file in manifest.files) / 1e6
    engines = ", ".join(
        f"{t} {next(e.precision for e in manifest.engines if (e.target, e.graph) == (t, 'predictor'))}"
        for t in manifest.targets()
    )
    click.echo(f"{out}: {engines}; {size:.1f} MB; built because: {built.reason}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    click.echo(f"took {time.monotonic() - started:.0f} s, peak memory {peak / 2**30:.1f} GiB")


def _proof_line(target: str, proofs: list[ProofRecord]) -> str:
    """One line per target: its worst graph, its trajectory and its pictures against PyTorch float32."""
    if not proofs:
        return f"{target}: not proved here"
    graphs = [proof for proof in proofs if proof.what != "trajectory" and proof.psnr_db is None]
    worst = max(graphs, key=lambda proof: proof.relative_error / proof.tolerance)
    trajectory = max(proof.relative_error for proof in proofs if proof.what == "trajectory")
    pictures = [proof.psnr_db for proof in proofs if proof.psnr_db is not None]
    seen = f", pictures {min(pictures):.1f} dB" if pictures else ""
    return (
        f"{target} {worst.precision} proved against PyTorch float32 on {worst.by}: worst graph {worst.what} "
        f"{worst.relative_error:.1e} (allowed {worst.tolerance:.0e}), trajectory {trajectory:.1e}{seen}"
    )


def _console() -> Console:
    """Tables need room: a pipe has no width of its own."""
    return Console() if Console().is_terminal else Console(width=140)


def _class_list(manifest: Manifest) -> str:
    classes = manifest.model.classes
    return ", ".join(f"{label} {name}" for label, name in classes.items()) if len(classes) <= 40 else f"{len(classes)}"


def _engine_table(manifest: Manifest) -> Table:
    table = Table("graph", "px", "target", "precision", "MB", "executed here", title="engines")
    for engine in manifest.engines:
        executed = "yes" if engine.executed else "not executed"
        size = f"{manifest.file(engine.path).bytes / 1e6:.1f}"
        table.add_row(engine.graph, str(engine.resolution), engine.target, engine.precision, size, executed)
    return table


def _proof_table(proofs: tuple[ProofRecord, ...]) -> Table:
    table = Table("what", "px", "precision", "by", "worst", "error", "allowed", title="against PyTorch float32")
    for proof in proofs:
        if proof.psnr_db is not None:
            error, allowed = f"{proof.psnr_db:.1f} dB", f"{proof.tolerance:g} dB"
        else:
            error, allowed = f"{proof.relative_error:.1e}", f"{proof.tolerance:.0e}"
        table.add_row(proof.what, str(proof.resolution), proof.precision, proof.by, proof.tensor, error, allowed)
    return table
