"""A plot of lines on logarithmic axes, as SVG text."""

import math
from collections.abc import Mapping, Sequence
from xml.sax.saxutils import escape

WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 760, 440, 70, 40, 200, 50
COLOURS = ("#1b6ca8", "#c8553d", "#3a7d44", "#7b4b94", "#b8860b", "#555555")


def line_plot(lines: Mapping[str, Sequence[tuple[float, float]]], title: str, x_label: str, y_label: str) -> str:
    """SVG of one line with points for each name; all values are positive."""
    points = [point for line in lines.values() for point in line]
    if not points:
        raise ValueError("lines: expected at least one point, got none")
    x_low, x_high = min(x for x, _ in points), max(x for x, _ in points)
    y_low = 10 ** math.floor(math.log10(min(y for _, y in points)))
    y_high = 10 ** math.ceil(math.log10(max(y for _, y in points)))
    x_high, y_high = max(x_high, 2 * x_low), max(y_high, 10 * y_low)

    def place(x: float, y: float) -> tuple[float, float]:
        across = math.log(x / x_low) / math.log(x_high / x_low)
        up = math.log(y / y_low) / math.log(y_high / y_low)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif"'
        ' font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="20" font-size="13">{escape(title)}</text>',
        text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 10, x_label, "middle"),
        f'<text transform="translate(18 {HEIGHT / 2}) rotate(-90)" text-anchor="middle">{escape(y_label)}</text>',
    ]
    for tick in sorted({x for x, _ in points}):
        (x, bottom), (_, top) = place(tick, y_low), place(tick, y_high)
        parts += [line(x, bottom, x, top, "#e4e4e4"), text(x, bottom + 16, thousands(tick), "middle")]
    decades = range(round(math.log10(y_low)), round(math.log10(y_high)) + 1)
    for tick in (factor * 10.0**decade for decade in decades for factor in (1, 2, 5)):
        if tick <= y_high * 1.001:
            left, y = place(x_low, tick)
            parts += [line(left, y, place(x_high, tick)[0], y, "#e4e4e4"), text(left - 6, y + 4, f"{tick:g}", "end")]
    for index, (name, values) in enumerate(lines.items()):
        colour = COLOURS[index % len(COLOURS)]
        placed = [place(*value) for value in sorted(values)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in placed]
        y = TOP + 20 * index + 10
        parts += [line(WIDTH - RIGHT + 12, y, WIDTH - RIGHT + 32, y, colour), text(WIDTH - RIGHT + 38, y + 4, name)]
    return "\n".join([*parts, "</svg>"]) + "\n"


def line(x1: float, y1: float, x2: float, y2: float, colour: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}"/>'


def text(x: float, y: float, words: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'


def thousands(tokens: float) -> str:
    for size, unit in ((2**20, "M"), (2**10, "K")):
        if tokens >= size:
            return f"{tokens / size:g}{unit}"
    return f"{tokens:g}"
