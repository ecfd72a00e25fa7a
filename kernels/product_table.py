"""Which path a product takes, as data: `python -m vitfast.kernels.tune` (make tune) rewrites this file.

The first row that fits decides; None fits everything. arch: 80, 90 or 100. dtype: of the operands. unit: linear,
linear_activation, swiglu, linear_residual, hidden_backward, patch_embed, patch_weight or patch_image. rows: few or many,
width: narrow, medium or wide (see configs.py). path: "library" (cuBLAS and one elementwise kernel) or "fused" (mlp.py;
of patches patch_embed.py). config: the fused tile, None for the one that configs.py derives from the shape (of patches
always: theirs are rows of tile_table.py).
"""

ROWS: list[dict] = [
    {
        "arch": None,
        "dtype": None,
        "unit": None,
        "rows": None,
        "width": None,
        "path": "library",
        "config": None,
        "reason": "not yet measured: a product slower than cuBLAS loses more than an epilogue saves",
    },
]
