"""RoPE scaling: published numbers (transformers 5.23.0 and 4.57.6 agree on them), invariants."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from longspan.errors import InputError
from longspan.position import (
    default,
    dynamic,
    linear,
    llama3,
    longrope,
    ntk,
    ntk_base,
    yarn,
    yarn_temperature,
)

DIM, BASE = 128, 10_000.0
SAMPLED = [1, 16, 32, 40, 48, 63]

VECTORS = {
    "default": (
        default(DIM, BASE),
        [8.659644e-01, 1.000000e-01, 1.000000e-02, 3.162278e-03, 1.000000e-03, 1.154782e-04],
    ),
    "dynamic at 8192": (
        dynamic(DIM, BASE, 2, 4096, 8192),
        [8.509943e-01, 7.565303e-02, 5.723382e-03, 1.574222e-03, 4.329912e-04, 3.849273e-05],
    ),
    "dynamic at 16384": (
        dynamic(DIM, BASE, 2, 4096, 16384),
        [8.396258e-01, 6.100591e-02, 3.721721e-03, 9.192419e-04, 2.270470e-04, 1.649689e-05],
    ),
    "yarn 2": (
        yarn(DIM, BASE, 2, 4096),
        [8.659644e-01, 1.000000e-01, 7.692308e-03, 1.946017e-03, 5.000000e-04, 5.773910e-05],
    ),
    "yarn 16": (
        yarn(DIM, BASE, 16, 4096),
        [8.659644e-01, 1.000000e-01, 5.673077e-03, 8.817890e-04, 6.250000e-05, 7.217387e-06],
    ),
    "llama3": (
        llama3(DIM, 500_000.0, 8, 8192),
        [8.146172e-01, 3.760603e-02, 5.248460e-04, 3.428102e-05, 6.647870e-06, 3.068926e-07],
    ),
}


@pytest.mark.parametrize("name", VECTORS)
def test_frequencies_equal_the_published_vectors(name):
    frequencies, expected = VECTORS[name]
    # The vectors are printed with seven digits from float32 code.
    np.testing.assert_allclose(frequencies.inv_freq[SAMPLED], expected, rtol=1e-6)


def test_linear_halves_the_default():
    np.testing.assert_allclose(
        linear(DIM, BASE, 2).inv_freq, default(DIM, BASE).inv_freq / 2, rtol=1e-15
    )


def test_yarn_without_truncation():
    inv_freq = yarn(DIM, BASE, 16, 4096, truncate=False).inv_freq
    np.testing.assert_allclose(inv_freq[[32, 40]], [5.696214e-03, 8.164705e-04], rtol=1e-6)


def test_yarn_temperatures():
    factors = [2, 4, 8, 16, 32]
    expected = [1.069315, 1.138629, 1.207944, 1.277259, 1.346574]
    np.testing.assert_allclose([yarn_temperature(s) for s in factors], expected, rtol=1e-6)
    scaled = yarn(DIM, BASE, 2, 4096, mscale=0.707, mscale_all_dim=1)
    assert scaled.attention_factor == pytest.approx(0.98101, rel=1e-5)


def test_ntk_bases():
    expected = [20221.26, 40889.94, 82684.62, 167198.74, 338096.95]
    got = [ntk_base(DIM, BASE, s) for s in (2, 4, 8, 16, 32)]
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_longrope_temperatures_and_division():
    expected = [1.040833, 1.080123, 1.118034, 1.154701, 1.190238]
    divisors = np.linspace(1, 5, DIM // 2)
    for factor, temperature in zip((2, 4, 8, 16, 32), expected, strict=True):
        inv_freq, got = longrope(DIM, BASE, divisors.tolist(), factor, 4096)
        assert got == pytest.approx(temperature, rel=1e-6)
        np.testing.assert_allclose(inv_freq * divisors, default(DIM, BASE).inv_freq, rtol=1e-14)


@pytest.mark.parametrize(
    ("base", "trained", "low", "high"),
    [(1e4, 4096, 20, 46), (1e4, 2048, 16, 41), (5e5, 8192, 18, 35)],
)
def test_yarn_ramp_ends(base, trained, low, high):
    ratio = yarn(DIM, base, 4, trained).inv_freq / default(DIM, base).inv_freq
    unchanged, divided = np.isclose(ratio, 1), np.isclose(ratio, 0.25)
    assert unchanged.sum() == low + 1
    assert divided.sum() == DIM // 2 - high


factors = st.floats(1, 64)
dims = st.integers(2, 64).map(lambda half: 2 * half)
bases = st.floats(1e3, 1e7)


@given(dims, bases, factors)
def test_between_interpolated_and_unscaled(dim, base, factor):
    theta = default(dim, base).inv_freq
    for scaled in (
        linear(dim, base, factor),
        ntk(dim, base, factor),
        yarn(dim, base, factor, 2048),
        llama3(dim, base, factor, 2048),
    ):
        assert (scaled.inv_freq <= theta * (1 + 1e-12)).all()
        assert (scaled.inv_freq >= theta / factor * (1 - 1e-12)).all()
    assert ntk(dim, base, factor).inv_freq[0] == 1
    np.testing.assert_allclose(ntk(dim, base, factor).inv_freq[-1], theta[-1] / factor, rtol=1e-12)


@given(dims, bases)
def test_factor_one_changes_nothing(dim, base):
    theta = default(dim, base)
    for scaled in (
        linear(dim, base, 1),
        ntk(dim, base, 1),
        dynamic(dim, base, 1, 2048, 2048),
        yarn(dim, base, 1, 2048),
        llama3(dim, base, 1, 2048),
        longrope(dim, base, [1.0] * (dim // 2), 1, 2048),
    ):
        np.testing.assert_allclose(scaled.inv_freq, theta.inv_freq, rtol=1e-12)
        assert scaled.attention_factor == 1


@given(dims, bases, factors, st.integers(1, 2048))
def test_dynamic_inside_the_trained_length_changes_nothing(dim, base, factor, current):
    got = dynamic(dim, base, factor, 2048, current).inv_freq
    np.testing.assert_allclose(got, default(dim, base).inv_freq, rtol=1e-12)


def test_llama3_keeps_fast_and_divides_slow_dimensions():
    ratio = llama3(DIM, 5e5, 8, 8192).inv_freq / default(DIM, 5e5).inv_freq
    np.testing.assert_allclose(ratio[:29], 1)
    np.testing.assert_allclose(ratio[35:], 1 / 8)


@pytest.mark.parametrize(
    "call",
    [
        lambda: default(7, BASE),
        lambda: default(8, 1.0),
        lambda: linear(8, BASE, 0.5),
        lambda: ntk(2, BASE, 2),
        lambda: llama3(8, BASE, 2, 512, low_freq_factor=4, high_freq_factor=4),
        lambda: longrope(8, BASE, [1.0] * 3, 2, 512),
    ],
)
def test_arguments_out_of_range_are_refused(call):
    with pytest.raises(InputError):
        call()
