"""Draw two kinds of plot as inline SVG: the base install has no plotting library, and a page must open offline.

Text is escaped here. Colours are Okabe and Ito's, which colour-blind people can tell apart; everything else has the
page's text colour, so that dark pages work.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#999933", "#882255")
WIDTH, HEIGHT = 560, 320
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 16, 12, 44
_LINE_HEIGHT, _BAR_HEIGHT = 18, 22


@dataclass(frozen=True)
class ChartLine:
    """A named line; `spread` has the ends of the bar at each point, where there are bars."""

    name: str
    points: Sequence[tuple[float, float]]
    spread: Sequence[tuple[float, float]] = ()


def draw_line_chart(lines: Sequence[ChartLine], x_label: str, y_label: str, *, markers: bool = True) -> str:
    """Draw lines over a common pair of axes, y from 0, with a legend below."""
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points] + [high for line in lines for _, high in line.spread]
    x_axis = _Axis.fit(min(xs), max(xs), _LEFT, WIDTH - _RIGHT)
    y_axis = _Axis.fit(0.0, max(ys), HEIGHT - _BOTTOM, _TOP)
    parts = [*_draw_grid(x_axis, y_axis, x_label, y_label)]
    for index, line in enumerate(lines):
        parts += _draw_line(line, COLOURS[index % len(COLOURS)], index >= len(COLOURS), x_axis, y_axis, markers)
    legend = _draw_legend([line.name for line in lines], HEIGHT + 4)
    height = HEIGHT + 8 + _LINE_HEIGHT * len(lines)
    return _wrap_svg(height, f"{y_label} by {x_label}", [*parts, *legend])


def draw_stacked_bars(rows: Sequence[tuple[str, Mapping[str, float]]], unit: str) -> str:
    """Draw one bar per row, divided into its parts; the pointer shows the value of a part."""
    names = list(dict.fromkeys(name for _, parts in rows for name in parts))
    longest = max(sum(parts.values()) for _, parts in rows)
    axis = _Axis.fit(0.0, longest, 8, WIDTH - 60)
    elements: list[str] = []
    for index, (label, parts) in enumerate(rows):
        top = index * (_BAR_HEIGHT + _LINE_HEIGHT + 6)
        elements.append(_draw_text(8, top + 13, label))
        running_sum = 0.0
        for name, value in parts.items():
            x, width = axis.to_pixels(running_sum), axis.to_pixels(running_sum + value) - axis.to_pixels(running_sum)
            colour = COLOURS[names.index(name) % len(COLOURS)]
            title = f"<title>{escape(f'{label}, {name}: {value:.4g} {unit}')}</title>"
            box = f'x="{x:.1f}" y="{top + _LINE_HEIGHT}" width="{max(width, 0):.1f}" height="{_BAR_HEIGHT}"'
            elements.append(f'<rect {box} fill="{colour}">{title}</rect>')
            running_sum += value
        elements.append(
            _draw_text(
                axis.to_pixels(running_sum) + 4,
                top + _LINE_HEIGHT + 15,
                f"{running_sum:.0f} {unit}" if running_sum >= 100 else f"{running_sum:.3g} {unit}",
            )
        )
    bottom = len(rows) * (_BAR_HEIGHT + _LINE_HEIGHT + 6)
    return _wrap_svg(
        bottom + 8 + _LINE_HEIGHT * len(names), f"parts in {unit}", [*elements, *_draw_legend(names, bottom + 4)]
    )


@dataclass(frozen=True)
class _Axis:
    """A linear scale from values to pixels, with its ticks."""

    low: float
    high: float
    start: float
    end: float
    ticks: tuple[float, ...]

    @classmethod
    def fit(cls, low: float, high: float, start: float, end: float) -> _Axis:
        """Fit from `low` or a tick below it to a tick above `high`; a single value gets room around it.

        Ticks are 1, 2 or 5 times a power of ten apart.
        """
        if high <= low:
            low, high = (0.0, low + 1.0 if low <= 0 else 2 * low) if low >= 0 else (low, 0.0)
        rough_step = (high - low) / 5
        power = 10.0 ** math.floor(math.log10(rough_step))
        step = next(factor * power for factor in (1.0, 2.0, 5.0, 10.0) if factor * power >= rough_step * 0.999)
        first, last = math.floor(low / step), math.ceil(high / step)
        ticks = tuple(round(i * step, 10) for i in range(first, last + 1))
        return cls(ticks[0], ticks[-1], start, end, ticks)

    def to_pixels(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def _draw_grid(x_axis: _Axis, y_axis: _Axis, x_label: str, y_label: str) -> list[str]:
    left, right, bottom, top = _LEFT, WIDTH - _RIGHT, HEIGHT - _BOTTOM, _TOP
    parts = []
    for tick in y_axis.ticks:
        y = y_axis.to_pixels(tick)
        parts.append(f'<path class="grid" d="M{left} {y:.1f}H{right}"/>')
        parts.append(_draw_text(left - 6, y + 4, f"{tick:g}", anchor="end"))
    for tick in x_axis.ticks:
        x = x_axis.to_pixels(tick)
        parts.append(f'<path class="grid" d="M{x:.1f} {top}V{bottom}"/>')
        parts.append(_draw_text(x, bottom + 16, f"{tick:g}", anchor="middle"))
    parts.append(_draw_text((left + right) / 2, HEIGHT - 8, x_label, anchor="middle"))
    middle = (top + bottom) / 2
    rotation = f'transform="rotate(-90 14 {middle:.1f})"'
    parts.append(f'<text x="14" y="{middle:.1f}" text-anchor="middle" {rotation}>{escape(y_label)}</text>')
    return parts


def _draw_line(line: ChartLine, colour: str, dashed: bool, x_axis: _Axis, y_axis: _Axis, markers: bool) -> list[str]:
    pixels = [(x_axis.to_pixels(x), y_axis.to_pixels(y)) for x, y in line.points]
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in pixels)
    dash = ' stroke-dasharray="6 4"' if dashed else ""
    parts = [f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="1.5"{dash}/>']
    for (x, _), (low, high) in zip(pixels, line.spread, strict=False):
        parts.append(
            f'<path d="M{x:.1f} {y_axis.to_pixels(low):.1f}V{y_axis.to_pixels(high):.1f}" stroke="{colour}" '
            'opacity="0.5"/>'
        )
    for (x, y), (value_x, value_y) in zip(pixels, line.points, strict=True) if markers else ():
        title = f"<title>{escape(f'{line.name}: {value_x:g}, {value_y:.4g}')}</title>"
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}">{title}</circle>')
    return parts


def _draw_legend(names: Sequence[str], top: float) -> list[str]:
    parts = []
    for index, name in enumerate(names):
        y, colour = top + index * _LINE_HEIGHT, COLOURS[index % len(COLOURS)]
        parts.append(f'<rect x="8" y="{y:.0f}" width="12" height="12" fill="{colour}"/>')
        parts.append(_draw_text(26, y + 11, name))
    return parts


def _draw_text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _wrap_svg(height: float, label: str, parts: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:.0f}" width="{WIDTH}" height="{height:.0f}" role="img" '
        f'aria-label="{escape(label)}">{"".join(parts)}</svg>'
    )
