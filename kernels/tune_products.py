"""Measures both paths of every product of mlp.py and patch_embed.py, for product_table.py.

For each unit, class of rows and class of widths (configs.py) a ViT's shape is run through the library with one elementwise
kernel, and through the fused product with every tile of the search space; a tile whose result is wrong, that spills or
that does not fit the chip is left out. The faster path becomes the table's row, with the best tile. Patches have one tile
here, that of tile_table.py or the rule.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator

import torch
from torch.nn import functional

from . import activation, configs, layer_norm, mlp, patch_embed
from .configs import ProductConfig
from .tune_trial import MARGIN, Setting, microseconds, why_not

ROWS = {"few": 4 * 197, "many": 64 * 197}  # images of 224 pixels in patches of 16
WIDTHS = {"narrow": 384, "medium": 768, "wide": 1280}
DRY_ROWS = {"few": 5, "many": 19}
DRY_WIDTHS = {"narrow": 8, "medium": 16, "wide": 24}


@dataclasses.dataclass(frozen=True)
class Problem:
    """Both ways through one product; each run returns what it made, the same tensors in the same order."""

    library: Callable[[], list[torch.Tensor]]
    fused: Callable[[ProductConfig | None], list[torch.Tensor]]


def problem(unit: str, T: int, D: int, dtype: torch.dtype, on: str) -> Problem:
    """`unit` at T rows and model width D: hidden width 4 D, or for SwiGLU two thirds of it."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int, spread: float = 1.0, kind: torch.dtype = dtype) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * spread).to(on, kind)

    def empty(*shape: int, kind: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(*shape, device=on, dtype=kind)

    gated = unit == "swiglu"
    kind = "swiglu" if gated else "gelu"
    F = max(8 * D // 3 // 64 * 64, 16) if gated else 4 * D
    H = 2 * F if gated else F
    x, stream, scale = random(T, D), random(T, D), random(D, kind=torch.float32)
    w1, b1, w2, b2 = random(H, D, spread=D**-0.5), random(H), random(D, F, spread=F**-0.5), random(D)
    if unit == "linear":
        qkv, bias, out = random(3 * D, D, spread=D**-0.5), random(3 * D), empty(T, 3 * D)
        return Problem(
            lambda: [functional.linear(x, qkv, bias)],
            lambda config: (mlp.linear_forward(x, qkv, bias, out, config), [out])[1],
        )
    if unit in ("linear_activation", "swiglu"):
        act, kept, act_too = empty(T, F), empty(T, H), empty(T, F)

        def activated() -> list[torch.Tensor]:
            h = functional.linear(x, w1, b1)
            activation.activation_forward(h, kind, act)
            return [h, act]

        return Problem(
            activated,
            lambda config: (
                mlp.linear_activation_forward(x, w1, b1, kind, kept, act_too, config),
                [kept, act_too],
            )[1],
        )
    hidden = random(T, F)
    if unit == "linear_residual":
        total, total_too = empty(T, D), empty(T, D)

        def added() -> list[torch.Tensor]:
            layer_norm.scale_add_forward(stream, functional.linear(hidden, w2, b2), scale, None, total)
            return [total]

        return Problem(
            added,
            lambda config: (
                mlp.linear_residual_forward(hidden, w2, b2, stream, scale, None, total_too, config),
                [total_too],
            )[1],
        )
    results = [[empty(T, F), empty(T, F), empty(F, kind=torch.float32)] for _ in range(2)]  # d_h, act, d_bias

    def backward() -> list[torch.Tensor]:
        d_h, act, d_bias = results[0]
        activation.activation_backward(hidden, x @ w2, kind, d_h, act, d_bias)
        return results[0]

    def fused_backward(config: ProductConfig | None) -> list[torch.Tensor]:
        d_h, act, d_bias = results[1]
        mlp.hidden_backward(x, w2, hidden, kind, d_h, act, d_bias, config)
        return results[1]

    return Problem(backward, fused_backward)


def patch_problem(unit: str, patches: int, D: int, dtype: torch.dtype, on: str) -> Problem:
    """Width D, `patches` of 16 pixels in RGB images of 14 x 14 (or, for tests, of 1 x 1) of them, with a class token.

    The images are uint8, as a loader gives them; those that want a gradient are floats.
    """
    generator = torch.Generator().manual_seed(0)
    P, side = 16, 14 if patches % 196 == 0 else 1
    B, N, K = patches // side**2, side**2, 3 * P * P
    pixels = torch.randint(0, 256, (B, 3, side * P, side * P), generator=generator, dtype=torch.uint8).to(on)
    weight = (torch.randn(D, 3, P, P, generator=generator) * K**-0.5).to(on, dtype)
    vectors = [torch.randn(n, D, generator=generator).to(on) for n in (1, 1 + N, 1)]
    bias, position, prefix = vectors[0][0], vectors[1], vectors[2]
    constants = torch.full((3,), 1 / 64, device=on), torch.full((3,), -2.0, device=on)
    cut, projected = weight.new_empty(patches, K), weight.new_empty(patches, D)
    d_tokens = torch.randn(B, 1 + N, D, generator=generator).to(on, dtype)
    if unit == "patch_embed":
        tokens = [weight.new_empty(B, 1 + N, D) for _ in range(2)]

        def embedded() -> list[torch.Tensor]:
            patch_embed.patchify(pixels, P, *constants, cut)
            torch.mm(cut, weight.flatten(1).t(), out=projected)
            patch_embed.assemble_tokens(projected, bias, position, prefix, tokens[0])
            return tokens[:1]

        inputs = (pixels, weight, bias, position, prefix, *constants, tokens[1])
        return Problem(embedded, lambda _: (patch_embed.patch_embed_forward(*inputs), tokens[1:])[1])
    gathered = d_tokens[:, 1:].reshape(-1, D)  # the op needs it for the bias's gradient either way
    if unit == "patch_weight":
        d_weight = torch.empty(D, 3, P, P, device=on)

        def transposed() -> list[torch.Tensor]:
            patch_embed.patchify(pixels, P, *constants, cut)
            return [(gathered.t() @ cut).float().view_as(d_weight)]

        given = (pixels, d_tokens, *constants, dtype, d_weight)
        return Problem(transposed, lambda _: (patch_embed.patch_embed_weight_gradient(*given), [d_weight])[1])
    d_images = [torch.empty(pixels.shape, device=on, dtype=dtype) for _ in range(2)]

    def scattered() -> list[torch.Tensor]:
        torch.mm(gathered, weight.flatten(1), out=cut)
        patch_embed.unpatchify(cut, P, constants[0], d_images[0])
        return d_images[:1]

    arguments = (d_tokens, weight, constants[0], d_images[1])
    return Problem(scattered, lambda _: (patch_embed.patch_embed_image_gradient(*arguments), d_images[1:])[1])


def candidates(unit: str, arch: int, dtype: torch.dtype, dry: bool) -> Iterator[ProductConfig | None]:
    """The search space: tiles that can feed the tensor cores, each resident or not, with and without descriptors."""
    if unit in configs.PATCH_UNITS:
        yield None
        return
    if dry:
        for programs, described in ((0, False), (1, True)):
            yield ProductConfig(32, 64, 32, 4, 2, programs=programs, descriptors=described, halved=described)
        return
    if dtype == torch.float32:
        for rows, columns, warps in ((64, 32, 4), (64, 64, 4), (128, 64, 8), (128, 128, 8)):
            yield ProductConfig(rows, columns, 32, warps, 2, halved=True)
        return
    tiles = ((64, 64, 4), (64, 128, 4), (128, 64, 4), (128, 128, 8), (64, 256, 8), (128, 256, 8))
    modern = ((0, True), (1, True), (2, True))
    for rows, columns, warps in tiles:
        for stages in (3, 4):
            for programs, described in modern if arch >= 90 else ((0, False), (1, False)):
                yield ProductConfig(rows, columns, 64, warps, stages, programs, described, halved=True)


def measure(unit: str, T: int, D: int, dtype: torch.dtype, setting: Setting) -> dict:
    """path, config and the two times of one shape."""
    made = (patch_problem if unit in configs.PATCH_UNITS else problem)(unit, T, D, dtype, setting.on)
    expected = [t.clone() for t in made.library()]
    library = microseconds(made.library, setting.dry)
    best: ProductConfig | None = None
    fastest = float("inf")
    for config in candidates(unit, setting.arch, dtype, setting.dry):
        run = functools.partial(made.fused, config)
        reason = why_not(run, expected)
        if reason is not None:
            print(f"  left out, {reason}: {config}", flush=True)
            continue
        taken = microseconds(run, setting.dry)
        if taken < fastest:
            best, fastest = config, taken
    path = "fused" if fastest < MARGIN * library else "library"
    return {
        "path": path,
        "config": None if best is None else dataclasses.asdict(best),
        "library_us": library,
        "fused_us": fastest,
    }


def seconds(units: list[str], dtypes: list[str], setting: Setting) -> float:
    """About how long measuring takes: a second for each tile's compilation, 0.1 for its timing."""
    kinds = [(unit, getattr(torch, name)) for unit in units for name in dtypes]
    tiles = sum(len(list(candidates(unit, setting.arch, dtype, setting.dry))) for unit, dtype in kinds)
    return 1.1 * len(ROWS) * len(WIDTHS) * tiles


def measured(units: list[str], dtypes: list[str], setting: Setting) -> Iterator[tuple[dict, dict | None]]:
    """What identifies each row, and the row."""
    arch = max(chip for chip in configs.CHIPS if chip <= max(setting.arch, configs.CHIPS[0]))
    row_classes, width_classes = (DRY_ROWS, DRY_WIDTHS) if setting.dry else (ROWS, WIDTHS)
    for dtype in dtypes:
        for unit in units:
            for row_class, T in row_classes.items():
                for width_class, D in width_classes.items():
                    if unit in configs.PATCH_UNITS and width_class == "wide":
                        continue  # no wider than the 768 pixels of a patch
                    found = measure(unit, T, D, getattr(torch, dtype), setting)
                    times = f"{found.pop('fused_us'):.1f} us against the library's {found.pop('library_us'):.1f}"
                    place = {"arch": arch, "dtype": dtype, "unit": unit, "rows": row_class, "width": width_class}
                    row = place | found | {"reason": f"{setting.about}: {times} at {T} rows, width {D}"}
                    configs.product_row(row)
                    print(f"{dtype} {unit} {row_class} {width_class}: {found['path']}, {times}", flush=True)
                    yield place, row
