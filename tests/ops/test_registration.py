"""The ops as torch sees them: schemas, fakes, derivatives of both orders, autocast, compilation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

from i2i_dist import ops
from i2i_dist.ops import reference

pytestmark = pytest.mark.usefixtures("native")

LAYOUTS = [torch.contiguous_format, torch.channels_last]


@pytest.fixture
def native(monkeypatch: pytest.MonkeyPatch) -> None:
    """Demand kernels: nothing here may pass by way of the reference."""
    if ops.build_info()["problem"] is not None:
        pytest.skip("the extension is not built")
    monkeypatch.setenv("I2I_DIST_OPS", "native")


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def samples(dtype: torch.dtype, layout: torch.memory_format) -> dict[str, list[Any]]:
    """Return arguments for every op of the extension."""
    exact = torch.promote_types(dtype, torch.float32)
    x, grad, other = (draw(2, 3, 4, 5, seed=seed, dtype=dtype).contiguous(memory_format=layout) for seed in (0, 1, 2))
    gamma, beta = (draw(2, 3, seed=seed, dtype=exact) for seed in (3, 4))
    rho = draw(3, seed=5, dtype=exact).sigmoid()
    rows = [[draw(count, 5, seed=count + side, dtype=dtype) for count in (6, 4)] for side in (0, 1)]
    ids = torch.tensor([3, 0, 19, 3])
    statistics = torch.ones(2, 3, 2, dtype=exact)
    return {
        "patch_nce": [*rows, 2, 0.3, 0, 1e-3, None, True],
        "patch_nce_query_gradient": [draw(10, 5, dtype=dtype), draw(10, dtype=exact)],
        "patch_nce_key_gradient": [*rows, torch.ones(10, 2, dtype=exact), draw(10, dtype=exact), 2, 0.3, 0, 1e-3],
        "adalin": [x, gamma, beta, rho, other, 1e-5, True, 0.0],
        "adalin_backward": [grad, x, gamma, beta, rho, statistics, statistics[:, 0], True, 0.0],
        "instance_norm_act": [x, other, 1e-5, 0.2],
        "instance_norm_act_backward": [grad, x, statistics, 0.2],
        "patch_gather": [x, ids],
        "patch_gather_backward": [draw(2, 4, 3, dtype=dtype), ids, 4, 5, layout is torch.channels_last],
    }


def requiring_gradients(argument: Any) -> Any:
    if isinstance(argument, list):
        return [requiring_gradients(one) for one in argument]
    return argument.clone().requires_grad_() if torch.is_tensor(argument) and argument.is_floating_point() else argument


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", samples(torch.float32, torch.contiguous_format))
def test_every_op_passes_opcheck(name: str, dtype: torch.dtype, layout: torch.memory_format) -> None:
    op = getattr(torch.ops.i2i_dist, name).default
    arguments = samples(dtype, layout)[name]
    opcheck(op, arguments)
    if name in ("patch_nce", "adalin", "instance_norm_act", "patch_gather", "patch_gather_backward"):
        opcheck(op, [requiring_gradients(argument) for argument in arguments])


def test_every_op_of_the_extension_is_sampled() -> None:
    registered = {
        name.split("::")[1]
        for name in torch._C._dispatch_get_registrations_for_dispatch_key("CPU")
        if name.startswith("i2i_dist::")
    }
    assert registered == set(samples(torch.float32, torch.contiguous_format))


def nce(queries: Tensor, others: Tensor, keys: Tensor) -> Tensor:
    losses = ops.patch_nce_losses(
        [queries, others], [keys, keys], groups=2, temperature=0.3, key_offset=1, eps=1e-3, diagonal=0.5
    )
    return torch.cat(losses)


FUNCTIONS: dict[str, tuple[Callable[..., Tensor], list[Tensor]]] = {
    "patch_nce": (nce, [draw(6, 4), draw(4, 4, seed=1), draw(8, 4, seed=2)]),
    "adalin": (
        lambda x, gamma, beta, rho, residual: ops.adalin(
            x, gamma, beta, rho, activation="leaky_relu", residual=residual
        ),
        [draw(2, 3, 2, 3), draw(2, 3, seed=1), draw(2, 3, seed=2), draw(3, seed=3), draw(2, 3, 2, 3, seed=4)],
    ),
    "iln": (
        lambda x, gamma, beta, rho: ops.iln(x, gamma, beta, rho, unbiased=False, activation="relu"),
        [draw(2, 3, 2, 3), draw(3, seed=1), draw(3, seed=2), draw(3, seed=3)],
    ),
    "instance_norm_act": (
        lambda x, residual: ops.instance_norm_act(x, activation="leaky_relu", residual=residual),
        [draw(2, 3, 2, 3), draw(2, 3, 2, 3, seed=1)],
    ),
    "patch_gather": (lambda x: ops.patch_gather(x, torch.tensor([5, 0, 5])), [draw(2, 3, 2, 3)]),
}


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_derivatives_of_both_orders(name: str, layout: torch.memory_format) -> None:
    function, drawn = FUNCTIONS[name]
    arguments = [
        (tensor.contiguous(memory_format=layout) if tensor.dim() == 4 else tensor.clone()).requires_grad_()
        for tensor in drawn
    ]
    assert torch.autograd.gradcheck(function, arguments)
    assert torch.autograd.gradgradcheck(function, arguments)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_some_arguments_may_need_no_gradient(name: str) -> None:
    function, drawn = FUNCTIONS[name]
    everything = torch.autograd.grad(function(*[t.requires_grad_() for t in drawn]).sum(), drawn)
    for index, tensor in enumerate(drawn):
        alone = [other.detach() for other in drawn]
        alone[index].requires_grad_()
        (grad,) = torch.autograd.grad(function(*alone).sum(), alone[index])
        torch.testing.assert_close(grad, everything[index], rtol=1e-12, atol=1e-12)
        assert grad.shape == tensor.shape


class Dispatched(TorchDispatchMode):
    """Notes the names of all ops that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, op: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(op.name())
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_no_gradient_is_made_up_for_what_has_none(name: str) -> None:
    """Statistics and prepared gradients are outputs too; a gradient of zeros for each would be memory and a launch."""
    function, drawn = FUNCTIONS[name]
    arguments = [tensor.clone().requires_grad_() for tensor in drawn]
    output = function(*arguments)
    with Dispatched() as dispatched:
        torch.autograd.grad(output, arguments, torch.ones_like(output))
    assert any(op.startswith("i2i_dist::") for op in dispatched.names)
    assert not {"aten::zeros", "aten::new_zeros", "aten::zeros_like", "aten::zero_"} & dispatched.names


class Blind(torch.autograd.Function):
    """Returns its input, and has no gradient for it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None:
        return None


@pytest.mark.parametrize("name", FUNCTIONS)
def test_no_gradient_comes_out_where_none_came_in(name: str) -> None:
    function, drawn = FUNCTIONS[name]
    arguments = [tensor.clone().requires_grad_() for tensor in drawn]
    grads = torch.autograd.grad(
        Blind.apply(function(*arguments)), arguments, torch.ones(()).expand_as(function(*drawn)), allow_unused=True
    )
    assert all(grad is None or not grad.any() for grad in grads)


def dependent(x: Tensor, other: Tensor) -> Tensor:
    """Every op on inputs that depend on one another, are the same, or have hooks."""
    gamma = x.mean((2, 3)) * 2 + 1
    hooked = x * 1
    hooked.register_hook(lambda grad: grad * 10)
    rows = x.flatten(1)
    return torch.cat(
        [
            ops.adalin(x, gamma, gamma, gamma[0].sigmoid(), activation="relu", residual=x).flatten(),
            ops.instance_norm_act(hooked, activation="leaky_relu", residual=hooked).flatten(),
            ops.patch_nce_loss(rows, rows),
            ops.patch_nce_loss(rows, rows.flip(0) * other),
            ops.patch_gather(hooked, torch.tensor([1, 3, 1])).flatten(),
        ]
    )


def test_second_derivatives_count_every_path_once(monkeypatch: pytest.MonkeyPatch) -> None:
    x, other = draw(3, 3, 2, 3).requires_grad_(), draw(3, 18, seed=1).requires_grad_()
    weight = draw(dependent(x, other).numel(), seed=2)

    def derivatives() -> tuple[list[Tensor], list[Tensor]]:
        first = torch.autograd.grad((dependent(x, other) * weight).sum(), (x, other), create_graph=True)
        penalty = sum(grad.square().sum() for grad in first)
        return list(first), list(torch.autograd.grad(penalty, (x, other)))

    native = derivatives()
    plain = torch.autograd.grad((dependent(x, other) * weight).sum(), (x, other))
    monkeypatch.setenv("I2I_DIST_OPS", "reference")
    expected = derivatives()
    torch.testing.assert_close(native, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(plain, tuple(expected[0]), rtol=1e-9, atol=1e-9)


def test_a_residual_alone_may_need_a_gradient() -> None:
    x, residual = draw(2, 3, 2, 3), draw(2, 3, 2, 3, seed=1).requires_grad_()
    values = draw(2, 3), draw(2, 3), draw(3)
    for create_graph in (False, True):
        y = ops.adalin(x, *values, residual=residual)
        (grad,) = torch.autograd.grad((y * x).sum(), residual, create_graph=create_graph)
        assert torch.equal(grad, x)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_forward_mode_and_function_transforms_are_those_of_the_definition(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    function, drawn = FUNCTIONS[name]
    tangents = [draw(*tensor.shape, seed=7) for tensor in drawn]
    inputs = [tensor.detach() for tensor in drawn]
    _, ours = torch.func.jvp(function, tuple(inputs), tuple(tangents))
    with torch.autograd.forward_ad.dual_level():
        duals = [torch.autograd.forward_ad.make_dual(*pair) for pair in zip(inputs, tangents, strict=True)]
        dual = torch.autograd.forward_ad.unpack_dual(function(*duals)).tangent
    monkeypatch.setenv("I2I_DIST_OPS", "reference")
    _, expected = torch.func.jvp(function, tuple(inputs), tuple(tangents))
    assert expected.any()
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(dual, expected)


def test_a_scaled_loss_reaches_fp16_queries_whole() -> None:
    torch.manual_seed(0)
    key = torch.randn(64, 32) * 30
    query = (key + 0.02 * torch.randn(64, 32)).half()
    exact, low = query.double().requires_grad_(), query.clone().requires_grad_()
    for rows in (exact, low):
        (ops.patch_nce_loss(rows, key.half().to(rows.dtype)).mean() * 2.0**16).backward()
    assert exact.grad is not None and low.grad is not None and low.grad.dtype == torch.float16
    assert (low.grad.double() - exact.grad).norm() < 2e-3 * exact.grad.norm()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_compiling_does_not_break_the_graph(name: str) -> None:
    function, drawn = FUNCTIONS[name]
    arguments = [tensor.detach().clone().requires_grad_() for tensor in drawn]
    expected = function(*arguments)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(*arguments)
    torch.testing.assert_close(compiled, expected, rtol=1e-12, atol=1e-12)
    theirs = torch.autograd.grad(expected.square().sum(), arguments)
    ours = torch.autograd.grad(compiled.square().sum(), arguments)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_sizes_may_be_dynamic_under_compilation() -> None:
    compiled = torch.compile(ops.instance_norm_act, fullgraph=True, backend="aot_eager", dynamic=True)
    for size in (3, 4, 7):
        x = draw(2, 3, size, size + 1)
        torch.testing.assert_close(compiled(x, activation="relu"), ops.instance_norm_act(x, activation="relu"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_leaves_the_ops_their_precision(dtype: torch.dtype) -> None:
    query, key, x = (draw(*shape, dtype=dtype) for shape in ((6, 8), (6, 8), (2, 3, 4, 4)))
    gamma, rho = draw(2, 3, dtype=torch.float32), draw(3, dtype=torch.bfloat16)

    def run() -> list[Tensor]:
        maps = [ops.instance_norm_act(x), ops.adalin(x, gamma, gamma, rho), ops.patch_gather(x, torch.tensor([1]))]
        return [ops.patch_nce_loss(query, key), *maps]

    plain = run()
    with torch.autocast("cpu", torch.bfloat16):
        cast = run()
    assert [tensor.dtype for tensor in cast] == [torch.float32, dtype, dtype, dtype]
    assert all(torch.equal(one, other) for one, other in zip(cast, plain, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_maps_keep_their_memory_format(layout: torch.memory_format) -> None:
    x = draw(2, 3, 4, 5).contiguous(memory_format=layout).requires_grad_()
    gamma, rho = draw(2, 3), draw(3).sigmoid()
    for y in (ops.instance_norm_act(x), ops.adalin(x, gamma, gamma, rho)):
        (grad,) = torch.autograd.grad(y, x, draw(2, 3, 4, 5))
        assert y.is_contiguous(memory_format=layout) and grad.is_contiguous(memory_format=layout)


def test_views_of_any_strides_are_taken() -> None:
    wide = draw(2, 6, 8, 5)
    x = wide[:, ::2, 1::2].requires_grad_()
    gamma, rho = draw(2, 3), draw(3).sigmoid()
    for function, definition in (
        (ops.instance_norm_act, reference.instance_norm_act),
        (lambda x: ops.adalin(x, gamma, gamma, rho), lambda x: reference.adalin(x, gamma, gamma, rho)),
        (
            lambda x: ops.patch_gather(x, torch.tensor([4, 1])),
            lambda x: reference.patch_gather(x, torch.tensor([4, 1])),
        ),
    ):
        torch.testing.assert_close(function(x), definition(x))
        ours, theirs = (torch.autograd.grad(f(x).square().sum(), x) for f in (function, definition))
        torch.testing.assert_close(ours, theirs)


def test_a_gradient_that_was_not_prepared_is_refused() -> None:
    query = draw(4, 3).requires_grad_()
    loss, _, _ = torch.ops.i2i_dist.patch_nce([query], [draw(4, 3)], 1, 0.07, 0, 0.0, None, False)
    with pytest.raises(ValueError, match="with_gradient=False"):
        loss.sum().backward()


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda x, v: ops.instance_norm_act(x[0]), r"x of shape \[3, 2, 2\]"),
        (lambda x, v: ops.instance_norm_act(x[:0]), "not empty"),
        (lambda x, v: ops.instance_norm_act(x[:, :, :1, :1]), "the instance norm of one pixel is 0"),
        (lambda x, v: ops.instance_norm_act(x.to(torch.float8_e4m3fn)), "fp16, bf16, fp32 or fp64"),
        (lambda x, v: ops.iln(v, v, v, v), r"iln was given x of shape \[2, 3\]"),
        (lambda x, v: ops.patch_nce_loss(v, v, temperature=float("nan")), "must be >= 1e-6"),
        (lambda x, v: ops.patch_nce_loss(v, v, temperature=torch.tensor(0.07)), "no gradient reaches them"),
        (lambda x, v: ops.patch_nce_loss(v, v, groups=1.0), "groups=1.0"),
        (lambda x, v: ops.instance_norm_act(x.long()), "torch.int64"),
        (lambda x, v: ops.instance_norm_act(x, activation="gelu"), "'gelu' is not known.*none, relu, leaky_relu"),
        (lambda x, v: ops.instance_norm_act(x, eps=0.0), "eps=0.0 must be > 0"),
        (lambda x, v: ops.instance_norm_act(x, residual=x[:1]), r"residual has shape \[1, 3, 2, 2\]"),
        (lambda x, v: ops.adalin(x, v[0], v, v[0]), r"gamma has shape \[3\].*must be \[2, 3\]"),
        (lambda x, v: ops.adalin(x, v, v, v), r"rho has shape \[2, 3\].*must be \[3\]"),
        (lambda x, v: ops.iln(x, v, v[0], v[0]), r"gamma has shape \[2, 3\].*must be \[3\]"),
        (lambda x, v: ops.adalin(x[:, :, :1, :1], v, v, v[0]), "use unbiased=False"),
        (lambda x, v: ops.patch_gather(x[0], torch.tensor([0])), r"\[N, C, H, W\]"),
        (lambda x, v: ops.patch_gather(x, torch.tensor([0.0])), "int64"),
        (lambda x, v: ops.patch_gather(x, torch.tensor([], dtype=torch.long)), "at least one"),
        (lambda x, v: ops.patch_nce_losses([], []), "at least one"),
        (lambda x, v: ops.patch_nce_losses([v, v[:, :2]], [v, v[:, :2]]), "Call patch_nce_loss for each"),
        (lambda x, v: ops.patch_nce_loss(v[:0], v[:0]), "cannot be cut into groups=1"),
        (lambda x, v: ops.patch_nce_loss(v[:, :0], v[:, :0]), "at least one element"),
    ],
)
def test_bad_arguments_are_refused(call: Callable[[Tensor, Tensor], Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        call(torch.ones(2, 3, 2, 2), torch.ones(2, 3))
