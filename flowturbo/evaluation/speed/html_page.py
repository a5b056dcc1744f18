"""The report as one HTML page that opens offline: no script, no style sheet, no picture from elsewhere.

The page carries its data: the report's JSON is in an element that browsers do not run.
"""

from __future__ import annotations

import json
from html import escape
from pathlib import Path

from flowturbo.evaluation.speed.bench_report import BenchmarkReport
from flowturbo.evaluation.speed.report_sections import Section, describe_machine, describe_method, list_sections
from runtime.system.files import write_atomically
from runtime.system.json_codec import to_json

_STYLE = """
:root { color-scheme: light dark; --line: #8886; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: 0; } h2 { font-size: 1.15rem; margin: 2rem 0 0.5rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid var(--line); padding: 0.2rem 0.6rem; text-align: right; vertical-align: top; }
th:first-child, td.text { text-align: left; } td:first-child { white-space: nowrap; }
.wide { overflow-x: auto; margin-bottom: 1rem; } .plots { display: flex; flex-wrap: wrap; gap: 1.5rem; }
figure { margin: 0; max-width: 100%; } figcaption { font-weight: 600; margin-bottom: 0.3rem; }
svg { max-width: 100%; height: auto; } svg text { font-size: 12px; fill: currentColor; } .grid { stroke: var(--line); }
.warning { border-left: 4px solid #d55e00; padding-left: 0.7rem; margin: 0.3rem 0; } small { opacity: 0.75; }
"""


def write_page(path: Path, report: BenchmarkReport) -> None:
    """Write the page, whole or not at all."""
    with write_atomically(path) as aside:
        aside.write_text(render_html(report), encoding="utf-8")


def render_html(report: BenchmarkReport) -> str:
    """Return the text of the page."""
    parts = [
        f"<h1>What a picture takes</h1><p><small>{escape(report.created)}, flowturbo {escape(report.flowturbo)}, "
        f"<code>{escape(' '.join(report.command))}</code></small></p>"
        f"<p>{escape(describe_machine(report))} {escape(describe_method(report))}</p>",
        *(f'<p class="warning">{escape(text)}</p>' for text in report.warnings),
        *map(_render_section, list_sections(report)),
    ]
    data = json.dumps(to_json(report), ensure_ascii=False).replace("<", "\\u003c")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<link rel="icon" href="data:,">'  # browsers ask for /favicon.ico otherwise
        f"<title>flowturbo-bench {escape(report.created)}</title><style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(filter(None, parts))
        + f'\n<script type="application/json" id="report">{data}</script>\n</body></html>\n'
    )


def _render_section(section: Section) -> str:
    """Draw figures first, then the table and its notes; nothing for an empty section. Cells are escaped here."""
    figures = [f"<figure><figcaption>{escape(caption)}</figcaption>{svg}</figure>" for caption, svg in section.figures]
    body = f'<div class="plots">{"".join(figures)}</div>' if figures else ""
    if section.rows:
        classes = ["text" if column.is_text else "" for column in section.columns]
        cells = [
            [f'<td class="{name}">{escape(cell)}</td>' for name, cell in zip(classes, row, strict=True)]
            for row in section.rows
        ]
        head = "".join(f"<th>{escape(column.title)}</th>" for column in section.columns)
        rows = "".join(f"<tr>{''.join(row)}</tr>" for row in cells)
        body += f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
    body += "".join(f"<p>{escape(note)}</p>" for note in section.notes)
    return f"<section><h2>{escape(section.title)}</h2>{body}</section>" if body else ""
