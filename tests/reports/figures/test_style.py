"""How figures look."""

from __future__ import annotations

import pytest

from hpo.reports.figures.style import STATE_STYLES, THEMES, escape_plotly


def test_every_state_has_a_symbol_and_a_pattern_of_its_own() -> None:
    states = [look for name, look in STATE_STYLES.items() if name != "other"]
    assert len({look.symbol for look in STATE_STYLES.values()}) == len(STATE_STYLES)
    assert len({look.pattern for look in states}) == len(states)
    assert len({look.colour for look in states}) == len(states)


def luminance(colour: str) -> float:
    """Return the relative luminance of a colour, as WCAG 2 defines it."""
    parts = [int(colour[index : index + 2], 16) / 255 for index in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("page", ["#ffffff", "#14171d"])
def test_marks_stand_out_from_a_light_and_from_a_dark_page(page: str) -> None:
    for name, look in STATE_STYLES.items():
        light, dark = sorted((luminance(look.colour), luminance(page)), reverse=True)
        least = 3.0 if name not in ("pruned", "running") else 2.0  # orange and purple on white; their shapes are solid
        assert (light + 0.05) / (dark + 0.05) >= least, name
    assert set(THEMES) == {"light", "dark"}


def test_plotly_reads_no_tag_no_formula_and_no_variable_in_a_text() -> None:
    assert escape_plotly("<b>&lt; $x$ %{y}\x1b\n") == "&lt;b&gt;&amp;lt; &#36;x&#36; &#37;{y}\\x1b\\n"
    assert escape_plotly(0.5) == "0.5"
