"""Which path a product takes on the Triton backend: the table, its effect, and the same bits under every policy."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from op_checks import DEVICE, _results, check_parity, skip_unless_available
from test_units import linear_residual_case, mlp_case, norm_mlp_case

pytest.importorskip("triton")

from vitfast import ops
from vitfast.kernels import configs, mlp
from vitfast.kernels.product_table import ROWS

ANYWHERE = {"arch": None, "dtype": None, "unit": None, "rows": None, "width": None, "config": None, "reason": "a test"}


@pytest.fixture
def table(monkeypatch):
    """Puts rows before the one that fits everything, until the test ends."""

    def put(*rows: dict) -> None:
        entries = [ANYWHERE | row for row in rows] + [ANYWHERE | {"path": "library"}]
        monkeypatch.setattr(configs, "product_rows", lambda: tuple(map(configs.product_row, entries)))
        configs.product_choice.cache_clear()

    yield put
    configs.product_choice.cache_clear()


@pytest.fixture
def launched(monkeypatch):
    """The names of the fused products that were launched."""
    names: list[str] = []
    for name in ("linear_forward", "linear_activation_forward", "linear_residual_forward", "hidden_backward"):
        run = getattr(mlp, name)
        monkeypatch.setattr(mlp, name, lambda *a, _run=run, _name=name: (names.append(_name), _run(*a))[1])
    from vitfast.ops import dispatch

    dispatch._raw_kernels.cache_clear()  # it holds the functions
    yield names
    dispatch._raw_kernels.cache_clear()


def test_table_is_valid_and_says_why():
    rows = configs.product_rows()
    assert len(rows) == len(ROWS)
    assert all(row.reason for row in rows)
    last = rows[-1]
    assert (last.arch, last.dtype, last.unit, last.rows, last.width) == (None,) * 5


def test_first_fitting_row_decides(table):
    tile = {"rows": 64, "columns": 64, "depth": 32, "warps": 4, "stages": 2}
    table(
        {"arch": 90, "dtype": "bfloat16", "unit": "linear", "rows": "many", "path": "fused", "config": tile},
        {"unit": "linear_residual", "width": "wide", "path": "fused"},
    )
    choose = configs.product_choice
    bf16 = torch.bfloat16
    assert choose("linear", 4096, 768, 768, bf16, 90).path == "fused"
    assert choose("linear", 4096, 768, 768, bf16, 90).config == configs.ProductConfig(**tile)
    assert choose("linear", 4096, 768, 768, bf16, 103).path == "library"  # 103 is a 100
    assert choose("linear", 100, 768, 768, bf16, 90).path == "library"
    assert choose("linear", 4096, 768, 768, torch.float16, 90).path == "library"
    assert choose("linear_residual", 7, 1280, 5120, torch.float32, 75).path == "fused"
    assert choose("linear_residual", 7, 5120, 768, torch.float32, 75).path == "library"


@pytest.mark.parametrize(
    ("change", "message"),
    [({"path": "fast"}, "path is 'fast'"), ({"unit": "conv"}, "unit is 'conv'"), ({"arch": 91}, "arch is 91")],
)
def test_bad_rows(change, message):
    with pytest.raises(ValueError, match=message):
        configs.product_row(ANYWHERE | {"path": "library"} | change)


def _run(case, backend):
    return _results(partial(case.op, backend=backend), case.inputs(torch.float32, DEVICE), 0)


def test_the_table_decides_for_the_ops(table, launched):
    skip_unless_available("norm_mlp", "triton")
    table({"path": "library"})
    _run(norm_mlp_case((2, 5, 24)), "triton")
    assert launched == []
    table({"unit": "hidden_backward", "path": "fused"}, {"unit": "swiglu", "path": "fused"})
    _run(norm_mlp_case((2, 5, 24)), "triton")
    assert launched == ["hidden_backward"]
    _run(mlp_case((2, 5, 24), "swiglu"), "triton")
    assert launched == ["hidden_backward", "linear_activation_forward", "hidden_backward"]
    launched.clear()
    _run(linear_residual_case((2, 5, 24)), "triton_fused")
    _run(mlp_case((2, 5, 24)), "triton_library")
    assert launched == ["linear_residual_forward"]


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("fused", ["linear", "linear_activation", "swiglu", "hidden_backward"])
def test_recompute_gives_the_same_bits_on_mixed_paths(table, fused, activation):
    """h is made again on the path that made it, also where plain products take the other one."""
    skip_unless_available("norm_mlp", "triton")
    table({"unit": fused, "path": "fused"})
    runs = [_run(norm_mlp_case((3, 17, 40), policy, activation=activation), "triton") for policy in ("none", "mlp")]
    for name, value in runs[0].items():
        assert torch.equal(value, runs[1][name]), name


def test_forced_paths_run_only_when_named():
    rows = {row["backend"]: row for row in ops.backends() if row["op"] == "mlp"}
    assert {"triton", "triton_library", "triton_fused"} <= rows.keys()
    from vitfast.ops.dispatch import FORCED, TABLE

    for backend in TABLE["mlp"]:
        if backend.name in FORCED:
            assert "only when named" in str(backend.why_not("cuda", (torch.float32,), False))


def test_forced_path_in_an_op_without_products():
    """A whole model can be given the name: attention takes its only path."""
    skip_unless_available("attention", "triton")
    qkv = torch.randn(1, 5, 3, 2, 16, device=DEVICE)
    assert torch.equal(ops.attention(qkv, backend="triton_fused"), ops.attention(qkv, backend="triton"))


SWITCHES = {
    "plain": {"programs": 0, "descriptors": False, "halved": False},
    "persistent": {"programs": 2, "descriptors": False, "halved": False},
    "descriptors": {"programs": 0, "descriptors": True, "halved": False},
    "all": {"programs": 1, "descriptors": True, "halved": True},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["gelu", "swiglu"])
@pytest.mark.parametrize("switches", SWITCHES)
def test_tiles(table, switches, kind, dtype):
    """Every switch of a tile on its own, with several tiles each way, a remainder in rows and in columns."""
    tile = {"rows": 32, "columns": 32, "depth": 16, "warps": 4, "stages": 2} | SWITCHES[switches]
    table({"path": "fused", "config": tile})
    check_parity(norm_mlp_case((3, 23, 40), activation=kind), "norm_mlp", "triton", dtype)
