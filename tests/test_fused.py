"""hf_elra.optim.kernels.triton: the kernels, in Triton's interpreter where there is no GPU."""

import contextlib
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from hf_elra import ELRA
from hf_elra.errors import ConfigurationError
from lib.cuda_graphs import WARM_UP, captured
from tests.conftest import ROOT
from tests.test_elra import STAYS_HIGH, STAYS_HIGH_AFTER_A_CYCLE, TROUBLE, arguments, events, walk_beside_the_reference

fused = pytest.importorskip("hf_elra.optim.kernels.triton", reason="Triton is not installed; it exists for Linux only")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@contextlib.contextmanager
def small_pieces():
    """Pieces of a few numbers: small tensors need several programs, and the interpreter has less to do."""
    kept = fused.PIECE, fused.BLOCK
    fused.PIECE, fused.BLOCK = 4, 2
    try:
        with np.errstate(all="ignore"):  # the interpreter computes with numpy, which warns of NaN and inf
            yield
    finally:
        fused.PIECE, fused.BLOCK = kept


@pytest.fixture
def pieces():
    with small_pieces():
        yield


without_shrinking = (Phase.explicit, Phase.generate)  # the interpreter is slow


@pytest.mark.skipif(DEVICE == "cuda", reason="the walk is on the CPU; the next test compares paths on the GPU")
@pytest.mark.parametrize("how", [{}, {"capturable": True}])
@settings(max_examples=15, deadline=None, derandomize=True, phases=without_shrinking)
@given(arguments=arguments, sequence=st.lists(events, min_size=5, max_size=20), seed=st.integers(0, 2**31))
def test_kernels_walk_with_the_reference(how, arguments, sequence, seed):
    with small_pieces():
        walk_beside_the_reference({**arguments, **how, "fused": True, "restart_window": None}, sequence, seed)


@pytest.mark.skipif(DEVICE == "cuda", reason="the walk is on the CPU; the next test compares paths on the GPU")
@pytest.mark.parametrize(
    "sequence", [STAYS_HIGH, STAYS_HIGH_AFTER_A_CYCLE, TROUBLE], ids=["first cycle", "later", "trouble"]
)
def test_accepting_what_stays_high(sequence):
    with small_pieces():
        walk_beside_the_reference({"fused": True}, sequence, seed=0)


def test_what_is_not_finite_stays_out_of_the_statistics_without_soft_restarts_too(pieces):
    made = networks(soft_restart=False)
    for model, optimizer in made:
        train(model, optimizer, 3)
        optimizer.end_cycle()
        train(model, optimizer, 2)
        for p in model.parameters():
            p.grad = torch.full_like(p, math.nan)
        optimizer.step(loss=100.0)
    plain, kernels = (optimizer._numbers()["loss_statistics"] for _, optimizer in made)
    assert kernels["last_cycle"] == pytest.approx(plain["last_cycle"], rel=1e-5)
    assert kernels["initial_loss"] == pytest.approx(plain["initial_loss"], rel=1e-5)
    assert kernels["cycle"] == pytest.approx(plain["cycle"], rel=1e-3)


def networks(dtype=torch.float32, **settings):
    """Two equal networks and an ELRA with two groups for each, without and with kernels."""
    made = []
    for use in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Conv2d(2, 3, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(12, 2)
        ).to(DEVICE, memory_format=torch.channels_last)
        model[0].to(dtype)
        groups = [
            {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 1e-2},
            {"params": [p for p in model.parameters() if p.dim() == 1]},
        ]
        made.append((model, ELRA(groups, fused=use, **settings)))
    return made


def train(model, optimizer, updates, seed=0, scheduler=None, spike_at=()):
    generator = torch.Generator().manual_seed(seed)
    for number in range(updates):
        images = torch.randn(4, 2, 4, 4, generator=generator).to(DEVICE)
        targets = images.mean((1, 2, 3))
        optimizer.zero_grad()
        hidden = model[0](images.to(model[0].weight.dtype)).float()
        loss = (model[1:](hidden).sum(1) - targets).square().mean()
        loss.backward()
        optimizer.step(loss=loss.detach() * (1e6 if number in spike_at else 1))
        if scheduler is not None:
            scheduler.step()


def same(one, other, **tolerance):
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, **tolerance)


@pytest.mark.parametrize("capturable", [False, True])
def test_kernels_do_what_tensor_operations_do(pieces, capturable):
    """Two groups with other decays, a scheduler, channels last, restarts."""
    (plain, first), (fast, second) = networks(capturable=capturable, min_step_norm=0.05)
    for model, optimizer in ((plain, first), (fast, second)):
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda t: 1 / (1 + t), lambda t: 1.0])
        train(model, optimizer, 12, scheduler=scheduler, spike_at=(4, 5, 9))
        assert second._kernels.in_force if optimizer is second else "_kernels" not in vars(first)
    assert first.restarts == second.restarts >= 3
    assert first.metrics == pytest.approx(second.metrics, rel=1e-4)
    same(plain, fast, rtol=1e-4, atol=1e-6)


def test_reading_the_numbers_leaves_those_on_the_device_in_force(pieces):
    _, (model, optimizer) = networks()
    train(model, optimizer, 4)
    for _ in range(2):
        numbers = optimizer._kernels.numbers.clone()
        assert optimizer._numbers()["alpha"] == optimizer.alpha == optimizer.metrics["alpha"]
        optimizer.state_dict()
        assert optimizer._kernels.in_force
        assert torch.equal(optimizer._kernels.numbers.nan_to_num(), numbers.nan_to_num())
        train(model, optimizer, 1)
    optimizer.end_cycle()  # this changes them, on the host
    assert not optimizer._kernels.in_force
    known = optimizer._numbers()["loss_statistics"]["last_cycle"]
    train(model, optimizer, 1)
    assert optimizer._kernels.in_force
    assert optimizer._numbers()["loss_statistics"]["last_cycle"] == known


def test_kernels_know_gradient_decay(pieces):
    (plain, first), (fast, second) = networks(min_step_norm=0.05, max_step_norm=0.3)
    for model, optimizer in ((plain, first), (fast, second)):
        for seed, decay in enumerate((1.0, 0.4, 0.25)):
            optimizer.gradient_decay = decay
            train(model, optimizer, 5, seed=seed, spike_at=(3,) if seed else ())
    assert second._kernels.in_force
    assert first.restarts == second.restarts >= 2
    assert first.metrics == pytest.approx(second.metrics, rel=1e-4)
    same(plain, fast, rtol=1e-4, atol=1e-6)


def test_several_types_of_numbers(pieces):
    (plain, first), (fast, second) = networks(torch.bfloat16, soft_restart=False)
    train(plain, first, 5)
    train(fast, second, 5)
    assert second._kernels.in_force
    same(plain[3], fast[3], rtol=1e-2, atol=1e-3)
    same(plain[0], fast[0], rtol=2e-2, atol=1e-3)


def test_checkpoints_pass_from_kernels_to_tensor_operations_and_back(pieces):
    (plain, first), (fast, second) = networks()
    train(plain, first, 14, seed=1)
    train(fast, second, 5, seed=1)
    generator_state = fast.state_dict(), second.state_dict()
    (other, third), _ = networks()
    other.load_state_dict(generator_state[0])
    third.load_state_dict(generator_state[1])
    assert third.alpha == second.alpha
    assert third.metrics == second.metrics
    second.load_state_dict(third.state_dict())
    train(fast, second, 3, seed=2)
    train(other, third, 3, seed=2)
    same(fast, other, rtol=1e-4, atol=1e-6)
    assert second.alpha == pytest.approx(third.alpha, rel=1e-4)


def test_a_parameter_without_gradient_sends_the_update_to_tensor_operations(pieces):
    (plain, first), (fast, second) = networks()
    for model, optimizer in ((plain, first), (fast, second)):
        train(model, optimizer, 4)
        model[3].requires_grad_(False)
        for p in model[3].parameters():
            p.grad = None
        train(model, optimizer, 2, seed=1)
        model[3].requires_grad_(True)
        train(model, optimizer, 3, seed=2)
    same(plain, fast, rtol=1e-4, atol=1e-6)


def test_a_gradient_never_becomes_state_when_it_is_not_finite(pieces):
    """Neither after a step, which is taken back, nor after a frozen one, which leaves nothing to take back."""
    for frozen in (False, True):
        p = torch.nn.Parameter(torch.ones(5, device=DEVICE))
        optimizer = ELRA([p], fused=True)
        for number in range(4):
            p.grad = torch.full_like(p, math.nan if number == 3 else 1.0 + number)
            optimizer.param_groups[0]["lr"] = 0.0 if frozen and number == 2 else 1e-3
            optimizer.step(loss=torch.tensor(1.0, device=DEVICE))
        assert torch.isfinite(p).all()
        assert torch.isfinite(optimizer.state[p]["previous_direction"]).all()
        assert optimizer.restarts == 1


def test_nothing_is_read_back_before_somebody_asks(pieces):
    p = torch.nn.Parameter(torch.ones(5, device=DEVICE))
    optimizer = ELRA([p], fused=True)
    for _ in range(4):
        p.grad = torch.randn_like(p)
        optimizer.step(loss=p.detach().sum())
    kernels = optimizer._kernels
    assert not kernels.was_read
    numbers = kernels.numbers.tolist()
    assert optimizer.alpha == numbers[fused.NAMES.index("alpha")] == optimizer.param_groups[0]["alpha"]
    assert kernels.was_read


def test_stays_non_finite_is_an_error_when_it_is_read(pieces):
    p = torch.nn.Parameter(torch.ones(5, device=DEVICE))
    optimizer = ELRA([p], lr=1e-8, fused=True)
    for number in range(30):
        p.grad = torch.full_like(p, math.nan if number > 1 else 1e-3)
        optimizer.step(loss=1.0)
        optimizer.param_groups[0]["lr"] = 1e-8
    assert torch.isfinite(p).all()
    with pytest.raises(RuntimeError, match="stayed non-finite over 20 updates in a row"):
        optimizer.metrics  # noqa: B018 - reading is the point


def test_stochastic_rounding_is_right_on_average(monkeypatch):
    """Steps far below bfloat16's precision of 2^-8 at 1 are not lost."""
    monkeypatch.setattr(fused, "PIECE", 512)
    monkeypatch.setattr(fused, "BLOCK", 512)
    p = torch.nn.Parameter(torch.ones(400, dtype=torch.bfloat16, device=DEVICE))
    optimizer = ELRA([p], fused=True, stochastic_rounding=True, max_growth=1.0001, noise_correction=0)
    for _ in range(10):
        p.grad = torch.ones_like(p)
        optimizer.step(loss=1.0)
    assert 1 - p.float().mean().item() == pytest.approx(10e-3, rel=0.35)
    assert len(p.unique()) > 1


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"memory": "point"}, "memory='point' has no kernels"),
        ({"restart_window": 5}, "restart_window=5 has no kernels"),
    ],
)
def test_what_has_no_kernels_is_refused_if_asked_for(given, reason):
    p = torch.nn.Parameter(torch.ones(5))
    p.grad = torch.ones_like(p)
    with pytest.raises(ConfigurationError, match=f"fused=True cannot be done: {reason}"):
        ELRA([p], fused=True, **given).step(loss=1.0)


COMPILE = """
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature
from hf_elra.optim.kernels import triton as fused

TYPES = dict.fromkeys(["gradients", "kept", "points", "sizes", "tensors", "starts"], "*i64")
TYPES |= dict.fromkeys(["shares", "partials", "numbers", "settings", "squares"], "*fp64")
TYPES |= {"loss_address": "*fp32", "count": "i32", "seed": "i32"}

backend = make_backend(GPUTarget("cuda", 90, 32))

def bind(kernel):
    # what Triton does with the arguments at every launch
    bound = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound(**{name: 1 if name in TYPES and TYPES[name] == "i32" else torch.zeros(4) for name in kernel.arg_names})

def compile(kernel, **constants):
    bind(kernel)
    signature = {name: "constexpr" if name in constants else TYPES[name] for name in kernel.arg_names}
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    made = triton.compile(ASTSource(kernel, signature, places), target=GPUTarget("cuda", 90, 32))
    print(kernel.fn.__name__, len(made.asm["cubin"]))

sizes = {"PIECE": fused.PIECE, "BLOCK": fused.BLOCK}
for kind, wide in ((tl.float32, tl.float32), (tl.bfloat16, tl.float32), (tl.float64, tl.float64)):
    compile(fused.products_kernel, ALIGNED=True, TYPE=kind, WIDE=wide, **sizes)
    for copy in (True, False):
        compile(fused.update_kernel, ALIGNED=copy, COPY=copy, ROUND=kind == tl.bfloat16, TYPE=kind, WIDE=wide, **sizes)
for yes in (True, False):
    flags = dict.fromkeys(["HAS_LOSS", "SOFT", "HAS_RATIO", "DERIVED", "BB2", "NOISY"], yes)
    compile(fused.decision_kernel, BLOCK=fused.BLOCK, **flags)
compile(fused.size_kernel, BLOCK=fused.BLOCK)
"""


def test_kernels_compile_for_a_gpu_even_where_there_is_none():
    """To machine code of an H100: the interpreter accepts more than the compiler does."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()].count("update_kernel") == 6


def test_parameters_on_a_cpu_are_refused_outside_the_interpreter():
    program = (
        "import torch, hf_elra\n"
        "p = torch.nn.Parameter(torch.ones(3)); p.grad = p.detach().clone()\n"
        "hf_elra.ELRA([p], fused=True).step(loss=1.0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, "TRITON_INTERPRET": "0"}, capture_output=True, text=True
    )
    assert "fused=True cannot be done: parameters lie on cpu, and the kernels are for CUDA. Leave" in done.stderr


@pytest.mark.parametrize("asked", [None, True])
def test_kernels_that_do_not_work_are_replaced_unless_they_were_asked_for(pieces, monkeypatch, asked):
    (plain, first), (fast, second) = networks()
    train(plain, first, 1)
    train(fast, second, 1)

    def broken(*args, **kwargs):
        raise RuntimeError("PTXAS error: no such thing")

    monkeypatch.setattr(fused, "decision_kernel", {(1,): broken})
    if asked:
        with pytest.raises(RuntimeError, match="PTXAS"):
            train(fast, second, 1)
        return
    second.param_groups[0]["fused"] = None
    monkeypatch.setattr(ELRA, "_takes_kernels", lambda self, *_: self is second and "_kernel_error" not in vars(self))
    with pytest.warns(UserWarning, match="without its Triton kernels, which is slower: RuntimeError: PTXAS error"):
        train(fast, second, 3, seed=1)
    train(plain, first, 3, seed=1)
    same(plain, fast)


needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")


@needs_gpu
def test_an_update_does_not_wait_for_the_gpu():
    (_, _), (model, optimizer) = networks()
    train(model, optimizer, 3)
    inputs = torch.randn(4, 2, 4, 4, device=DEVICE)
    for _ in range(2):
        optimizer.zero_grad()
        loss = model(inputs).square().mean()
        loss.backward()
        torch.cuda.set_sync_debug_mode("error")
        try:
            optimizer.step(loss=loss.detach())
        finally:
            torch.cuda.set_sync_debug_mode("default")


@needs_gpu
def test_captured_in_a_cuda_graph():
    (plain, first), (fast, second) = networks(capturable=True)
    inputs = torch.randn(4, 2, 4, 4, device=DEVICE)

    def training_step(model, optimizer):
        loss = model(inputs).square().mean()
        loss.backward()
        optimizer.step(loss=loss.detach())

    graph = captured(lambda: training_step(fast, second), second.zero_grad)
    for _ in range(5):
        graph.replay()
    for _ in range(WARM_UP + 5):
        first.zero_grad()
        training_step(plain, first)
    assert first.alpha == pytest.approx(second.alpha, rel=1e-3)
    same(plain, fast, rtol=1e-4, atol=1e-6)


@needs_gpu
@pytest.mark.parametrize("memory", ["point", "offload"])
def test_other_memory_layouts_on_a_gpu(memory):
    (plain, first), _ = networks()
    (other, second), _ = networks(memory=memory)
    train(plain, first, 12, spike_at=(5, 8))
    train(other, second, 12, spike_at=(5, 8))
    assert first.restarts == second.restarts >= 2
    same(plain, other, rtol=1e-3, atol=1e-5)
    if memory == "offload":
        assert all(s["previous_direction"].device.type == "cpu" for s in second.state.values())
