"""Bars as SVG, without any library: one panel for each figure, each with a scale of its own."""
import html

WIDTH, LABEL, VALUE, BAR, GAP, TITLE = 900, 210, 150, 17, 5, 44


def number(x):
    """Three digits are what a median is worth."""
    if x is None:
        return "-"
    return f"{x:,.0f}" if abs(x) >= 100 else f"{x:.3g}"


def text(x, y, what, **attributes):
    given = "".join(f' {k.replace("_", "-")}="{v}"' for k, v in attributes.items())
    return f'<text x="{x:.1f}" y="{y:.1f}"{given}>{html.escape(what)}</text>'


def bars(title, subtitle, panels, colours):
    """panels: (heading, [(series, median, lowest, highest)], goal or None); colours: series to colour, in the legend's order.
    Whiskers show the lowest and the highest round, a dashed line the goal."""
    out, y = [], 64
    x, row = 20, 0
    for series, colour in colours.items():
        if x + 30 + 7 * len(series) > WIDTH:
            x, row = 20, row + 1
        out.append(f'<rect x="{x}" y="{y + 18 * row - 10}" width="12" height="12" fill="{colour}"/>')
        out.append(text(x + 17, y + 18 * row, series))
        x += 40 + 7 * len(series)
    y += 18 * row + 12
    for heading, rows, goal in panels:
        rows = [r for r in rows if r[1] is not None]
        if not rows:
            continue
        y += TITLE
        out.append(text(20, y - 14, heading, font_weight="bold"))
        most = max([max(r[1], r[3]) for r in rows] + [goal or 0]) or 1
        scale = (WIDTH - LABEL - VALUE) / most
        top = y - 6
        for series, median, low, high in rows:
            out.append(text(LABEL - 8, y + 8, series, text_anchor="end"))
            out.append(f'<rect x="{LABEL}" y="{y - 5}" width="{median * scale:.1f}" height="{BAR}" fill="{colours[series]}"/>')
            if high > low:
                middle = y - 5 + BAR / 2
                out.append(f'<path d="M{LABEL + low * scale:.1f} {middle}H{LABEL + high * scale:.1f}" stroke="#222" stroke-width="1.5"/>')
            out.append(text(LABEL + max(median, high) * scale + 6, y + 8, number(median)))
            y += BAR + GAP
        if goal:
            at = LABEL + goal * scale
            out.append(f'<path d="M{at:.1f} {top}V{y - GAP}" stroke="#c00" stroke-width="1.5" stroke-dasharray="4 3"/>')
    head = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{y + 20}" font-family="sans-serif" font-size="12">',
            f'<rect width="{WIDTH}" height="{y + 20}" fill="white"/>',
            text(20, 24, title, font_size="16", font_weight="bold"), text(20, 42, subtitle, fill="#555")]
    return "\n".join(head + out + ["</svg>"]) + "\n"
