"""Faults put into the kernels one at a time, each of which its check must notice under the emulation."""

from __future__ import annotations

from typing import NamedTuple


class Mutation(NamedTuple):
    """One fault: in `file`, `new` stands for `old`, which occurs once; `check` ("module:function") must fail.

    Quick ones, one for each op, run in every run of the tests, the others only with those marked soak: each compiles a
    library of its own.
    """

    name: str
    file: str
    old: str
    new: str
    check: str
    quick: bool = False


_GATHER = "csrc/cuda/patch_gather.cu"
_GATHER_FORWARD = "tests.ops.test_cuda_emulated_patch_gather:check_forward"
_GATHER_BACKWARD = "tests.ops.test_cuda_emulated_patch_gather:check_backward"

_MOMENTS = "csrc/cuda/moments.cuh"
_WALK = "csrc/cuda/walk.cuh"
_AFFINE = "csrc/cuda/affine.cuh"
_LAYOUT = "csrc/cuda/layout.cuh"
_NORMS = "csrc/cuda/adalin.cu"
_NORM_PLANES = "tests.ops.test_cuda_emulated_norms:check_planes"
_NORM_PIXELS = "tests.ops.test_cuda_emulated_norms:check_pixels"
_NORM_SPLITS = "tests.ops.test_cuda_emulated_norms:check_splits"

_NCE = "csrc/cuda/patch_nce_similarities.cu"
_NCE_PRODUCTS = "csrc/cuda/patch_nce_products.cuh"
_NCE_TILES = "csrc/cuda/patch_nce_tiles.cuh"
_NCE_ROWS = "csrc/cuda/patch_nce_rows.cu"
_NCE_FLOAT = "tests.ops.test_cuda_emulated_patch_nce:check_float"
_NCE_TF32 = "tests.ops.test_cuda_emulated_patch_nce:check_tf32"
_NCE_BF16 = "tests.ops.test_cuda_emulated_patch_nce:check_bfloat16"
_NCE_BF16_EARLY = "tests.ops.test_cuda_emulated_patch_nce:check_bfloat16_early"
_NCE_ROW_TILES = "tests.ops.test_cuda_emulated_patch_nce:check_rows"
_NCE_PARTS = "tests.ops.test_cuda_emulated_patch_nce:check_parts"

MUTATIONS = [
    Mutation(
        "gather: columns beyond the last",
        _GATHER,
        "column < extent.columns;",
        "column <= extent.columns;",
        _GATHER_FORWARD,
    ),
    Mutation("gather: rows beyond the last", _GATHER, "if (row >= extent.rows) return;", "", _GATHER_FORWARD),
    Mutation(
        "gather: only the first image",
        _GATHER,
        "image < extent.images; image += gridDim.z",
        "image < 1; image += gridDim.z",
        _GATHER_BACKWARD,
    ),
    Mutation(
        "gather: vectors from any address",
        _GATHER,
        "map.channels % words == 0 && reinterpret_cast<uintptr_t>(features) % 16 == 0",
        "map.channels >= words",
        _GATHER_FORWARD,
    ),
    Mutation(
        "gather: places without an id keep what was in memory",
        _GATHER,
        "if (p == places) return from_accumulate<T>(0);",
        "",
        _GATHER_BACKWARD,
    ),
    Mutation(
        "gather: the sum rounds in between",
        _GATHER,
        "Accumulate<T> sum = to_accumulate(grad[p * stride]);\n  for (p = next[p]; p < places; p = next[p]) "
        "sum += to_accumulate(grad[p * stride]);",
        "Accumulate<T> sum = to_accumulate(grad[p * stride]);\n  for (p = next[p]; p < places; p = next[p]) "
        "sum = to_accumulate(from_accumulate<T>(sum + to_accumulate(grad[p * stride])));",
        _GATHER_BACKWARD,
    ),
    Mutation(
        "gather: the next id by half a warp",
        _GATHER,
        "for (int distance = kColumns / 2;",
        "for (int distance = kColumns / 4;",
        _GATHER_BACKWARD,
        quick=True,
    ),
    Mutation(
        "norms: no barrier before warps' sums are read",
        _MOMENTS,
        "  if (lane == 0) slots[thread / kWarp] = mine;\n  __syncthreads();",
        "  if (lane == 0) slots[thread / kWarp] = mine;",
        _NORM_PLANES,
        quick=True,
    ),
    Mutation(
        "norms: no barrier before the block's sums are read",
        _MOMENTS,
        "  __syncthreads();\n  return slots[0];",
        "  return slots[0];",
        _NORM_PLANES,
    ),
    Mutation(
        "norms: no barrier between the rows' merges",
        _MOMENTS,
        "rows > 0; rows /= 2) {\n    __syncthreads();",
        "rows > 0; rows /= 2) {",
        _NORM_PIXELS,
    ),
    Mutation(
        "norms: no barrier before the next channels use the slots",
        _NORMS,
        "      whole.merge(sums);\n    }\n    __syncthreads();",
        "      whole.merge(sums);\n    }",
        _NORM_SPLITS,
    ),
    Mutation(
        "norms: parts merge as if they were equal",
        _MOMENTS,
        "total > 0 ? other.count / total : 0;",
        "S(0.5);",
        _NORM_PLANES,
    ),
    Mutation(
        "norms: the smaller count is forgotten",
        _MOMENTS,
        "const S total = count + other.count;",
        "const S total = count > other.count ? count : other.count;",
        _NORM_PLANES,
    ),
    Mutation(
        "norms: the last split counts as a whole one",
        _NORMS,
        "part.count = range.end - range.begin;",
        "part.count = (map.pixels + cut.splits - 1) / cut.splits;",
        _NORM_SPLITS,
    ),
    Mutation(
        "norms: the elements behind the vectors are left out",
        _WALK,
        "edge = {element, 1, 0, element < end ? 1 : 0, 1};",
        "edge = {element, 1, 0, element < body ? 1 : 0, 1};",
        _NORM_PLANES,
    ),
    Mutation(
        "norms: a pack behind the last",
        _WALK,
        "if (index >= walk.last) continue;",
        "if (index > walk.last) continue;",
        _NORM_PLANES,
    ),
    Mutation(
        "norms: lanes behind the last channel write",
        _LAYOUT,
        "return threadIdx.y == 0 && has_channel;",
        "return threadIdx.y == 0;",
        _NORM_PIXELS,
    ),
    Mutation(
        "norms: the gradient's product is not centred",
        _AFFINE,
        "    x.v[j] -= affine.mean;\n",
        "",
        _NORM_PIXELS,
    ),
    Mutation(
        "norms: the sums take the gradient behind the activation",
        _AFFINE,
        "    grad.v[j] *= activation_slope(affine(x.v[j]), slope);\n",
        "",
        _NORM_PLANES,
    ),
    Mutation(
        "norms: registers hold more than they can",
        "csrc/cuda/instance_norm_act.cu",
        "vectors_of_plane(map) <= int64_t{kInFlight} * kMostThreads",
        "vectors_of_plane(map) <= 2 * kInFlight * kMostThreads",
        _NORM_SPLITS,
    ),
    Mutation(
        "norms: the moments are not shifted",
        _AFFINE,
        "x.v[j] -= of_channel<kWidth>(shifts, j);",
        "",
        _NORM_SPLITS,
    ),
    Mutation(
        "norms: the layer's share in the gradient's mean",
        _NORMS,
        "channel.gamma * (1 - channel.rho) * gradient.mean - whole.grad[0] / elements",
        "-whole.grad[0] / elements",
        _NORM_PLANES,
    ),
    Mutation(
        "norms: gamma of the first image for all",
        _AFFINE,
        "image * tensor.image_stride + channel * tensor.channel_stride",
        "channel * tensor.channel_stride",
        _NORM_PIXELS,
    ),
    Mutation(
        "patch_nce: no wait for the tiles",
        _NCE,
        "    copy_async_wait<kStages - 1>();\n",
        "",
        _NCE_BF16,
        quick=True,
    ),
    Mutation(
        "patch_nce: waits for too little", _NCE, "copy_async_wait<kStages - 1>", "copy_async_wait<kStages>", _NCE_BF16
    ),
    Mutation(
        "patch_nce: no barrier before the tiles are read",
        _NCE,
        "    __syncthreads();\n    if (step == 0) mine",
        "    if (step == 0) mine",
        _NCE_BF16,
    ),
    Mutation(
        "patch_nce: no barrier after the tiles were read",
        _NCE,
        "    __syncthreads();\n    if (step + 1 < steps && parts > 1)",
        "    if (step + 1 < steps && parts > 1)",
        _NCE_BF16_EARLY,
    ),
    Mutation("patch_nce: columns beyond the group", _NCE, "column >= column_count || ", "", _NCE_BF16),
    Mutation(
        "patch_nce: columns are not zeros beyond the group",
        _NCE_TILES,
        "first + row < rows.count ? channels - here : 0",
        "channels - here",
        _NCE_BF16,
    ),
    Mutation(
        "patch_nce: rows beyond the group",
        _NCE,
        "    if (work.first_row + row >= work.rows.count) continue;\n",
        "",
        _NCE_ROW_TILES,
    ),
    Mutation("patch_nce: the positive among the others", _NCE, " || column == mine.positive + 8 * h", "", _NCE_FLOAT),
    Mutation(
        "patch_nce: channels beyond the last", _NCE, "      if (channel < channels) {", "      if (true) {", _NCE_BF16
    ),
    Mutation(
        "patch_nce: sums keep the old anchor",
        _NCE,
        "      sums[n][2 * h] *= factor;\n      sums[n][2 * h + 1] *= factor;\n",
        "",
        _NCE_BF16,
    ),
    Mutation("patch_nce: levels keep the old anchor", _NCE, "      levels[i][2 * h] -= rise;\n", "", _NCE_BF16),
    Mutation(
        "patch_nce: a slack without end",
        "csrc/cuda/patch_nce.cuh",
        "kAnchorSlack = 8;",
        "kAnchorSlack = 1e30f;",
        _NCE_BF16,
    ),
    Mutation(
        "patch_nce: splits merged as if of one anchor",
        _NCE_ROWS,
        "partials.at(s, group).sum * exp2(partials.at(s, group).anchor - anchor)",
        "partials.at(s, group).sum",
        _NCE_FLOAT,
    ),
    Mutation(
        "patch_nce: weights in the order of the columns",
        _NCE_PRODUCTS,
        "operand(w[0]), operand(w[2]), operand(w[1]), operand(w[3])",
        "operand(w[0]), operand(w[1]), operand(w[2]), operand(w[3])",
        _NCE_TF32,
    ),
    Mutation(
        "patch_nce: fp32 without the rest of one side",
        _NCE_PRODUCTS,
        "      mma_tf32(c, low, high0, high1);\n",
        "",
        _NCE_FLOAT,
    ),
    Mutation(
        "patch_nce: tf32 cut off, not rounded",
        _NCE_TILES,
        "value = __uint_as_float(round_to_tf32(value))",
        "value = value * 1.0f",
        _NCE_TF32,
    ),
    Mutation(
        "patch_nce: the part of the sums does not come last",
        _NCE,
        "(work.channel_group + 1 + step) % parts",
        "(work.channel_group + step) % parts",
        _NCE_PARTS,
    ),
    Mutation(
        "patch_nce: rows of the first part for all",
        _NCE,
        "    if (step + 1 < steps && parts > 1) load_rows(step + 1);\n",
        "",
        _NCE_PARTS,
    ),
    Mutation("patch_nce: keys without a query get one", _NCE_ROWS, "  if (has_query) {", "  if (true) {", _NCE_FLOAT),
]
