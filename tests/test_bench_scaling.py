"""How cost grows with each axis, and what more threads gain."""

from __future__ import annotations

import dataclasses

import pytest
from bench_checks import row

from vitfast.benchmarks import harness, presets, report, scaling, suites

pytestmark = pytest.mark.usefixtures("one_thread")


def test_growth_is_fitted() -> None:
    rows = [row(ms=1e-6 * L**1.5, shape=f"B=2 L={L}", peak_mib=float(L**2)) for L in (64, 128, 256)]
    found = scaling.fits(rows)
    assert [(fit.axis, fit.quantity, fit.low, fit.high) for fit in found] == [("L", "ms", 64, 256)]
    assert (found[0].exponent, found[0].last) == pytest.approx((1.5, 1.5))
    assert "| ms | float32 | forward | tokens (L) | 64–256 | 1.50 (1.50) |" in report.growth_table(rows)
    assert scaling.fits(rows[:2]) == []
    model = [dataclasses.replace(r, op="model", shape=f"model=m B={2 * i + 1}") for i, r in enumerate(rows)]
    assert [(fit.axis, fit.quantity) for fit in scaling.fits(model)] == [("B", "ms"), ("B", "peak MiB")]
    fixed_cost = [row(ms=100.0 + L, shape=f"L={L}") for L in (1, 10, 10_000, 20_000)]
    assert scaling.fits(fixed_cost)[0].last > scaling.fits(fixed_cost)[0].exponent


def test_axes_that_move_together_are_one_series() -> None:
    rows = [row(ms=float(D), shape=f"B=2 D={D} F={4 * D}") for D in (64, 128, 256)]
    rows.append(row(ms=1.0, shape="B=2 D=512 F=512"))
    (panel,) = scaling.growth_panels(rows)
    assert (panel.axis, panel.rest, panel.sizes) == ("D", "B=2 F=4D", [64, 128, 256])


def test_threads_are_compared_with_one() -> None:
    rows = [row(ms=8.0 / n**0.5, shape=f"B=2 L=4 T={n}") for n in (1, 2, 4)]
    rows += [row("sdpa", 3.0, "B=2 L=4 T=2"), row("sdpa", 2.0, "B=2 L=4 T=4")]
    (gain,) = scaling.gains(rows)
    assert (gain.threads, gain.speed_up) == (4, pytest.approx(2.0))
    line = "| attention B=2 L=4 | float32 | forward | **vitfast cpu** | 8.00 | 4.00 | 4 | 2.00 | 50% |"
    assert line in report.threads_table(rows)
    assert scaling.fits(rows) == []
    assert [presets.thread_counts(n) for n in (1, 2, 6, 8)] == [[1], [1, 2], [1, 2, 4, 6], [1, 2, 4, 8]]


def test_sweeps_cover_every_axis() -> None:
    """What the cost is said to grow with, and how far."""
    reach = {
        "attention": {"L": (64, 4096), "E": (16, 256), "B": (1, 32)},
        "layer_norm": {"D": (64, 8192), "L": (64, 4097), "B": (1, 64)},
        "mlp": {"D": (64, 1024), "B": (1, 16)},
        "patch_embed": {"S": (224, 1024), "B": (1, 32), "D": (192, 1280)},
        "model": {"L": (197, 4097), "B": (1, 64), "D": (192, 768), "depth": (3, 24)},
        "train": {"L": (197, 1025), "B": (1, 16)},
    }
    for name, axes in reach.items():
        for device in ("cpu", "cuda"):
            items = suites.plan([name], device, "growth", dtypes=["float32"])
            assert len({item.title for item in items}) == len(items)
            rows = [row(shape=harness.shape_text(item.shape)) for item in items]
            found = {fit.axis: (fit.low, fit.high) for fit in scaling.fits(rows)}
            assert set(found) == set(axes)
            for axis, (low, high) in axes.items():
                assert device == "cuda" or found[axis] == (low, high)
