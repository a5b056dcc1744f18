"""The study of samplers: same-seed error and wall time of every sampler on one engine directory, and how to choose.

Written as a page with tables and plots; every number in it is measured in the one run that writes it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from calibration.plot import Sheet, plot_error_panel
from calibration.samplers.block_search import average_grid
from calibration.samplers.probe import FIT_SEED, Guidance, SamplerMeasurement, SamplerMeter, make_tenths_reporter
from flowturbo.evaluation.quality.same_seed import REFERENCE_SAMPLER
from flowturbo.evaluation.quality.sampled_latents import make_balanced_draw
from runtime.pipeline import Pipeline, describe_pipeline
from runtime.request import RequestOptions
from runtime.sampling.controllers import Journal
from runtime.sampling.solvers import ADAPTIVE_RULES
from runtime.sampling.tableaus import SEARCHED_TABLES
from runtime.system.files import make_folder, write_atomically, write_json
from runtime.system.hashes import find_cache_folder

Say = Callable[[str], None]
Samplers = Mapping[str, Sequence[Mapping[str, Any]]]
TOLERANCES = (0.3, 0.1, 0.03, 0.01)
FINE_TOLERANCES = (0.003, 0.001)
"""Of lte only: what its error goes to, where a step's error is small."""
CONSTANTS = (0.35, 0.25, 0.17, 0.11)
PUBLISHED_SCHEDULES = ("H1P5R3", "H2P4R2", "H2P8R2", "H5P7R3")
"""FlowTurbo's schedules that a small device may run."""
NFE_BUDGETS = (4, 6, 8, 12)
"""Predictor evaluations that the recommendations are for."""


def list_families(pipeline: Pipeline, make_frozen_grid: Callable[[int], tuple[float, ...]]) -> Samplers:
    """Samplers by family, each from coarse to fine: keyword arguments of `Pipeline.request`."""
    steps, pseudo_steps = (3, 4, 5, 7, 9, 11), (2, 3, 4, 6, 8, 10)
    samplers: dict[str, list[Mapping[str, Any]]] = {
        "Euler": [{"solver": "euler", "steps": n} for n in (4, 6, 8, 12)],
        "Heun": [{"solver": "heun", "steps": n} for n in (2, 3, 4, 6)],
        "AB2": [{"solver": "ab2", "steps": n} for n in steps],
        "AB3": [{"solver": "ab3", "steps": n} for n in (3, 5, 8)],
        "H1Pn": [{"schedule": f"H1P{n}"} for n in pseudo_steps],
        "H1Pn, lte grid": [{"schedule": f"H1P{n}", "grid": make_frozen_grid(n + 1)} for n in pseudo_steps],
        "AB2, lte grid": [{"solver": "ab2", "grid": make_frozen_grid(n)} for n in (3, 5, 7, 11)],
        "searched (published)": [{"solver": "searched", "steps": n} for n in sorted(SEARCHED_TABLES)],
        "adaptive norm": [{"adaptive": "norm", "constant": c} for c in CONSTANTS],
        "adaptive lte": [{"adaptive": "lte", "tolerance": tau} for tau in (*TOLERANCES, *FINE_TOLERANCES)],
        "dopri5": [{"solver": "dopri5", "tolerance": tau} for tau in (1e-1, 1e-2)],
    }
    tables = [sampler for sampler in pipeline.manifest.samplers if sampler.kind == "table"]
    plain_tables = sorted((s for s in tables if not s.refiner), key=lambda s: len(s.grid or ()))
    if plain_tables:
        samplers["searched (this model)"] = [{"schedule": sampler.name} for sampler in plain_tables]
    if pipeline.manifest.model.refiner is not None:
        samplers["FlowTurbo (paper)"] = [{"schedule": name} for name in PUBLISHED_SCHEDULES]
        samplers["H1Pn + R3"] = [{"schedule": f"H1P{n}R3"} for n in (4, 6, 8, 10)]
        samplers["adaptive blocks"] = [{"adaptive": "blocks", "tolerance": tau} for tau in TOLERANCES]
        if refiner_tables := sorted((s for s in tables if s.refiner), key=lambda s: len(s.grid or ())):
            samplers["searched + R (this model)"] = [{"schedule": sampler.name} for sampler in refiner_tables]
    return samplers


@dataclass(frozen=True)
class GuidanceStudy:
    """The study under one guidance: measurements by family."""

    guidance: Guidance
    results: Mapping[str, Sequence[SamplerMeasurement]]

    def list_measurements(self) -> list[tuple[str, SamplerMeasurement]]:
        return [(family, measurement) for family, results in self.results.items() for measurement in results]


def run_study(
    pipeline: Pipeline,
    images: int,
    guidance: Guidance,
    interval_guidance: Guidance,
    out: Path,
    figures: Path,
    command: str,
    say: Say,
) -> None:
    """Measures every family under both guidances and writes the page, its plots and its numbers (`.json`)."""
    studies = [_measure_guidance(pipeline, images, settings, say) for settings in (guidance, interval_guidance)]
    make_folder(figures)
    costs = (("NFE of the predictor", _get_predictor_nfe), ("ms per image, sampling only", _get_ms))
    for study, name in zip(studies, ("samplers", "samplers-interval"), strict=True):
        sheet = Sheet(2, width=6.4, height=5.2)
        for axes, (label, cost) in zip(sheet.axes, costs, strict=True):
            points = {
                family: [(cost(measurement), measurement.error) for measurement in results]
                for family, results in study.results.items()
            }
            plot_error_panel(axes, points, label, _format_guidance(study.guidance), legend=axes is sheet.axes[0])
        sheet.save(figures / f"{name}.png")
    page = _format_page(pipeline, images, studies, command, figures, out)
    with write_atomically(out) as aside:
        aside.write_text(page, encoding="utf-8")
    write_json(out.with_suffix(".json"), _collect_numbers(pipeline, images, studies, command))


def _measure_guidance(pipeline: Pipeline, images: int, guidance: Guidance, say: Say) -> GuidanceStudy:
    say(f"{_format_guidance(guidance)}: a very fine run of {images} images")
    cache = find_cache_folder()
    meter = SamplerMeter(
        pipeline,
        images,
        guidance,
        cache=None if cache is None else cache / "calibration",
        report=make_tenths_reporter(say),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of refiner steps longer than trained for: the study shows what they do
        meter.take_first(min(images, pipeline.manifest.max_batch)).measure(solver="euler", steps=4)  # warms up
        journals = record_adaptive_paths(pipeline, min(images, 256), guidance)
        results: dict[str, list[SamplerMeasurement]] = {}
        for family, samplers in list_families(pipeline, lambda n: average_grid(journals, n)).items():
            results[family] = [meter.measure(**sampler) for sampler in samplers]
            finest = results[family][-1]
            say(f"  {family}: down to {finest.error:.4f} with {finest.predictor_nfe:.1f} evaluations")
    return GuidanceStudy(guidance, results)


def record_adaptive_paths(pipeline: Pipeline, images: int, guidance: Guidance) -> Sequence[Journal]:
    """The steps that lte takes at tolerance 0.01, on other seeds than those that the study judges."""
    draw = make_balanced_draw(sorted(pipeline.manifest.model.classes), images, FIT_SEED)
    options: RequestOptions = {**guidance.options, "adaptive": "lte", "tolerance": 0.01, "seeds": draw.seeds}
    return pipeline.run(replace(pipeline.request(list(draw.labels), **options), vae=None)).journals


def _get_predictor_nfe(measurement: SamplerMeasurement) -> float:
    return measurement.predictor_nfe


def _get_ms(measurement: SamplerMeasurement) -> float:
    return 1e3 * measurement.seconds_per_image


def _format_guidance(guidance: Guidance) -> str:
    if guidance.interval == (0.0, 1.0):
        return "guidance throughout"
    return f"guidance for t in {guidance.interval[0]:g} … {guidance.interval[1]:g} only"


def _format_page(
    pipeline: Pipeline, images: int, studies: Sequence[GuidanceStudy], command: str, figures: Path, out: Path
) -> str:
    ran = describe_pipeline(pipeline)
    scale = studies[0].guidance.scale or pipeline.manifest.defaults.guidance
    figures_path = (
        Path(*figures.resolve().relative_to(out.resolve().parent).parts) if _is_below(figures, out) else figures
    )
    lines = [
        "# How to choose a sampler",
        "",
        f"Written by `{command}`; do not edit. {images} images (seeds 0–{images - 1}, classes take turns), "
        f"guidance {scale:g}. Engines {pipeline.manifest.engine_hash} ({pipeline.resolution} px) on {ran['provider']}, "
        f"{ran['device']}, {ran['precision']}, batches of {pipeline.manifest.max_batch}.",
        "",
        "- **Error** is the same-seed error: the root mean square distance of the latents from those of Heun with "
        f"{REFERENCE_SAMPLER['steps']} steps on the same engines and noise, mean over images. The standard "
        "deviation of a "
        "latent is about 1. The error measures the sampler alone, not the model.",
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
        lines += ["", f"## Every sampler, {_format_guidance(study.guidance)}", ""]
        if study is studies[1]:
            note = "Outside the interval the unguided branch is not evaluated. The last column counts such evaluations."
            lines += [f"![with a guidance interval]({figures_path.as_posix()}/samplers-interval.png)", "", note, ""]
        lines += _format_table(study)
    return "\n".join(lines) + "\n"


def _is_below(figures: Path, out: Path) -> bool:
    return figures.resolve().is_relative_to(out.resolve().parent)


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
    """What the numbers say to the questions that a user has."""
    results = study.results
    parts = [
        (
            "Does the norm rule help?",
            _compare_families(study, "adaptive norm", "H1Pn", "the same blocks in equal steps"),
        ),
        (
            "Does error control (lte) help?",
            _compare_families(study, "adaptive lte", "H1Pn", "the same blocks in equal steps"),
        ),
        ("Does its mean schedule, frozen, help?", _compare_families(study, "H1Pn, lte grid", "H1Pn", "a uniform grid")),
        ("Does P help against AB2?", _compare_families(study, "H1Pn", "AB2", "AB2 with as many evaluations")),
        ("Do published tables help against AB2?", _compare_families(study, "searched (published)", "AB2", "AB2")),
    ]
    if "searched (this model)" in results:
        parts.append(
            (
                "Does calibrating a table to this model help?",
                _compare_families(study, "searched (this model)", "searched (published)", "the published tables"),
            )
        )
    if "H1Pn + R3" in results:
        parts.append(
            (
                "Do three R blocks help at equal time?",
                _compare_families(study, "H1Pn + R3", "AB2", "AB2", _get_ms),
            )
        )
        parts.append(
            (
                "Does block choice help at equal time?",
                _compare_families(study, "adaptive blocks", "AB2", "AB2", _get_ms),
            )
        )
        if "searched + R (this model)" in results:
            answer_text = _compare_families(
                study, "searched + R (this model)", "searched (this model)", "tables without refiner", _get_ms
            )
            parts.append(("Do refiner evaluations help a searched table?", answer_text))
    adaptation = _format_adaptation(study)
    lines = [line for question, answer in parts for line in (f"**{question}** {answer}", "")]
    return [*lines, adaptation]


def _compare_families(
    study: GuidanceStudy,
    family: str,
    other_family: str,
    other_name: str,
    cost: Callable[[SamplerMeasurement], float] = _get_predictor_nfe,
) -> str:
    """Ratio of errors of two families at equal cost, interpolated on logarithmic axes, over the range both have."""
    curve, other_curve = (
        [(cost(measurement), measurement.error) for measurement in study.results[name]]
        for name in (family, other_family)
    )
    low = max(min(x for x, _ in curve), min(x for x, _ in other_curve))
    high = min(max(x for x, _ in curve), max(x for x, _ in other_curve))
    unit = "evaluations" if cost is _get_predictor_nfe else "time"
    if low >= high:
        return f"Not known: *{family}* and *{other_family}* share no range of {unit}."
    points = np.geomspace(low, high, 9)
    ratios = [_interpolate_error(curve, x) / _interpolate_error(other_curve, x) for x in points]
    mean_ratio = float(np.exp(np.mean(np.log(ratios))))
    verdict = "It helps" if mean_ratio < 0.95 else "It hurts" if mean_ratio > 1.05 else "It makes no difference"
    return (
        f"{verdict}. At equal {unit}, *{family}* has {mean_ratio:.2f} times the error of {other_name}. This is "
        "the geometric "
        f"mean over {_format_cost(low, cost)} … {_format_cost(high, cost)}; single points have {min(ratios):.2f} to "
        f"{max(ratios):.2f}."
    )


def _format_cost(cost: float, get_cost: Callable[[SamplerMeasurement], float]) -> str:
    return f"{cost:.1f} NFE" if get_cost is _get_predictor_nfe else f"{cost:.1f} ms"


def _interpolate_error(points: Sequence[tuple[float, float]], x: float) -> float:
    ordered = sorted(points)
    logs = [(math.log(a), math.log(max(b, 1e-12))) for a, b in ordered]
    return math.exp(float(np.interp(math.log(x), [a for a, _ in logs], [b for _, b in logs])))


def _format_adaptation(study: GuidanceStudy) -> str:
    """How much step lengths of the norm rule differ at all: why it cannot adapt."""
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
    return (
        f"**How much do steps adapt at all?** Under the norm rule ({middle.name}), 95 % of all step lengths lie "
        f"between {np.quantile(lengths, 0.025):.3f} and {np.quantile(lengths, 0.975):.3f}, and images take {min(nfe)} "
        f"to {max(nfe)} evaluations. Under lte at tolerance 0.01 they take {min(lte_nfe)} to {max(lte_nfe)}, and "
        f"{rejected:.1f} % of the steps are rejected. Below a tolerance of 0.01 the error under lte goes with the "
        f"tolerance to the power {slope:.2f}."
    )


def _format_nfe(measurement: SamplerMeasurement) -> str:
    return f"{measurement.predictor_nfe:.4g}" + (
        f" + {measurement.refiner_nfe:.3g} R" if measurement.refiner_nfe else ""
    )


def _format_table(study: GuidanceStudy) -> list[str]:
    lines = [
        "| family | sampler | NFE | error | 90 % of images below | ms | unguided |",
        "|---|---|---|---|---|---|---|",
    ]
    for family, measurement in study.list_measurements():
        error_p90 = float(np.quantile(measurement.errors, 0.9))
        lines.append(
            f"| {family} | `{measurement.name}` | {_format_nfe(measurement)} | {measurement.error:.4f} | "
            f"{error_p90:.4f} | "
            f"{_get_ms(measurement):.1f} | {measurement.unguided_nfe:g} |"
        )
    return lines


def _collect_numbers(pipeline: Pipeline, images: int, studies: Sequence[GuidanceStudy], command: str) -> dict[str, Any]:
    return {
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
                        "ms": _get_ms(measurement),
                    }
                    for family, measurement in study.list_measurements()
                ],
            }
            for study in studies
        ],
    }
