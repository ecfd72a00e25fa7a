"""Dependencies point one way, importing is cheap, and the package maps to its folders."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# package -> what of vitfast it may import, beside itself
ALLOWED = {
    "ops": {"kernels"},
    "layers": {"ops"},
    "models": {"layers", "ops"},
    "dropin": {"models", "layers", "ops"},
    "train": {"models", "layers", "ops"},
    "cli": {"train", "models", "layers", "ops", "benchmarks"},
}
# Names of the package itself (vitfast.create_model, ...) are for the outer rings.
MAY_USE_TOP_LEVEL = {"train", "cli"}


def imports(path: Path) -> set[str]:
    """Full names of what a file imports, relative imports resolved."""
    package = ["vitfast", *path.relative_to(ROOT / "vitfast").parts[:-1]]
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = [*base, *([node.module] if node.module else [])]
            names |= {".".join([*base, alias.name]) for alias in node.names}
    return names


@pytest.mark.parametrize("package", ALLOWED)
def test_dependencies_point_one_way(package: str) -> None:
    for path in (ROOT / "vitfast" / package).rglob("*.py"):
        for name in imports(path):
            parts = name.split(".")
            if parts[0] != "vitfast" or len(parts) == 1 or parts[1] == package:
                continue
            if not (ROOT / "vitfast" / parts[1]).is_dir():
                assert package in MAY_USE_TOP_LEVEL, f"{path.name} imports {name}"
            else:
                assert parts[1] in ALLOWED[package], f"{path.name} imports {name}"


def test_no_op_imports_another_op() -> None:
    ops = {path.stem for path in (ROOT / "vitfast/ops").glob("*.py") if "\n_" + path.stem in path.read_text()}
    assert {"attention", "layer_norm", "mlp", "norm_mlp", "patch_embed"} <= ops
    for op in ops:
        others = {f"vitfast.ops.{other}" for other in ops - {op}}
        found = {
            name for name in imports(ROOT / f"vitfast/ops/{op}.py") if any(name.startswith(o + ".") for o in others)
        }
        assert not found, f"{op} imports {found}"


def test_kernels_import_only_torch_triton_and_themselves() -> None:
    standard = sys.stdlib_module_names
    for path in (ROOT / "vitfast/kernels").glob("*.py"):
        for name in imports(path):
            parts = name.split(".")
            own = parts[:2] == ["vitfast", "kernels"]
            assert own or parts[0] in {"torch", "triton"} | standard, f"{path.name} imports {name}"


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_importing_touches_neither_cuda_nor_triton() -> None:
    loaded = run(
        "import sys, vitfast; print('torch' in sys.modules); vitfast.create_model, vitfast.ops\n"
        "import torch; print('triton' in sys.modules, torch.cuda.is_initialized())"
    )
    assert loaded.split() == ["False", "False", "False"]


def test_kernels_is_one_package() -> None:
    assert (ROOT / "vitfast/kernels").resolve() == ROOT / "kernels"
    assert (ROOT / "vitfast/benchmarks").resolve() == ROOT / "benchmarks"
