"""Measured tiles, as data: `python -m vitfast.kernels.tune` (make tune) rewrites this file. Empty: the rules decide.

The first row that fits a launch overrules the rule of configs.py. kernel: attention_forward, attention_backward,
bias_gradient, patch_embed, patch_weight, patch_image, layer_norm or layer_norm_backward. where: for each argument of the
kernel's function in configs.py what the row holds for, a value or (first, last), both included, last None for no end; a
row holds for its own architecture only. config: the fields of that function's result. One pass over a sequence holds only
for lengths that its chunks cover (tile_rows.py checks it). reason: the times, and the machine they were measured on.
"""

ROWS: list[dict] = []
