"""The mathematics of balance against values from tables and closed forms."""

from __future__ import annotations

import math
import random

import pytest

from nodeproxy.compare.statistics import chi_square, p_value, shows_all, upper_gamma


@pytest.mark.parametrize(
    ("statistic", "degrees", "chance"),
    [  # critical values of chi-square, as printed in tables (NIST/SEMATECH e-Handbook, 1.3.6.7.4)
        (3.841, 1, 0.05),
        (6.635, 1, 0.01),
        (10.828, 1, 0.001),
        (5.991, 2, 0.05),
        (18.307, 10, 0.05),
        (29.588, 10, 0.001),
        (43.773, 30, 0.05),
        (124.342, 100, 0.05),
        (149.449, 100, 0.001),
        (3.940, 10, 0.95),
        (70.065, 100, 0.99),
    ],
)
def test_p_value_is_that_of_the_tables(statistic: float, degrees: int, chance: float) -> None:
    assert p_value(statistic, degrees) == pytest.approx(chance, rel=2e-3)


@pytest.mark.parametrize("x", [0.01, 0.5, 1.0, 1.5, 3.0, 20.0, 80.0])
def test_upper_gamma_has_its_closed_forms(x: float) -> None:
    assert upper_gamma(1.0, x) == pytest.approx(math.exp(-x), rel=1e-10)
    assert upper_gamma(0.5, x) == pytest.approx(math.erfc(math.sqrt(x)), rel=1e-10)
    assert upper_gamma(3.0, x) == pytest.approx(math.exp(-x) * (1 + x + x * x / 2), rel=1e-10)


def test_edges() -> None:
    assert p_value(0.0, 5) == 1.0
    assert p_value(7.0, 0) == 1.0
    assert p_value(1e6, 5) == 0.0
    assert 0.4 < p_value(999.0, 999) < 0.6
    with pytest.raises(ValueError, match="not defined"):
        upper_gamma(0, 1)


def test_chi_square() -> None:
    assert chi_square([10, 10, 10]) == 0
    assert chi_square([12, 8]) == pytest.approx(0.8)
    assert chi_square([0, 0]) == 0
    assert chi_square([]) == 0


def test_p_values_of_equal_shares_are_themselves_evenly_spread() -> None:
    chance = random.Random(7)
    found = []
    for _ in range(400):
        drawn = [chance.randrange(8) for _ in range(200)]
        found.append(p_value(chi_square([drawn.count(one) for one in range(8)]), 7))
    assert 0.4 < sum(found) / len(found) < 0.6
    assert 0.01 < sum(one < 0.05 for one in found) / len(found) < 0.10


def test_so_many_draws_show_all() -> None:
    assert shows_all(1, 1e-9) == 1
    assert shows_all(2, 1e-9) == 31
    choices, draws = 10, shows_all(10, 1e-9)
    assert choices * (1 - 1 / choices) ** draws <= 1e-9 < choices * (1 - 1 / choices) ** (draws - 1)
