"""Study samplers: same-seed error and wall time of every sampler on one engine directory, and how to choose.

The result is a page with tables and plots; one run measures every number in it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from calibration.guidance_choice import Guidance
from calibration.plot import Sheet, plot_error_panel
from calibration.samplers.block_search import average_grid
from calibration.samplers.probe import FIT_SEED, SamplerMeasurement, SamplerMeter, find_latents_cache
from flowturbo.evaluation.quality.same_seed import REFERENCE_SAMPLER
from flowturbo.evaluation.quality.sampled_latents import make_balanced_draw
from runtime.pipeline import Pipeline, describe_pipeline
from runtime.request import RequestOptions
from runtime.sampling.controllers import Journal
from runtime.sampling.grids import Grid
from runtime.sampling.solvers import ADAPTIVE_RULES
from runtime.sampling.tableaus import SEARCHED_TABLES
from runtime.system.files import make_folder, write_atomically, write_json
from runtime.system.progress import SILENT, Progress

SamplersByFamily = dict[str, list[RequestOptions]]
TOLERANCES = (0.3, 0.1, 0.03, 0.01)
FINE_TOLERANCES = (0.003, 0.001)
"""Of lte only: where the error of a step is small."""
CONSTANTS = (0.35, 0.25, 0.17, 0.11)
PUBLISHED_SCHEDULES = ("H1P5R3", "H2P4R2", "H2P8R2", "H5P7R3")
"""FlowTurbo's schedules that a small device can run."""
PUBLISHED_TABLES, MODEL_TABLES = "searched (published)", "searched (this model)"
REFINER_TABLES = "searched + R (this model)"
NFE_BUDGETS = (4, 6, 8, 12)
"""Predictor evaluations that the recommendations are for."""


def list_families(pipeline: Pipeline, make_frozen_grid: Callable[[int], Grid]) -> SamplersByFamily:
    """Return samplers by family, each from coarse to fine, as keyword arguments of `Pipeline.request`."""
    steps, pseudo_steps = (3, 4, 5, 7, 9, 11), (2, 3, 4, 6, 8, 10)
    samplers: SamplersByFamily = {
        "Euler": [{"solver": "euler", "steps": n} for n in (4, 6, 8, 12)],
        "Heun": [{"solver": "heun", "steps": n} for n in (2, 3, 4, 6)],
        "AB2": [{"solver": "ab2", "steps": n} for n in steps],
        "AB3": [{"solver": "ab3", "steps": n} for n in (3, 5, 8)],
        "H1Pn": [{"schedule": f"H1P{n}"} for n in pseudo_steps],
        "H1Pn, lte grid": [{"schedule": f"H1P{n}", "grid": make_frozen_grid(n + 1)} for n in pseudo_steps],
        "AB2, lte grid": [{"solver": "ab2", "grid": make_frozen_grid(n)} for n in (3, 5, 7, 11)],
        PUBLISHED_TABLES: [{"solver": "searched", "steps": n} for n in sorted(SEARCHED_TABLES)],
        "adaptive norm": [{"adaptive": "norm", "constant": c} for c in CONSTANTS],
        "adaptive lte": [{"adaptive": "lte", "tolerance": tau} for tau in (*TOLERANCES, *FINE_TOLERANCES)],
        "dopri5": [{"solver": "dopri5", "tolerance": tau} for tau in (1e-1, 1e-2)],
    }
    tables = [sampler for sampler in pipeline.manifest.samplers if sampler.kind == "table"]
    plain_tables = sorted((s for s in tables if not s.refiner), key=lambda s: len(s.grid or ()))
    if plain_tables:
        samplers[MODEL_TABLES] = [{"schedule": sampler.name} for sampler in plain_tables]
    if pipeline.manifest.model.refiner is not None:
        samplers["FlowTurbo (paper)"] = [{"schedule": name} for name in PUBLISHED_SCHEDULES]
        samplers["H1Pn + R3"] = [{"schedule": f"H1P{n}R3"} for n in (4, 6, 8, 10)]
        samplers["adaptive blocks"] = [{"adaptive": "blocks", "tolerance": tau} for tau in TOLERANCES]
        if refiner_tables := sorted((s for s in tables if s.refiner), key=lambda s: len(s.grid or ())):
            samplers[REFINER_TABLES] = [{"schedule": sampler.name} for sampler in refiner_tables]
    return samplers


Cost = Callable[[SamplerMeasurement], float]
COSTS: dict[str, tuple[str, str, Cost]] = {
    "evaluations": ("NFE of the predictor", "NFE", lambda measurement: measurement.predictor_nfe),
    "time": ("ms per image, sampling only", "ms", lambda measurement: measurement.ms_per_image),
}
"""By the name in answers: the label of a plot, the unit, and how a measurement gives it."""

QUESTIONS = (
    ("Does the norm rule help?", "adaptive norm", "H1Pn", "the same blocks in equal steps", "evaluations"),
    ("Does error control (lte) help?", "adaptive lte", "H1Pn", "the same blocks in equal steps", "evaluations"),
    ("Does its mean schedule, frozen, help?", "H1Pn, lte grid", "H1Pn", "a uniform grid", "evaluations"),
    ("Does P help against AB2?", "H1Pn", "AB2", "AB2 with as many evaluations", "evaluations"),
    ("Do published tables help against AB2?", PUBLISHED_TABLES, "AB2", "AB2", "evaluations"),
    (
        "Does calibrating a table to this model help?",
        MODEL_TABLES,
        PUBLISHED_TABLES,
        "the published tables",
        "evaluations",
    ),
    ("Do three R blocks help at equal time?", "H1Pn + R3", "AB2", "AB2", "time"),
    ("Does block choice help at equal time?", "adaptive blocks", "AB2", "AB2", "time"),
    ("Do refiner evaluations help a searched table?", REFINER_TABLES, MODEL_TABLES, "tables without refiner", "time"),
)
"""Question, family, the family it is compared with, how the answer calls that one, and the cost that is equal."""


@dataclass(frozen=True)
class GuidanceStudy:
    """The study under one guidance: measurements by family."""

    guidance: Guidance
    results: Mapping[str, Sequence[SamplerMeasurement]]

    @property
    def title(self) -> str:
        """When guidance acts."""
        if self.guidance.interval == (0.0, 1.0):
            return "guidance throughout"
        return f"guidance for t in {self.guidance.interval[0]:g} … {self.guidance.interval[1]:g} only"

    def list_measurements(self) -> list[tuple[str, SamplerMeasurement]]:
        """Return (family, measurement) of every sampler."""
        return [(family, measurement) for family, results in self.results.items() for measurement in results]

    def list_costs(self, family: str, cost: Cost) -> list[tuple[float, float]]:
        """Return (cost, error) of every sampler of a family."""
        return [(cost(measurement), measurement.error) for measurement in self.results[family]]


def run_study(
    pipeline: Pipeline,
    images: int,
    guidance: Guidance,
    interval_guidance: Guidance,
    out: Path,
    figures: Path,
    command: str,
    progress: Progress = SILENT,
) -> None:
    """Measure every family under both guidances, and write the page, its plots and its numbers (`.json`).

    Args:
        interval_guidance: of the second half.
        out: the page; the numbers go beside it.
        figures: folder of the plots.
        command: what the user typed, for the record.
    """
    studies = [measure_guidance(pipeline, images, settings, progress) for settings in (guidance, interval_guidance)]
    make_folder(figures)
    for study, name in zip(studies, ("samplers", "samplers-interval"), strict=True):
        sheet = Sheet(2, width=6.4, height=5.2)
        for axes, (label, _, cost) in zip(sheet.axes, COSTS.values(), strict=True):
            points = {family: study.list_costs(family, cost) for family in study.results}
            plot_error_panel(axes, points, label, study.title, legend=axes is sheet.axes[0])
        sheet.save(figures / f"{name}.png")
    page = _format_page(pipeline, images, studies, command, figures, out)
    with write_atomically(out) as temp_path:
        temp_path.write_text(page, encoding="utf-8")
    numbers = {
        "schema": 1,
        "command": command,
        "ran": describe_pipeline(pipeline),
        "engine": pipeline.manifest.engine_hash,
        "images": images,
        "rules": {name: rule.parameter for name, rule in ADAPTIVE_RULES.items()},
        "halves": [
            {
                "guidance": study.guidance.options,
                "samplers": [
                    {
                        "family": family,
                        "name": measurement.name,
                        "predictor_nfe": measurement.predictor_nfe,
                        "refiner_nfe": measurement.refiner_nfe,
                        "unguided_nfe": measurement.unguided_nfe,
                        "error": measurement.error,
                        "error_p90": float(np.quantile(measurement.errors, 0.9)),
                        "ms": measurement.ms_per_image,
                    }
                    for family, measurement in study.list_measurements()
                ],
            }
            for study in studies
        ],
    }
    write_json(out.with_suffix(".json"), numbers)


def measure_guidance(pipeline: Pipeline, images: int, guidance: Guidance, progress: Progress = SILENT) -> GuidanceStudy:
    """Measure every family under one guidance."""
    study = GuidanceStudy(guidance, results := {})
    progress.write(f"{study.title}: a very fine run of {images} images")
    meter = SamplerMeter(pipeline, images, guidance, cache=find_latents_cache(), progress=progress)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of refiner steps longer than trained for: the study shows what they do
        meter.take_first(min(images, pipeline.manifest.max_batch)).measure(solver="euler", steps=4)  # warms up
        journals = record_adaptive_paths(pipeline, min(images, 256), guidance)
        for family, samplers in list_families(pipeline, lambda n: average_grid(journals, n)).items():
            results[family] = [meter.measure(**sampler) for sampler in samplers]
            finest = results[family][-1]
            progress.write(f"  {family}: down to {finest.error:.4f} with {finest.predictor_nfe:.1f} evaluations")
    return study


def record_adaptive_paths(pipeline: Pipeline, images: int, guidance: Guidance) -> Sequence[Journal]:
    """Return the steps that lte takes at tolerance 0.01, on other seeds than those of the study."""
    draw = make_balanced_draw(sorted(pipeline.manifest.model.classes), images, FIT_SEED)
    options: RequestOptions = {**guidance.options, "adaptive": "lte", "tolerance": 0.01, "seeds": draw.seeds}
    return pipeline.run(replace(pipeline.request(list(draw.labels), **options), vae=None)).journals


def _format_page(
    pipeline: Pipeline, images: int, studies: Sequence[GuidanceStudy], command: str, figures: Path, out: Path
) -> str:
    ran = describe_pipeline(pipeline)
    scale = studies[0].guidance.resolve(pipeline.manifest.defaults).scale
    page_folder, figures_path = out.resolve().parent, figures
    if figures.resolve().is_relative_to(page_folder):
        figures_path = figures.resolve().relative_to(page_folder)
    lines = [
        "# How to choose a sampler",
        "",
        f"Written by `{command}`; do not edit. {images} images (seeds 0–{images - 1}, classes take turns), "
        f"guidance {scale:g}. Engines {pipeline.manifest.engine_hash} ({pipeline.resolution} px) on {ran['provider']}, "
        f"{ran['device']}, {ran['precision']}, batches of {pipeline.manifest.max_batch}.",
        "",
        "- **Error** is the same-seed error: the root mean square distance of the latents from those of Heun with "
        f"{REFERENCE_SAMPLER['steps']} steps on the same engines and noise, mean over images. The standard "
        "deviation of a latent is about 1. The error measures the sampler alone, not the model.",
        "- **NFE** counts predictor + refiner evaluations, a guided one as one.",
        "- **ms** is the wall time of an image without decoding, in this run. Compare within the page: other machines "
        "have other times.",
        "",
        f"![error over evaluations and time]({figures_path.as_posix()}/samplers.png)",
        "",
        "## Recommendations",
        "",
        "The sampler with the least error, of those with at most so many predictor evaluations. Refiner evaluations "
        "are not counted.",
        "",
        *_format_recommendations(studies),
        "",
        "## Questions",
        "",
        *_format_answers(studies[0]),
    ]
    for study in studies:
        lines += ["", f"## Every sampler, {study.title}", ""]
        if study is studies[1]:
            note = "Outside the interval the unguided branch is not evaluated. The last column counts such evaluations."
            lines += [f"![with a guidance interval]({figures_path.as_posix()}/samplers-interval.png)", "", note, ""]
        lines += _format_table(study)
    return "\n".join(lines) + "\n"


def _format_recommendations(studies: Sequence[GuidanceStudy]) -> list[str]:
    lines = [
        "| predictor NFE | guidance throughout | error | with the interval | error |",
        "|---|---|---|---|---|",
    ]
    for budget in NFE_BUDGETS:
        cells = [str(budget)]
        for study in studies:
            affordable = [
                measurement for _, measurement in study.list_measurements() if measurement.predictor_nfe <= budget
            ]
            best = min(affordable, key=lambda measurement: measurement.error)
            cells += [f"`{best.name}` ({_format_nfe(best)})", f"{best.error:.4f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _format_answers(study: GuidanceStudy) -> list[str]:
    """Answer the questions of a user whose families were measured."""
    lines = []
    for question, family, other_family, other_name, unit in QUESTIONS:
        if {family, other_family} <= study.results.keys():
            lines += [f"**{question}** {_compare_families(study, family, other_family, other_name, unit)}", ""]
    # How much the step lengths of the norm rule differ at all shows why it cannot adapt.
    middle = study.results["adaptive norm"][len(CONSTANTS) // 2]
    lengths = np.array([step.dt for journal in middle.journals for step in journal.accepted[:-2]])
    nfe = [journal.total_nfe for journal in middle.journals]
    lte_journals = study.results["adaptive lte"][TOLERANCES.index(0.01)].journals
    lte_nfe = [journal.total_nfe for journal in lte_journals]
    rejected = 100 * float(np.mean([journal.rejected / len(journal.steps) for journal in lte_journals]))
    finest = study.results["adaptive lte"][-3:]
    slope = np.polyfit(
        np.log((TOLERANCES[-1], *FINE_TOLERANCES)), np.log([measurement.error for measurement in finest]), 1
    )[0]
    return [
        *lines,
        f"**How much do steps adapt at all?** Under the norm rule ({middle.name}), 95 % of all step lengths lie "
        f"between {np.quantile(lengths, 0.025):.3f} and {np.quantile(lengths, 0.975):.3f}, and images take {min(nfe)} "
        f"to {max(nfe)} evaluations. Under lte at tolerance 0.01 they take {min(lte_nfe)} to {max(lte_nfe)}, and "
        f"{rejected:.1f} % of the steps are rejected. Below a tolerance of 0.01 the error under lte goes with the "
        f"tolerance to the power {slope:.2f}.",
    ]


def _compare_families(study: GuidanceStudy, family: str, other_family: str, other_name: str, cost_name: str) -> str:
    """Compare the errors of two families at equal cost, interpolated on logarithmic axes, over the range of both."""
    _, unit, cost = COSTS[cost_name]
    curve, other_curve = study.list_costs(family, cost), study.list_costs(other_family, cost)
    low = max(min(x for x, _ in curve), min(x for x, _ in other_curve))
    high = min(max(x for x, _ in curve), max(x for x, _ in other_curve))
    if low >= high:
        return f"Not known: *{family}* and *{other_family}* share no range of {cost_name}."
    points = np.geomspace(low, high, 9)
    ratios = [_interpolate_error(curve, x) / _interpolate_error(other_curve, x) for x in points]
    mean_ratio = float(np.exp(np.mean(np.log(ratios))))
    verdict = "It helps" if mean_ratio < 0.95 else "It hurts" if mean_ratio > 1.05 else "It makes no difference"
    return (
        f"{verdict}. At equal {cost_name}, *{family}* has {mean_ratio:.2f} times the error of {other_name}. This is "
        f"the geometric mean over {low:.1f} {unit} … {high:.1f} {unit}; single points have {min(ratios):.2f} to "
        f"{max(ratios):.2f}."
    )


def _interpolate_error(points: Sequence[tuple[float, float]], x: float) -> float:
    logs = [(math.log(cost), math.log(max(error, 1e-12))) for cost, error in sorted(points)]
    return math.exp(float(np.interp(math.log(x), [a for a, _ in logs], [b for _, b in logs])))


def _format_nfe(measurement: SamplerMeasurement) -> str:
    refiner_text = f" + {measurement.refiner_nfe:.3g} R" if measurement.refiner_nfe else ""
    return f"{measurement.predictor_nfe:.4g}{refiner_text}"


def _format_table(study: GuidanceStudy) -> list[str]:
    lines = [
        "| family | sampler | NFE | error | 90 % of images below | ms | unguided |",
        "|---|---|---|---|---|---|---|",
    ]
    for family, measurement in study.list_measurements():
        error_p90 = float(np.quantile(measurement.errors, 0.9))
        lines.append(
            f"| {family} | `{measurement.name}` | {_format_nfe(measurement)} | {measurement.error:.4f} | "
            f"{error_p90:.4f} | {measurement.ms_per_image:.1f} | {measurement.unguided_nfe:g} |"
        )
    return lines
