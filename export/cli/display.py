"""Print the results of `flowturbo-export` for people."""

from __future__ import annotations

import resource
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from export.build import BuildResult
from export.proof.gate import format_gate
from runtime.directory.records import Manifest, ProofRecord
from runtime.sampling.calibrated import describe_sampler

MAX_LISTED_CLASSES = 40
"""Beyond these their number says more than their names."""


def make_wide_console() -> Console:
    """Return a console with room for tables: a pipe has no width."""
    return Console() if Console().is_terminal else Console(width=140)


def print_build(result: BuildResult, out: Path, seconds: float) -> None:
    """Print what was built, what proves it, and the time and memory that it took."""
    manifest = result.manifest
    if not result.is_rebuilt:
        click.echo(f"{out} is up to date (nothing changed; --rebuild builds it all the same)")
        return
    for target in manifest.list_targets():
        click.echo(_format_proofs(target, [proof for proof in manifest.proofs if proof.target == target]))
    for gate in manifest.gates:
        click.echo(format_gate(gate))
    for note in manifest.notes:
        click.echo(f"note: {note}")
    for target in manifest.list_targets():
        if builds := [engine.built for engine in manifest.engines if engine.target == target and engine.built]:
            total_seconds, peak = sum(b["seconds"] for b in builds), max(b["peak_rss_bytes"] for b in builds)
            click.echo(
                f"{target}: {len(builds)} engines in {total_seconds:.0f} s, peak memory of a build "
                f"{peak / 2**30:.1f} GiB"
            )
    size = sum(file.bytes for file in manifest.files) / 1e6
    engines = ", ".join(
        f"{t} {next(e.precision for e in manifest.engines if (e.target, e.graph) == (t, 'predictor'))}"
        for t in manifest.list_targets()
    )
    click.echo(f"{out}: {engines}; {size:.1f} MB; built because: {result.reason}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    click.echo(f"took {seconds:.0f} s, peak memory {peak / 2**30:.1f} GiB")


def _format_proofs(target: str, proofs: list[ProofRecord]) -> str:
    """One line per target: its worst graph, its trajectory and its pictures against PyTorch float32."""
    if not proofs:
        return f"{target}: not proved here"
    graphs = [proof for proof in proofs if proof.what != "trajectory" and proof.psnr_db is None]
    worst = max(graphs, key=lambda proof: proof.relative_error / proof.tolerance)
    trajectory = max(proof.relative_error for proof in proofs if proof.what == "trajectory")
    pictures = [proof.psnr_db for proof in proofs if proof.psnr_db is not None]
    picture_text = f", pictures {min(pictures):.1f} dB" if pictures else ""
    return (
        f"{target} {worst.precision} proved against PyTorch float32 on {worst.by}: worst graph {worst.what} "
        f"{worst.relative_error:.1e} (allowed {worst.tolerance:.0e}), trajectory {trajectory:.1e}{picture_text}"
    )


def print_manifest(folder: Path, manifest: Manifest) -> None:
    """Print the contents of an engine directory."""
    console = make_wide_console()
    sizes = ", ".join(f"{resolution} px" for resolution in manifest.resolutions)
    console.print(f"{folder}: {sizes}, flowturbo {manifest.flowturbo}, {manifest.created}")
    classes = manifest.model.classes
    class_text = ", ".join(f"{label} {name}" for label, name in classes.items())
    console.print(f"classes: {class_text if len(classes) <= MAX_LISTED_CLASSES else len(classes)}")
    defaults = manifest.defaults
    sampler = defaults.schedule or f"{defaults.solver}-{defaults.steps}"
    console.print(f"default: {sampler}, guidance {defaults.guidance:g}, VAEs {', '.join(manifest.vaes) or 'none'}")
    if manifest.samplers:
        console.print(f"saved samplers: {', '.join(map(describe_sampler, manifest.samplers))}")
    table = Table("graph", "px", "target", "precision", "MB", "executed here", title="engines")
    for engine in manifest.engines:
        executed = "yes" if engine.executed else "not executed"
        size = f"{manifest.find_file(engine.path).bytes / 1e6:.1f}"
        table.add_row(engine.graph, str(engine.resolution), engine.target, engine.precision, size, executed)
    console.print(table)
    console.print(make_proof_table(manifest.proofs))
    for gate in manifest.gates:
        console.print(format_gate(gate))
    for note in manifest.notes:
        console.print(f"note: {note}")


def make_proof_table(proofs: tuple[ProofRecord, ...]) -> Table:
    """Return a table of every comparison with the PyTorch model."""
    table = Table("what", "px", "precision", "by", "worst", "error", "allowed", title="against PyTorch float32")
    for proof in proofs:
        if proof.psnr_db is not None:
            error, allowed = f"{proof.psnr_db:.1f} dB", f"{proof.tolerance:g} dB"
        else:
            error, allowed = f"{proof.relative_error:.1e}", f"{proof.tolerance:.0e}"
        table.add_row(proof.what, str(proof.resolution), proof.precision, proof.by, proof.tensor, error, allowed)
    return table
