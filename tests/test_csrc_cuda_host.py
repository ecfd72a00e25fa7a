"""The CUDA kernels' own source, run on the CPU by tests/cpp/cuda_emulator.h: results, gaps, double writes, barriers.

T rows, D columns, F hidden columns, B images, N patches, R prefix tokens, P patch side.
A test passes NaN-filled outputs, runs each kernel with its threads and blocks in order and in reverse and asks for the
same bits. Error bounds: tolerances.py.
"""

import ctypes
import itertools
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from tolerances import assert_close_to_truth
from torch import Tensor

from vitfast.ops.arguments import ACTIVATIONS
from vitfast.ops.compose import activation_ref

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).resolve().parent.parent
CODE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.uint8: 3}
# (X, Y): residual stream and compute dtype.
PAIRS = [
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float16, torch.float16),
]
PROCESSORS = 1  # of the pretended GPU: few, so that a small test has blocks that take several rows


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("needs a C++ compiler to run the CUDA kernels on the CPU; found neither g++ nor c++")
    built = tmp_path_factory.mktemp("cuda_host") / "kernels.so"
    include = Path(torch.__file__).parent / "include"
    flags = ["-std=c++17", "-O1", "-fPIC", "-shared", "-ffp-contract=off", "-Wno-unknown-pragmas"]
    flags += ["-U_FORTIFY_SOURCE", "-include", "cuda_emulator.h"]  # fortified longjmp refuses to change stacks
    folders = [f"-I{ROOT / 'tests' / 'cpp'}", f"-I{ROOT / 'csrc' / 'cuda'}", f"-I{include}"]
    source = str(ROOT / "tests" / "cpp" / "cuda_kernels_host.cpp")
    subprocess.run([compiler, *flags, *folders, source, "-o", str(built)], check=True)
    loaded = ctypes.CDLL(str(built))
    for name in ("divide", "patch_corner_offset", "patch_row_offset"):
        getattr(loaded, name).restype = ctypes.c_int64
    return loaded


def call(library: ctypes.CDLL, name: str, *arguments: object) -> None:
    """Calls a kernel; lists of tensors become arrays of addresses, lists of ints arrays of int64."""
    converted = []
    for argument in arguments:
        if isinstance(argument, (list, tuple)):
            values = [a if isinstance(a, int) else 0 if a is None else a.data_ptr() for a in argument]
            converted.append((ctypes.c_int64 * len(values))(*values))
        elif isinstance(argument, float):
            converted.append(ctypes.c_float(argument))
        elif isinstance(argument, torch.dtype):
            converted.append(CODE[argument])
        else:
            converted.append(ctypes.c_int64(argument))
    function = getattr(library, name)
    function.restype = ctypes.c_char_p
    error = function(*converted)
    assert error is None, error.decode()


def run(library: ctypes.CDLL, name: str, head: tuple, tensors: list, outputs: list[int], *tail: object) -> list:
    """Runs in order and in reverse with NaN-filled outputs; checks equal bits and, where the first output is float32,
    that each element of it is written once. Returns the tensors, outputs filled."""
    for index in outputs:
        if tensors[index] is not None:
            assert tensors[index].is_contiguous()
    results = []
    for reverse in (0, 1):
        library.configure(PROCESSORS, reverse)
        own = [t.clone() if i in outputs and t is not None else t for i, t in enumerate(tensors)]
        for index in outputs:
            if own[index] is not None:
                own[index].fill_(torch.nan)
        watched = next((own[i] for i in outputs if own[i] is not None and own[i].dtype == torch.float32), None)
        watched = watched if watched is not None and watched.dim() > 1 else None
        counts = torch.zeros(watched.numel() if watched is not None else 0, dtype=torch.int32)
        library.watch(
            ctypes.c_int64(watched.data_ptr() if watched is not None else 0),
            ctypes.c_int64(counts.numel()),
            ctypes.c_int64(counts.data_ptr()),
        )
        call(library, name, *head, own, *tail)
        library.watch(ctypes.c_int64(0), ctypes.c_int64(0), ctypes.c_int64(0))
        if watched is not None:
            assert bool((counts == 1).all()), f"{name}: an element is written {counts.unique().tolist()} times"
        results.append(own)
    for index in outputs:
        if results[0][index] is not None:
            forward, backward = results[0][index], results[1][index]
            assert not forward.isnan().any(), f"{name}: output {index} has gaps"
            assert torch.equal(forward, backward), f"{name}: output {index} depends on the order of threads"
    return results[0]


def random(*shape: int, dtype: torch.dtype = torch.float32, mean: float = 0.0) -> Tensor:
    return (torch.randn(*shape) + mean).to(dtype)


# Below one vector, odd, no multiple of 8, one to three steps of columns per lane, and two to eight warps a row.
WIDTHS = [1, 7, 64, 192, 197, 384, 768, 1024, 1284, 2049, 8192]


def rows_for(width: int) -> int:
    """More rows than the grid's teams, so that teams take several; a multiple of the 3 samples."""
    return {64: 150, 2049: 30, 8192: 9}.get(width, 18)


def layer_norm_inputs(rows: int, width: int, samples: int, x_dtype: torch.dtype, y_dtype: torch.dtype, branch: bool):
    """x has a mean of 8 standard deviations: a one-pass variance would be far off."""
    torch.manual_seed(width)
    x = random(rows, width, dtype=x_dtype, mean=8.0)
    weight, bias = random(width, mean=1.0), random(width)
    if not branch:
        return x, None, None, None, weight, bias
    drop_path = torch.tensor([0.0, 1.25, 1.0])[:samples]
    return x, random(rows, width, dtype=y_dtype), random(width), drop_path, weight, bias


def total_of(x: Tensor, branch: Tensor | None, scale: Tensor | None, drop_path: Tensor | None) -> Tensor:
    if branch is None:
        return x
    factor = drop_path.to(x.dtype).repeat_interleave(len(x) // len(drop_path))[:, None] * scale.to(x.dtype)
    return x + factor * branch.to(x.dtype)


@pytest.mark.parametrize("branch", [False, True], ids=["norm", "add_norm"])
@pytest.mark.parametrize("dtypes", PAIRS, ids=str)
def test_layer_norm_forward(library: ctypes.CDLL, dtypes: tuple, branch: bool) -> None:
    x_dtype, y_dtype = dtypes
    for width in WIDTHS:
        rows, samples = rows_for(width), 3
        x, b, scale, drop, weight, bias = layer_norm_inputs(rows, width, samples, x_dtype, y_dtype, branch)
        total = torch.empty_like(x) if branch else None
        tensors = [x, b, scale, drop, weight, bias, total, torch.empty(rows, width, dtype=y_dtype)]
        tensors += [torch.empty(rows), torch.empty(rows)]
        out = run(
            library, "layer_norm_forward", (x_dtype, y_dtype), tensors, [7, 6, 8, 9], rows, width, rows // samples, 1e-6
        )
        stored = out[6] if branch else x
        if branch:
            exact = total_of(x.double(), b, scale.double(), drop.double())
            plain = total_of(x.float(), b, scale, drop).to(x_dtype)
            assert_close_to_truth(f"total, D={width}", stored, plain, exact, x_dtype)
        truth = torch.nn.functional.layer_norm(stored.double(), (width,), weight.double(), bias.double(), 1e-6)
        plain = torch.nn.functional.layer_norm(stored.float(), (width,), weight, bias, 1e-6).to(y_dtype)
        assert_close_to_truth(f"normed, D={width}", out[7], plain, truth, out[7].dtype)
        torch.testing.assert_close(out[8].double(), stored.double().mean(1), rtol=1e-6, atol=1e-6)
        rstd = (stored.double().var(1, unbiased=False) + 1e-6).rsqrt()
        torch.testing.assert_close(out[9].double(), rstd, rtol=3e-6, atol=0)

        applied = [stored, out[8], out[9], weight, bias, torch.empty_like(out[7])]
        applied = run(library, "layer_norm_apply", (x_dtype, y_dtype), applied, [5], rows, width)
        assert torch.equal(applied[5], out[7]), "apply must give forward's bits"
        if branch:
            tensors[7] = tensors[8] = tensors[9] = None
            added = run(
                library, "layer_norm_forward", (x_dtype, y_dtype), tensors, [6], rows, width, rows // samples, 1e-6
            )
            assert torch.equal(added[6], stored), "scale_add_forward must give layer_norm_forward's total"


# Place among the kernel's tensors and name of what layer_norm_gradients returns.
GRADIENTS = [(9, "d_x"), (12, "d_weight"), (13, "d_bias"), (10, "d_branch"), (11, "d_scale")]


def layer_norm_gradients(dtype: torch.dtype, total: Tensor, weight: Tensor, d_normed: Tensor, *others: Tensor | None):
    """d_x, d_weight, d_bias and, with a branch, d_branch and d_scale, by autograd in dtype."""
    d_total, branch, scale, drop = (None if t is None else t.to(dtype) for t in others)
    t, w = total.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
    bias = torch.zeros_like(w).requires_grad_()
    normed = torch.nn.functional.layer_norm(t, t.shape[1:], w, bias, 1e-6)
    d_x, d_weight, d_bias = torch.autograd.grad(normed, [t, w, bias], d_normed.to(dtype))
    d_x = d_x if d_total is None else d_x + d_total
    if branch is None:
        return [d_x, d_weight, d_bias]
    d_branch = d_x * drop.repeat_interleave(len(t) // len(drop))[:, None]
    return [
        d_x,
        d_weight,
        d_bias,
        d_branch if scale is None else d_branch * scale,
        (d_branch * branch).sum(0),
    ]


@pytest.mark.parametrize("options", ["plain", "residual", "branch", "scale", "everything"])
@pytest.mark.parametrize("dtypes", PAIRS, ids=str)
def test_layer_norm_backward(library: ctypes.CDLL, dtypes: tuple, options: str) -> None:
    x_dtype, y_dtype = dtypes
    for width in WIDTHS:
        if options in ("residual", "branch", "scale") and width in (64, 384, 1024, 2049):
            continue
        rows, samples = rows_for(width), 3
        total, branch, scale, drop, weight, _ = layer_norm_inputs(rows, width, samples, x_dtype, y_dtype, True)
        d_normed = random(rows, width, dtype=y_dtype)
        d_total = random(rows, width, dtype=x_dtype) if options in ("residual", "everything") else None
        if options in ("plain", "residual"):
            branch = scale = drop = None
        elif options == "branch":
            scale = None
        rstd = (total.double().var(1, unbiased=False) + 1e-6).rsqrt().float()
        mean = total.double().mean(1).float()

        has_branch, has_scale = branch is not None, scale is not None
        tensors = [d_normed, d_total, total, mean, rstd, weight, branch, scale, drop, torch.empty_like(total)]
        tensors += [torch.empty(rows, width, dtype=y_dtype) if has_branch else None]
        tensors += [torch.empty(width) if has_scale else None, torch.empty(width), torch.empty(width)]
        sizes = (rows, width, rows // samples)
        out = run(library, "layer_norm_backward", (x_dtype, y_dtype), tensors, [9, 10, 11, 12, 13], *sizes)
        given = (total, weight, d_normed, d_total, branch, scale, drop)
        truth, plain = (layer_norm_gradients(dtype, *given) for dtype in (torch.float64, torch.float32))
        plain[0] = plain[0].to(x_dtype)
        if has_branch:
            plain[3] = plain[3].to(y_dtype)
        for i, (index, what) in enumerate(GRADIENTS):
            if out[index] is not None:
                name = f"{what}, D={width}"
                assert_close_to_truth(name, out[index], plain[i], truth[i], out[index].dtype)


def test_layer_norm_without_rows(library: ctypes.CDLL) -> None:
    """No rows: nothing is launched over them, and the parameter gradients are zeros."""
    width, empty = 40, torch.empty(0, 40)
    tensors = [empty, None, empty, torch.empty(0), torch.empty(0), torch.ones(width), empty, torch.ones(width), None]
    tensors += [empty, empty, torch.empty(width), torch.empty(width), torch.empty(width)]
    out = run(library, "layer_norm_backward", (torch.float32, torch.float32), tensors, [11, 12, 13], 0, width, 1)
    assert all(bool((out[i] == 0).all()) for i in (11, 12, 13))


@pytest.mark.parametrize("kind", [0, 1, 2], ids=["forward", "backward", "backward_branch"])
def test_team_shapes(library: ctypes.CDLL, kind: int) -> None:
    """Every width: a block of 32 to 256 threads whose lanes cover the row, and a grid that reaches every row."""
    per_lane = 32
    out = (ctypes.c_int64 * 4)()
    for width, rows in itertools.product(range(1, 8193, 13), [1, 5, 50432, 2**31 + 5]):
        library.find_team_shape(ctypes.c_int64(rows), width, kind, 132, out)
        warps, teams, blocks, after_last = out
        assert 1 <= warps * teams <= 8
        assert warps * 32 * per_lane >= width
        assert 1 <= blocks <= 132 * 64
        assert after_last == blocks * teams
        assert blocks * teams >= min(rows, 132)


def activation_reference(h: Tensor, d_act: Tensor, kind: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    x = h.to(dtype).requires_grad_()
    y = activation_ref(x, kind)
    return y.detach(), torch.autograd.grad(y, x, d_act.to(dtype))[0]


@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_activation(library: ctypes.CDLL, dtype: torch.dtype, kind: str) -> None:
    number, halves = ACTIVATIONS.index(kind), 2 if kind == "swiglu" else 1
    for rows, width in [(1, 1), (5, 13), (37, 96), (70, 520), (3, 3072), (600, 8)]:
        torch.manual_seed(rows)
        h = (3 * torch.randn(rows, halves * width)).to(dtype)
        h.view(-1)[: min(4, h.numel())] = torch.tensor([0.0, -30.0, 30.0, -0.0], dtype=dtype)[: min(4, h.numel())]
        d_act = random(rows, width, dtype=dtype)
        shape = (number, rows, width)
        act = run(library, "activation_forward", (dtype,), [h, torch.empty_like(d_act)], [1], *shape)[1]
        tensors = [h, d_act, torch.empty_like(h), torch.empty_like(d_act), torch.empty(halves * width)]
        out = run(library, "activation_backward", (dtype,), tensors, [2, 3, 4], *shape)
        bare = run(library, "activation_backward", (dtype,), [h, d_act, tensors[2], None, None], [2], *shape)

        truth, plain = (activation_reference(h, d_act, kind, d) for d in (torch.float64, torch.float32))
        assert_close_to_truth(f"act {rows}x{width}", act, plain[0].to(dtype), truth[0], act.dtype)
        assert_close_to_truth(f"d_h {rows}x{width}", out[2], plain[1].to(dtype), truth[1], out[2].dtype)
        assert_close_to_truth(f"d_bias {rows}x{width}", out[4], plain[1].sum(0), truth[1].sum(0), out[4].dtype)
        assert torch.equal(out[3], act), "backward must recompute forward's bits"
        assert torch.equal(bare[2], out[2])


def test_activation_without_rows(library: ctypes.CDLL) -> None:
    empty = torch.empty(0, 24)
    for number, halves in ((0, 1), (3, 2)):
        tensors = [empty] * 4 + [torch.empty(24 * halves)]
        out = run(library, "activation_backward", (torch.float32,), tensors, [4], number, 0, 24)
        assert bool((out[4] == 0).all())


def geometry(images: Tensor, patch: int) -> list[int]:
    b, c, height, width = images.shape
    return [b, c, height // patch, width // patch, patch, *images.stride()]


def unfold(images: Tensor, patch: int) -> Tensor:
    """[B, C, Hi, Wi] -> [B * N, C * P * P] in (c, p, q) order."""
    b, c, height, width = images.shape
    cut = images.reshape(b, c, height // patch, patch, width // patch, patch)
    return cut.permute(0, 2, 4, 1, 3, 5).reshape(-1, c * patch * patch)


def strided_views(images: Tensor) -> dict[str, Tensor]:
    b, c, height, width = images.shape
    padded = torch.zeros(b, c, height + 1, width + 3, dtype=images.dtype)
    padded[:, :, 1:, 2:-1] = images
    return {
        "contiguous": images,
        "channels_last": images.to(memory_format=torch.channels_last),
        "window": padded[:, :, 1:, 2:-1],
        "transposed": images.transpose(2, 3).contiguous().transpose(2, 3),
        "expanded": images[:1].expand(b, c, height, width),
    }


IMAGE_PAIRS = [
    (torch.uint8, torch.bfloat16),
    (torch.uint8, torch.float32),
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
]


# 4 | P, 4 | P * P alone, odd P, more runs per patch than threads in a block, and a patch that leaves threads idle.
# Channels: one, three (loaded together), and five (a group and a part of one).
@pytest.mark.parametrize(
    ("patch", "grid", "channels"),
    [(16, (2, 3), 3), (14, (2, 2), 5), (3, (3, 5), 1), (40, (1, 2), 3), (12, (5, 4), 4)],
)
def test_patchify(library: ctypes.CDLL, patch: int, grid: tuple[int, int], channels: int) -> None:
    torch.manual_seed(patch)
    pixels = torch.randint(0, 256, (2, channels, grid[0] * patch, grid[1] * patch), dtype=torch.uint8)
    scale, shift = torch.rand(channels) + 0.5, torch.randn(channels)
    for in_dtype, out_dtype in IMAGE_PAIRS:
        for name, images in strided_views(pixels.to(in_dtype)).items():
            exact = unfold(images.double() * scale.double()[:, None, None] + shift.double()[:, None, None], patch)
            plain = unfold(images.float() * scale[:, None, None] + shift[:, None, None], patch).to(out_dtype)
            tensors = [images, scale, shift, torch.empty(exact.shape, dtype=out_dtype)]
            out = run(library, "patchify", (in_dtype, out_dtype), tensors, [3], geometry(images, patch))
            assert_close_to_truth(f"{name} {in_dtype} -> {out_dtype}, P={patch}", out[3], plain, exact, out[3].dtype)


@pytest.mark.parametrize(("patch", "grid"), [(16, (2, 3)), (14, (2, 2)), (3, (3, 5)), (40, (1, 2))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_unpatchify(library: ctypes.CDLL, patch: int, grid: tuple[int, int], dtype: torch.dtype) -> None:
    for out_dtype in (torch.float32, torch.bfloat16):
        images = torch.empty(2, 3, grid[0] * patch, grid[1] * patch, dtype=out_dtype)
        scale = torch.tensor([0.5, 2.0, -1.5])
        d_patches = random(2 * grid[0] * grid[1], 3 * patch * patch, dtype=dtype)
        tensors = [d_patches, scale, images]
        out = run(library, "unpatchify", (dtype, out_dtype), tensors, [2], geometry(images, patch))
        expected = (d_patches.float().view(-1, 3, patch * patch) * scale[:, None]).view(d_patches.shape).to(out_dtype)
        assert torch.equal(unfold(out[2], patch), expected)


@pytest.mark.parametrize("positions", ["none", "patches", "all"])
@pytest.mark.parametrize("prefix_tokens", [0, 1, 5])
@pytest.mark.parametrize("dtypes", PAIRS, ids=str)
def test_assemble_tokens(library: ctypes.CDLL, dtypes: tuple, prefix_tokens: int, positions: str) -> None:
    x_dtype, y_dtype = dtypes
    images, patches = 3, 7
    count = {"none": 0, "patches": patches, "all": patches + prefix_tokens}[positions]
    for width in (1, 44, 197, 1096):
        torch.manual_seed(width)
        projected = random(images * patches, width, dtype=y_dtype)
        bias = random(width) if width != 44 else None
        pos_embed = random(count, width) if count else None
        prefix = random(prefix_tokens, width) if prefix_tokens else None
        tokens = torch.empty(images, prefix_tokens + patches, width, dtype=x_dtype)
        tensors = [projected, bias, pos_embed, prefix, tokens]
        sizes = (images, patches, prefix_tokens, count, width)
        out = run(library, "assemble_tokens", (x_dtype, y_dtype), tensors, [4], *sizes)[4]

        expected = torch.zeros(images, prefix_tokens + patches, width)
        expected[:, prefix_tokens:] = projected.float().view(images, patches, width) + (0 if bias is None else bias)
        if prefix is not None:
            expected[:, :prefix_tokens] = prefix
        if pos_embed is not None:
            expected[:, prefix_tokens + patches - count :] += pos_embed
        assert torch.equal(out, expected.to(x_dtype))


def test_index_maps_past_int32(library: ctypes.CDLL) -> None:
    """A batch of 4096 images of 3 x 1024 x 1024 is 12.9 G pixels: offsets by Python's integers."""
    b, c, grid, patch = 4096, 3, 64, 16
    side = grid * patch
    for strides in [(c * side * side, side * side, side, 1), (c * side * side, 1, c * side, c)]:
        g = (ctypes.c_int64 * 9)(b, c, grid, grid, patch, *strides)
        for row in (0, 1, grid, grid * grid - 1, 2**22 + 4097, b * grid * grid - 1):
            image, rest = divmod(row, grid * grid)
            gy, gx = divmod(rest, grid)
            expected = image * strides[0] + gy * patch * strides[2] + gx * patch * strides[3]
            assert library.patch_corner_offset(g, ctypes.c_int64(row)) == expected
            assert library.patch_row_offset(g, ctypes.c_int64(row)) == row * c * patch * patch
    assert (b * grid * grid - 1) * c * patch * patch > 2**31

    out = (ctypes.c_int64 * 3)()
    for row in (0, 4, 5, 201, 2**31 + 11, 2**40 + 3):
        library.find_token_source(ctypes.c_int64(row), 196, 5, 201, out)
        image, token = divmod(row, 201)
        expected = [-1, token] if token < 5 else [image * 196 + token - 5, -1]
        assert list(out) == [*expected, token]


def test_fast_div(library: ctypes.CDLL) -> None:
    edges = [1, 2, 3, 197, 2**16 + 1, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**32 + 7, 2**62 + 1]
    for a, b in itertools.product([0, *edges], edges):
        assert library.divide(ctypes.c_int64(a), ctypes.c_int64(b)) == a // b


def test_registration() -> None:
    """The built library loads without a GPU and registers every operator for CUDA tensors."""
    try:
        import vitfast._C
        import vitfast._C_cuda  # noqa: F401
    except ImportError as error:
        pytest.skip(f"the CUDA extension is not built here: {error}")
    names = ["layer_norm_forward", "layer_norm_apply", "layer_norm_backward", "scale_add_forward"]
    names += ["activation_forward", "activation_backward", "patchify", "unpatchify", "assemble_tokens"]
    for name in names:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"vitfast_C::{name}", "CUDA"), name
