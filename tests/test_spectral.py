"""hf_elra.optim.spectral, its direction and its rule for α."""

import copy
import io
import itertools
import math
import re
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

from hf_elra import (
    ELRA,
    ConfigurationError,
    ELRASpectral,
    WeightAverage,
    adapters_of,
    embeddings_of,
    experts_of,
    outputs_of,
)
from hf_elra.optim.directions.polar import iterates_in, multiplies_bfloat16, polar_factor
from hf_elra.optim.directions.spectral import Spectral, kept_in, spectral_direction
from hf_elra.optim.reference.spectral import ReferenceSpectral
from hf_elra.optim.rules import Measurement
from hf_elra.optim.rules.end_slopes import EndSlopes
from tests.conftest import llama, token_rows

# ---- the twin in plain float64 ----

SHAPES = [(4, 6), (5,), (6, 3), (7, 4)]
EVENTS = ["plain"] * 8 + ["spike", "small_spike", "nothing", "nan_loss", "nan_gradient", "other_level", "end_cycle"]
twin_arguments = st.fixed_dictionaries(
    {
        "lr": st.sampled_from([1e-7, 1e-3, 0.1]),
        "momentum": st.sampled_from([0.0, 0.5, 0.9]),
        "warmup": st.sampled_from([0, 3, 10]),
        "max_correction": st.sampled_from([1.0, 4.0, None]),
        "max_relative_step": st.sampled_from([0.5, 0.01]),
        "max_drift": st.sampled_from([None, 0.3, 0.02]),
        "weight_decay": st.sampled_from([0.0, 0.1]),
        "soft_restart": st.booleans(),
        "initial_restart_ratio": st.sampled_from([None, 1.1]),
    }
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    arguments=twin_arguments,
    sequence=st.lists(st.sampled_from(EVENTS), min_size=5, max_size=60),
    noise=st.sampled_from([0.0, 0.1, 3.0]),
    epoch=st.sampled_from([None, 20]),
    seed=st.integers(0, 2**31),
)
def test_walks_with_the_twin(arguments, sequence, noise, epoch, seed):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    start = [random(*shape) for shape in SHAPES]
    curvatures = [torch.rand(*shape, generator=generator, dtype=torch.float64) + 0.1 for shape in SHAPES]
    params = [nn.Parameter(x.clone()) for x in start]
    optimizer = ELRASpectral([{"params": params[:2]}, {"params": params[2:]}], embeddings=params[3:], **arguments)
    optimizer.updates_per_epoch, optimizer.total_updates = epoch, epoch and 2 * epoch
    lengths = {"updates_per_epoch": epoch, "total_updates": optimizer.total_updates}
    twin = ReferenceSpectral(start, [False, False, False, True], **lengths, **arguments)
    level = 0.0
    for event in sequence:
        gradients = [c * p.detach() + noise * random(*p.shape) for c, p in zip(curvatures, params, strict=True)]
        level += 1e3 * (event == "other_level")
        loss = level + sum(float((c * p.detach().square()).sum() / 2) for c, p in zip(curvatures, params, strict=True))
        loss += {"spike": 1e6, "small_spike": 30.0, "nothing": math.nan, "nan_loss": math.nan}.get(event, 0.0)
        if event == "nothing":
            gradients = [torch.zeros_like(g) for g in gradients]
        if event == "nan_gradient":
            gradients[2][1, 1] = math.nan
        if event == "end_cycle":
            optimizer.end_cycle()
            twin.end_cycle()
        for p, g in zip(params, gradients, strict=True):
            p.grad = g.clone()
        optimizer.step(loss=loss)
        twin.step(loss, gradients)
        assert optimizer.alpha == pytest.approx(twin.alpha, rel=1e-6)
        counts = twin.restarts, twin.skipped, twin.accepted_levels, twin.restarts_in_a_row
        names = "restarts", "skipped", "accepted_levels", "consecutive_restarts"
        assert tuple(optimizer.metrics[name] for name in names) == counts
        for p, x in zip(params, twin.x, strict=True):
            torch.testing.assert_close(p.detach(), x, rtol=1e-6, atol=1e-9)
            p.data.copy_(x)  # so that rounding does not add up


# ---- the direction ----


@pytest.mark.parametrize("shape", [(1, 7), (6, 6), (20, 50)])
def test_polar_factor_has_singular_values_near_one(shape):
    torch.manual_seed(0)
    matrices = torch.randn(3, *shape)
    values = torch.linalg.svdvals(polar_factor(matrices))
    assert values.max() < 1.25
    assert values.median() > 0.6
    alone = torch.stack([polar_factor(matrix[None])[0] for matrix in matrices])
    torch.testing.assert_close(polar_factor(matrices), alone, rtol=1e-4, atol=1e-5)


@pytest.fixture
def one_thread():
    """Several threads share the work on a batch as it suits its size, which rounds otherwise."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_few_or_many_matrices_at_once_are_the_same(monkeypatch, dtype):
    """Bit by bit, and never more of them than asked for."""
    torch.manual_seed(0)
    shapes = [(16, 24)] * 7 + [(24, 16)] * 3 + [(40, 40)] + [(128, 160)] * 2 + [(5, 16, 24)]
    gradients = [torch.randn(shape) for shape in shapes]
    flags = [False] * 14, [False] * 13 + [True]
    together = spectral_direction(gradients, *flags, polar_dtype=dtype)
    sizes = []
    noted = lambda x, how: sizes.append(x) or polar_factor(x, how)  # noqa: E731
    monkeypatch.setattr("hf_elra.optim.directions.spectral.polar_factor", noted)
    for batch, counts in ((1, [1] * 18), (3 * 16 * 24, [3, 3, 3, 3, 3, 1, 1, 1])):
        sizes.clear()
        few = spectral_direction(gradients, *flags, batch=batch, polar_dtype=dtype)
        assert all(map(torch.equal, few, together))
        assert sorted(map(len, sizes), reverse=True) == counts


@pytest.mark.parametrize(
    ("dtype", "faster", "asked", "found"),
    [
        ("float32", True, "auto", "bfloat16"),
        ("bfloat16", True, "auto", "bfloat16"),
        ("float32", False, "auto", "float32"),
        ("bfloat16", False, "auto", "float32"),
        ("float64", True, "auto", "float64"),
        ("float64", True, "float32", "float64"),
        ("float32", True, "float32", "float32"),
        ("float32", False, "bfloat16", "bfloat16"),
    ],
)
def test_what_polar_factors_are_computed_in(monkeypatch, dtype, faster, asked, found):
    monkeypatch.setattr("hf_elra.optim.directions.polar.multiplies_bfloat16", lambda: faster)
    matrices = torch.zeros(1, 128, 128, dtype=getattr(torch, dtype))
    assert iterates_in(matrices, asked) == getattr(torch, found)
    if asked == "auto":  # small ones are faster otherwise
        assert iterates_in(matrices[:, 1:], asked) == torch.promote_types(matrices.dtype, torch.float32)


@pytest.mark.parametrize("kind", ["amx_tile", "avx512_bf16"])
def test_a_cpu_multiplies_bfloat16_faster_by_either_of_two_kinds_and_not_if_torch_says_nothing(monkeypatch, kind):
    for known in ("amx_tile", "avx512_bf16"):
        monkeypatch.delattr(torch.cpu, f"_is_{known}_supported", raising=False)
    multiplies_bfloat16.cache_clear()
    assert not multiplies_bfloat16()
    for says in (False, True):
        monkeypatch.setattr(torch.cpu, f"_is_{kind}_supported", lambda says=says: says, raising=False)
        multiplies_bfloat16.cache_clear()
        assert multiplies_bfloat16() == (says and torch.backends.mkldnn.is_available())
    multiplies_bfloat16.cache_clear()


def test_polar_factors_in_bfloat16_are_near_those_in_float32():
    """Singular values from 1 to 1e-4 of the largest, and independent ones."""
    torch.manual_seed(0)
    matrices = torch.randn(4, 48, 96)
    u, s, v = torch.linalg.svd(matrices[2:], full_matrices=False)
    matrices[2:] = u @ torch.diag_embed(torch.logspace(0, -4, 48).expand_as(s)) @ v
    exact, rough = (polar_factor(matrices, dtype) for dtype in ("float32", "bfloat16"))
    apart = (rough - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)
    assert apart[:2].max() < 0.03
    assert apart[2:].max() < 0.2  # where singular values are below the precision of the largest
    assert torch.linalg.svdvals(rough).max() < 1.25


def test_every_direction_has_a_mean_square_of_one():
    torch.manual_seed(0)
    shapes = [(8, 30), (30, 8), (8, 30), (12,), (), (40, 5), (4, 3, 2, 2)]
    gradients = [1e-6 * torch.randn(shape) for shape in shapes]
    gradients[5][7] = 0
    tables = [False] * 5 + [True, False]
    directions = spectral_direction(gradients, tables)
    for gradient, direction, table in zip(gradients, directions, tables, strict=True):
        assert direction.shape == gradient.shape
        assert (direction * gradient).sum() > 0
        if not table:
            assert direction.square().mean().item() == pytest.approx(1, rel=1e-4)
    assert torch.equal(directions[5][7], torch.zeros(5))
    rows = directions[5].square().mean(1)
    torch.testing.assert_close(rows[:7], torch.ones(7))
    assert all(torch.equal(d, torch.zeros(s)) for d, s in zip(
        spectral_direction([torch.zeros(s) for s in shapes], tables), shapes, strict=True))  # fmt: skip


@pytest.mark.parametrize("rows", [4, 60])
def test_rows_of_a_whitened_table_are_half_by_themselves_and_half_as_the_polar_factor_has_them(monkeypatch, rows):
    """Also in pieces, and with a row that has no gradient."""
    torch.manual_seed(0)
    gradient = torch.randn(rows, 6, dtype=torch.float64) + 3 * torch.randn(6, dtype=torch.float64)
    gradient[1] = 0
    unit = nn.functional.normalize
    by_itself = unit(gradient)
    factor = polar_factor(by_itself[None].mT)[0].mT if rows > 6 else polar_factor(by_itself[None])[0]
    expected = 6**0.5 * unit(by_itself + unit(factor))
    for piece in (2**20, 12):
        monkeypatch.setattr("hf_elra.optim.directions.spectral.PIECE", piece)
        (found,) = spectral_direction([gradient], [True], whitened=[True])
        torch.testing.assert_close(found, expected)
    assert torch.linalg.svdvals(found)[0] < 0.9 * torch.linalg.svdvals(by_itself)[0] * 6**0.5
    (plain,) = spectral_direction([gradient], [True], whitened=[False])
    torch.testing.assert_close(plain, 6**0.5 * by_itself)


@pytest.mark.parametrize(("weights", "expected"), [("new", True), ("trained", False)])
def test_tables_of_new_models_are_whitened_and_those_of_trained_ones_not(weights, expected):
    """What was saved before there was that goes on as it began."""
    torch.manual_seed(0)
    table, matrix = (nn.Parameter(torch.randn(*shape)) for shape in [(30, 8), (8, 8)])
    params, tables = [matrix, table, nn.Parameter(torch.randn(4, 3, 2))], [table]
    tables.append(params[-1])  # of three dimensions, whose rows are taken by themselves
    optimizer = ELRASpectral(params, embeddings=tables, weights=weights, momentum=0.0)
    before = table.detach().clone()
    gradient = torch.randn(30, 8) + 2
    matrix.grad, table.grad = torch.randn(8, 8), gradient.clone()
    optimizer.step(loss=1.0)
    assert optimizer.param_groups[0]["whitened"] == [False, expected, False]
    along = (before - table.detach()) / (before - table.detach()).norm(dim=1, keepdim=True)
    is_plain = torch.allclose(along, gradient / gradient.norm(dim=1, keepdim=True), atol=0.01)
    assert is_plain != expected
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:
        del group["whitened"]
    again = ELRASpectral(params, embeddings=tables, weights=weights, momentum=0.0)
    again.load_state_dict(saved)
    before = table.detach().clone()
    again.step(loss=1.0)
    along = (before - table.detach()) / (before - table.detach()).norm(dim=1, keepdim=True)
    torch.testing.assert_close(along, gradient / gradient.norm(dim=1, keepdim=True), atol=0.01, rtol=0.0)


@pytest.mark.parametrize("size", [1e-42, 1e-30, 1e-24, 1e-10, 1.0, 1e15])
def test_the_size_of_a_gradient_does_not_matter(size):
    """Down to where squares vanish in float32."""
    torch.manual_seed(0)
    gradients = [torch.randn(shape) for shape in [(6, 9), (12,), (5, 4)]]
    plain, scaled = (spectral_direction([g * s for g in gradients], [False, False, True]) for s in (1.0, size))
    for one, other in zip(plain, scaled, strict=True):
        torch.testing.assert_close(one, other, **({"rtol": 2e-2, "atol": 2e-2} if size == 1e-42 else {}))
    power = spectral_direction([g * 2.0**-40 for g in gradients], [False, False, True])
    assert all(torch.equal(a, b) for a, b in zip(plain, power, strict=True))


def test_a_rotation_of_a_layers_inputs_and_outputs_rotates_the_direction():
    torch.manual_seed(0)
    gradient = torch.randn(6, 9, dtype=torch.float64)
    left, right = (torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))[0] for n in (6, 9))
    (plain,), (turned,) = (spectral_direction([g], [False]) for g in (gradient, left @ gradient @ right))
    torch.testing.assert_close(turned, left @ plain @ right)


def test_tables_are_embeddings_and_the_output_layer():
    model = llama(tie_word_embeddings=False)
    assert {id(p) for p in embeddings_of(model)} == {id(model.model.embed_tokens.weight), id(model.lm_head.weight)}
    assert len(embeddings_of(llama())) == 1
    assert embeddings_of(nn.Linear(2, 2)) == []
    assert [id(p) for p in outputs_of(model)] == [id(model.lm_head.weight)]
    assert [id(p) for p in outputs_of(nn.DataParallel(model))] == [id(model.lm_head.weight)]
    tied = llama()
    assert [id(p) for p in outputs_of(tied)] == [id(p) for p in embeddings_of(tied)]
    assert outputs_of(model.model) == outputs_of(nn.Linear(2, 2)) == []


def test_stacks_are_experts_and_not_convolutions():
    config = MixtralConfig(
        vocab_size=16, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=3,
    )  # fmt: skip
    experts = [layer.mlp.experts for layer in MixtralForCausalLM(config).model.layers]
    wanted = {tuple(p.shape) for expert in experts for p in expert.parameters()}
    model = MixtralForCausalLM(config)
    assert {tuple(p.shape) for p in experts_of(model)} == wanted == {(3, 24, 8), (3, 8, 12)}
    assert len(experts_of(model)) == 4
    normed = nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 4, 3))
    assert experts_of(nn.Sequential(nn.Conv1d(4, 4, 3), nn.ConvTranspose1d(4, 4, 3), normed)) == []
    positions = nn.ParameterList([nn.Parameter(torch.zeros(1, 5, 4)), nn.Parameter(torch.zeros(3, 1, 4))])
    assert experts_of(positions) == []


@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_the_matrices_of_a_stack_move_as_if_each_were_a_parameter(momentum):
    """Also what is not chosen any more stands still by itself."""
    torch.manual_seed(0)
    stack = nn.Parameter(torch.randn(3, 6, 4))
    single = [nn.Parameter(matrix.clone()) for matrix in stack.detach()]
    table, other = (nn.Parameter(torch.ones(5, 4)) for _ in range(2))
    one = ELRASpectral([stack, table], experts=[stack], embeddings=[table], momentum=momentum)
    apart = ELRASpectral([*single, other], embeddings=[other], momentum=momentum)
    for update in range(100):
        stack.grad, table.grad = torch.randn(3, 6, 4), torch.randn(5, 4)
        if update >= 15:
            stack.grad[1] = 0
        other.grad = table.grad.clone()
        for p, gradient in zip(single, stack.grad, strict=True):
            p.grad = gradient.clone()
        if update == 90:
            before = stack.detach().clone()
        for optimizer in (one, apart):
            optimizer.step(loss=1.0)
    torch.testing.assert_close(stack.detach(), torch.stack([p.detach() for p in single]))
    torch.testing.assert_close(table, other)
    assert torch.equal(stack[1], before[1])
    assert not torch.equal(stack[0], before[0])


# ---- the rule ----


def measured(update, ratio, **given):
    return Measurement(update, previous_slope_counted=2.0, current_slope_counted=2.0 * ratio, **given)


def begun(natural=1.0, **given):
    """A rule at the end of its warm-up, and its α."""
    rule, alpha = EndSlopes(**given), 1e-3
    alpha = rule.begin(Measurement(1, natural_rate=natural), alpha)
    for update in range(2, rule.warmup + 2):
        alpha = rule.propose(measured(update, 0.9), alpha)
    return rule, alpha


@pytest.mark.parametrize("lr", [1e-8, 1e-3, 1.0])
def test_a_warm_up_ends_with_what_suits_the_weights_whatever_the_first_rate(lr):
    rule = EndSlopes(10)
    alphas = [rule.begin(Measurement(1, natural_rate=1.0), lr)]
    for update in range(2, 13):
        alphas.append(rule.propose(measured(update, 0.0), alphas[-1]))
    assert alphas[0] == pytest.approx(min(lr, 51**-0.5))
    assert alphas[10] == pytest.approx(61**-0.5)
    assert alphas[11] == pytest.approx(62**-0.5)
    steps = [math.log(b / a) for a, b in itertools.pairwise(alphas[:10])]
    assert max(steps) - min(steps) < 0.02  # a straight way in log α, but for the fall


@pytest.mark.parametrize(("ratio", "most", "times"), [(0.9, 4.0, 4), (0.9, 16.0, 16), (0.3, 16.0, 4), (0.3, 2.0, 2)])
def test_slopes_that_stay_above_zero_make_alpha_larger_and_only_so_far(ratio, most, times):
    """Further if a step leaves more than half of the slope."""
    rule, alpha = begun(max_correction=most)
    for update in range(12, 50):
        alpha = rule.propose(measured(update, ratio + 0.01 * (update % 2)), alpha)
    assert alpha == pytest.approx(times * 99**-0.5)


@pytest.mark.parametrize("spread", [0.05, 0.15, 0.4])
def test_noise_alone_seldom_makes_a_correction(spread):
    """In 3 of 100 runs of 100 updates, whatever the spread of the ratios; a mean of twice the spread is soon found."""
    generator = torch.Generator().manual_seed(0)

    def corrected(mean, updates):
        rule, alpha = begun(max_correction=4.0)
        for update in range(12, 12 + updates):
            alpha = rule.propose(measured(update, mean + spread * torch.randn((), generator=generator).item()), alpha)
        return alpha > 1.01 * (50 + 11 + updates) ** -0.5

    assert 0 < sum(corrected(0.0, 100) for _ in range(200)) <= 16
    assert sum(corrected(2 * spread, 20) for _ in range(20)) == 20


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize(
    ("rows", "left", "given", "times"),
    [
        (0.8, 0.33, {}, 32),
        (0.0, 0.33, {}, 4),
        (0.8, 0.9, {}, 128),
        (0.0, 0.9, {}, 16),
        (0.8, 0.9, {"max_correction": 8}, 8),
    ],
)
def test_a_model_that_is_hardly_trained_may_go_further(rows, left, given, times, on_device):
    """Where slopes ask for it all along: every step leaves a share of its slope."""
    torch.manual_seed(0)
    matrix = torch.randn(40, 64) * torch.linspace(1 - rows, 1 + rows, 40)[:, None] / 8
    if not rows:  # a singular value stands out
        matrix += torch.outer(torch.randn(40), torch.randn(64)) / 4
    weights = nn.Parameter(matrix.double())
    optimizer = ELRASpectral([weights], on_device=on_device, restart_sigma=1e9, **given)
    twin = ReferenceSpectral([weights.detach().clone()], [False], restart_sigma=1e9, **given)
    direction, alphas = torch.randn(40, 64, dtype=torch.float64), []
    for update in range(60):
        weights.grad = direction * left**update
        optimizer.step(loss=1.0)
        twin.step(1.0, [weights.grad])
        alphas.append(optimizer.alpha)
        assert optimizer.alpha == pytest.approx(twin.alpha, rel=1e-6)
    natural = 0.008 * float(matrix.square().mean().sqrt())
    assert max(a * math.sqrt(50 + t) for t, a in enumerate(alphas, 1)) == pytest.approx(times * natural, rel=0.02)


@pytest.mark.parametrize(("left", "given", "times"), [(0.33, {}, 2), (0.9, {}, 8), (0.33, {"max_correction": 4.0}, 4)])
def test_pairs_of_lora_beside_a_trained_matrix_may_go_half_as_far(left, given, times):
    torch.manual_seed(0)
    beside = torch.randn(40, 64) / 8 + torch.outer(torch.randn(40), torch.randn(64)) / 4
    a, b = (nn.Parameter(torch.randn(*shape).double()) for shape in [(4, 64), (40, 4)])
    optimizer = ELRASpectral([a, b], adapters=[(a, b, 1.0, beside)], restart_sigma=1e9, **given)
    directions, alphas = [torch.randn_like(p) for p in (a, b)], []
    for update in range(60):
        a.grad, b.grad = (u * left**update for u in directions)
        optimizer.step(loss=1.0)
        alphas.append(optimizer.alpha * math.sqrt(50 + update + 1))
    natural = alphas[10]  # right after the warm-up
    assert max(alphas) == pytest.approx(times * natural, rel=0.02)


def test_slopes_of_examples_that_were_trained_on_make_it_no_larger():
    rule, alpha = begun(max_correction=100.0, fresh=20)
    for update in range(12, 40):
        before, alpha = alpha, rule.propose(measured(update, 0.9 + 0.01 * (update % 2)), alpha)
        if update > 20:
            assert alpha < before
    assert alpha == pytest.approx(89**-0.5)


@pytest.mark.parametrize(
    ("ratio", "more", "goes_back"),
    [(0.3, {}, True), (0.9, {}, False), (0.3, {"warmup": 0}, False), (-0.9, {}, False)],
    ids=["raised", "raised, by plain slopes", "α_0 is trusted", "made smaller"],
)
def test_after_the_first_pass_alpha_goes_back_to_what_suits_the_weights(ratio, more, goes_back):
    rule, alpha = begun(fresh=50, **more)
    for update in range(12, 51):
        alpha = rule.propose(measured(update, ratio + 0.01 * (update % 2)), alpha)
    before = alpha * 100**0.5
    assert before == pytest.approx(4) or not goes_back
    later = rule.propose(measured(51, 0.0), alpha) * 101**0.5
    assert later == pytest.approx(1 if goes_back else before)


@pytest.mark.parametrize("fresh", [None, 24])
def test_slopes_far_below_zero_take_back_what_others_added_and_no_more(fresh):
    """Also after the first pass over the data."""
    rule, alpha = begun(fresh=fresh)
    for update in range(12, 24):
        alpha = rule.propose(measured(update, 0.9 + 0.01 * (update % 2)), alpha)
    before = alpha * math.sqrt(73)
    assert before > 4.04  # else it would go back after the first pass by itself
    for update in range(24, 28):
        alpha = rule.propose(measured(update, -0.9 + 0.01 * (update % 2)), alpha)
    assert 1 < alpha * math.sqrt(77) < before / 2
    for update in range(28, 60):
        alpha = rule.propose(measured(update, -0.9 + 0.01 * (update % 2)), alpha)
    assert alpha == pytest.approx(109**-0.5)


def test_slopes_far_below_zero_leave_a_first_rate_that_is_trusted_and_small():
    rule, alpha = begun(warmup=0)
    before = alpha * math.sqrt(51)
    for update in range(3, 40):
        alpha = rule.propose(measured(update, -0.9 + 0.01 * (update % 2)), alpha)
    assert alpha * math.sqrt(89) == pytest.approx(before)


@pytest.mark.parametrize("mean", [-0.3, 0.0])
def test_what_noise_may_have_made_changes_nothing(mean):
    """Of 40 runs over 100 ratios each, none is corrected by more than once, and few are."""
    corrected = []
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        rule, alpha = begun()
        for update in range(12, 112):
            ratio = mean + 0.3 * torch.randn(1, generator=generator).item()
            alpha = rule.propose(measured(update, ratio), alpha)
        corrected.append(abs(math.log(alpha * math.sqrt(161))))
    assert sum(c > 1e-9 for c in corrected) <= 4
    assert max(corrected) < 1


def test_one_bad_batch_never_counts_for_good():
    rule, alpha = begun()
    for update, ratio in zip(range(12, 40), [0.0, -0.1, 1e9, -0.1, 0.0, -1e9] + [-0.1, 0.0] * 11, strict=True):
        alpha = rule.propose(measured(update, ratio), alpha)
    assert alpha == pytest.approx((50 + update) ** -0.5)


def test_a_step_that_a_schedule_shortened_says_nothing():
    rule, alpha = begun()
    for update in range(12, 30):
        alpha = rule.propose(measured(update, 0.9, was_full=False), alpha)
    assert alpha == pytest.approx((50 + update) ** -0.5)


# ---- one high loss ----


@pytest.mark.parametrize("stretch", [0.0, 3.0])
def test_the_first_losses_of_a_trained_model_may_differ_by_more_than_a_tenth(stretch):
    """As those of batches with a fresh head do; of a new model such a rise is a step that went too far."""
    torch.manual_seed(0)
    values = 0.05 * (torch.randn(24, 24) + stretch * torch.outer(torch.randn(24), torch.randn(24)))
    weights = nn.Parameter(values)
    optimizer = ELRASpectral([weights])
    for loss in (0.60, 0.71, 0.68, 0.73, 0.66, 0.75):
        weights.grad = torch.randn(24, 24)
        optimizer.step(loss=loss)
    assert (optimizer.restarts == 0) == (stretch > 0)


def example(**given):
    """Learn one linear map, then, from update 50 on, another; return loss, α at every update and the optimizer."""

    def seeded(seed):
        return torch.Generator().manual_seed(seed)

    inputs = torch.randn(32, 8, generator=seeded(0))
    targets = [inputs @ torch.randn(8, 8, generator=seeded(k)) * size for k, size in ((1, 0.3), (2, 3.0))]
    torch.manual_seed(0)
    model = nn.Linear(8, 8)
    optimizer, rates = ELRASpectral(model.parameters(), **given), []
    for update in range(400):
        chosen = torch.randint(0, 32, (8,), generator=seeded(update))
        loss = (model(inputs[chosen]) - targets[update >= 50][chosen]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step(loss=loss.detach())
        rates.append(optimizer.alpha)
    return loss.item(), rates, optimizer


def test_data_that_change_do_not_cost_the_rate():
    (free, free_rates, _), (loss, rates, optimizer) = example(soft_restart=False), example()
    assert loss < 2 * free
    assert 0.5 < rates[70] / rates[48] < 4
    assert 0.5 < rates[-1] / free_rates[-1] < 2
    assert optimizer.metrics["accepted_levels"] == 1
    assert optimizer.restarts == 4


# ---- the optimizer ----


def train(model, optimizer, updates, seed=0):
    rows, generator = token_rows(512), torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(updates):
        chosen = torch.randint(0, 512, (16,), generator=generator).tolist()
        tokens = torch.stack([rows[index]["input_ids"] for index in chosen])
        optimizer.zero_grad()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step(loss=loss.detach())
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_the_first_learning_rate_does_not_matter(momentum):
    found, losses = [], []
    for lr in (1e-7, 1e-4, 1e-1):
        model = llama()
        optimizer = ELRASpectral(model.parameters(), lr=lr, embeddings=embeddings_of(model), momentum=momentum)
        losses.append(train(model, optimizer, 60)[-1])
        found.append(optimizer.alpha)
    assert max(losses) < 0.2  # from 4.2
    assert max(found) < 2 * min(found)


@pytest.mark.parametrize("name", ["embeddings", "experts", "outputs"])
def test_what_is_no_list_of_parameters_is_refused(name):
    model = llama()
    for wrong in (model, model.lm_head.weight, [model.lm_head], None, 3):
        with pytest.raises(ConfigurationError, match=rf"{name} must be .* pass {name}={name}_of\(model\)"):
            ELRASpectral(model.parameters(), **{name: wrong})


def test_an_output_layer_that_is_not_among_the_embeddings_is_refused():
    model = llama()
    with pytest.raises(ConfigurationError, match=r"outputs must be among embeddings; pass embeddings=embeddings_of"):
        ELRASpectral(model.parameters(), outputs=outputs_of(model))


def test_tables_of_another_model_are_warned_of():
    model = llama()
    with pytest.warns(UserWarning, match="embeddings: none of these 1 parameters is among params") as warned:
        ELRASpectral(model.parameters(), embeddings=embeddings_of(llama()))
    assert warned[0].filename == __file__
    table = embeddings_of(model)[0].requires_grad_(False)  # as with PEFT: not among the parameters, and rightly so
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ELRASpectral([p for p in model.parameters() if p is not table], embeddings=[table])


def test_without_a_warm_up_the_first_rate_is_trusted():
    torch.manual_seed(0)
    matrix = nn.Parameter(torch.randn(16, 16))
    optimizer = ELRASpectral([matrix], lr=2e-3, warmup=0)
    rates = []
    for _ in range(20):
        matrix.grad = torch.randn(16, 16)
        optimizer.step(loss=1.0)
        rates.append(optimizer.alpha)
    assert rates == pytest.approx([2e-3 * math.sqrt(51 / (51 + k)) for k in range(20)])


def test_a_copy_takes_further_groups_and_a_refused_one_leaves_no_trace():
    optimizer = copy.deepcopy(ELRASpectral([nn.Parameter(torch.eye(3))], warmup=0))
    with pytest.raises(ConfigurationError, match="complex parameters are not supported"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2, dtype=torch.complex64))]})
    assert len(optimizer.param_groups) == 1
    added = nn.Parameter(torch.eye(3))
    optimizer.add_param_group({"params": added})
    added.grad = torch.ones(3, 3)
    optimizer.step(loss=1.0)
    assert not torch.equal(added, torch.eye(3))


def test_what_has_no_gradient_any_more_comes_to_a_stand():
    """A row of a table, a row that is seen now and then, and a whole matrix; what has gradients goes on."""
    torch.manual_seed(0)
    table, dead, alive = (nn.Parameter(torch.randn(6, 4)) for _ in range(3))
    optimizer = ELRASpectral([table, dead, alive], embeddings=[table], warmup=0)
    points = []
    for update in range(120):
        for p in (table, dead, alive):
            p.grad = torch.randn(6, 4)
        if update >= 2:
            table.grad[0], dead.grad = 0, torch.zeros(6, 4)
        if update % 20:
            table.grad[1] = 0
        optimizer.step(loss=1.0)
        points.append([p.detach().clone() for p in (table, dead, alive)])
    (table_then, dead_then, _), (table_before, _, alive_before), (table_now, dead_now, alive_now) = (
        points[k] for k in (90, -2, -1)
    )
    assert torch.equal(table_now[0], table_then[0])
    assert torch.equal(dead_now, dead_then)
    assert not torch.equal(table_now[1], table_before[1])
    assert (table_now[2:] != table_before[2:]).all()
    assert (alive_now != alive_before).all()
    assert not torch.equal(points[40][1], points[30][1])  # momentum carries it on for a while


@pytest.mark.parametrize("apart", [False, True])
def test_what_has_no_gradient_any_more_stands_still_also_in_a_group_of_its_own(apart):
    """As a Trainer's groups with and without weight decay divide parameters."""
    torch.manual_seed(0)
    dead, alive = (nn.Parameter(torch.randn(6)) for _ in range(2))
    groups = [{"params": [dead]}, {"params": [alive]}] if apart else [{"params": [dead, alive]}]
    optimizer = ELRASpectral(groups, warmup=0)
    for update in range(100):
        dead.grad, alive.grad = torch.randn(6) if update < 2 else torch.zeros(6), torch.randn(6)
        before = dead.detach().clone()
        optimizer.step(loss=1.0)
    assert torch.equal(dead, before)


def test_without_momentum_one_vector_is_kept_and_alpha_does_not_fall():
    model = llama()
    optimizer = ELRASpectral(model.parameters(), momentum=0.0, max_correction=1.0)
    train(model, optimizer, 12)
    assert {key for state in optimizer.state.values() for key in state} == {"previous_direction"}
    found = optimizer.alpha
    train(model, optimizer, 5)
    assert optimizer.alpha == found != 1e-3


def test_a_step_that_went_too_far_is_taken_back():
    x = nn.Parameter(torch.full((4, 4), 2.0))
    optimizer = ELRASpectral([x], lr=0.1, warmup=0)
    x.grad = torch.eye(4)
    optimizer.step(loss=1.0)
    after = x.detach().clone()
    direction = optimizer.state[x]["previous_direction"].clone()
    step, average = 0.1, optimizer.state[x]["momentum"].clone()
    x.grad = torch.ones(4, 4)
    optimizer.step(loss=100.0)
    assert optimizer.restarts == 1
    assert optimizer.alpha == pytest.approx(step)  # only the step is shorter
    torch.testing.assert_close(x.detach(), after + 0.9 * step * direction.float())
    assert torch.equal(optimizer.state[x]["momentum"], average)  # the bad gradient is not in it


# ---- what is kept, and in which type ----


def kept_bytes(optimizer):
    return sum(t.numel() * t.element_size() for state in optimizer.state.values() for t in state.values())


def test_state_and_mean_need_no_more_bytes_than_the_state_of_adamw():
    model = llama()
    optimizer, mean = ELRASpectral(model.parameters(), embeddings=embeddings_of(model)), WeightAverage(model, power=8)
    train(model, optimizer, 2)
    mean.add()
    of_mean = sum(t.numel() * t.element_size() for t in mean.mean.values())
    assert kept_bytes(optimizer) + of_mean == 8 * sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("dtype", "asked", "found"),
    [
        ("float32", "auto", "bfloat16"),
        ("bfloat16", "auto", "bfloat16"),
        ("float64", "auto", "float64"),
        ("float32", "float32", "float32"),
        ("bfloat16", "float32", "float32"),
        ("float64", "float32", "float64"),
        ("float64", "bfloat16", "bfloat16"),
    ],
)
def test_the_types_that_are_kept_also_over_a_checkpoint(dtype, asked, found):
    """One that was written with another type is converted; nothing is lost on the way through that of the weights."""
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, dtype=getattr(torch, dtype))) for shape in ((6, 8), (9, 4), (7,))]
    optimizer = ELRASpectral(params, embeddings=params[1:2], state_dtype=asked)
    for _ in range(2):
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step(loss=1.0)
    kept = [t for state in optimizer.state.values() for t in state.values()]
    assert {t.dtype for t in kept} == {getattr(torch, found)}
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    for how in ("auto", "float32", "bfloat16"):
        file.seek(0)
        other = ELRASpectral(params, embeddings=params[1:2], state_dtype=how)
        other.load_state_dict(torch.load(file, weights_only=True))
        wanted = kept_in(params[0], how)
        loaded = [t for state in other.state.values() for t in state.values()]
        assert all(torch.equal(a, b.to(wanted)) and a.dtype == wanted for a, b in zip(loaded, kept, strict=True))


def test_the_step_is_taken_along_what_is_kept_and_so_is_the_way_back():
    """Whatever rounding did to the direction: slopes are measured along it too."""
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(shape)) for shape in ((6, 8), (9, 4), (7,))]
    optimizer = ELRASpectral(params, embeddings=params[1:2], lr=0.1, warmup=0, lr_bounds=(1e-9, 1.0))
    starts = [p.detach().double() for p in params]
    for p in params:
        p.grad = torch.randn_like(p)
    gradients = [p.grad for p in params]
    optimizer.step(loss=1.0)
    directions = [optimizer.state[p]["previous_direction"] for p in params]
    assert {u.dtype for u in directions} == {torch.bfloat16}
    slope = sum(float((g.double() * u.double()).sum()) for g, u in zip(gradients, directions, strict=True))
    assert optimizer.param_groups[0]["scalars"]["previous_slope"] == pytest.approx(slope, rel=1e-6)
    lengths = [optimizer.alpha]
    optimizer.step(loss=1e3)
    lengths.append(optimizer.param_groups[0]["step_size"])
    assert lengths[1] < lengths[0]
    for x, start, u in zip(params, starts, directions, strict=True):
        torch.testing.assert_close(x.detach().double(), start - lengths[1] * u.double(), rtol=3e-7, atol=3e-7)


@pytest.mark.parametrize("noise", [0.0, 0.03, 3.0])
def test_an_average_in_bfloat16_follows_gradients_that_change_slowly(noise):
    """Rounding to nearest leaves it behind by a few per cent at most, less than noise does."""
    generator, x = torch.Generator().manual_seed(0), nn.Parameter(torch.zeros(40, 40))
    directions = {how: Spectral(0.9, state_dtype=how) for how in ("bfloat16", "float32")}
    states, drift = {how: {x: {}} for how in directions}, torch.randn(40, 40, generator=generator)
    for update in range(200):
        gradient = (1 + update / 200) * drift + noise * torch.randn(40, 40, generator=generator)
        for how, direction in directions.items():
            direction.averaged([x], [gradient], states[how])
    rough, exact = (states[how][x]["momentum"].float() for how in directions)
    assert (rough - exact).norm() < 0.015 * exact.norm()


def test_weight_decay_is_scaled_by_the_rate_as_in_adamw():
    torch.manual_seed(0)
    x = nn.Parameter(torch.randn(8, 8, dtype=torch.float64))
    optimizer = ELRASpectral([x], weight_decay=0.1)
    expected = x.detach().clone()
    for _ in range(25):
        x.grad = torch.zeros(8, 8, dtype=torch.float64)
        optimizer.step(loss=1.0)
        expected *= 1 - 0.1 * optimizer.alpha
    torch.testing.assert_close(x.detach(), expected)
    assert x.norm() > 0.99 * 8 * 0.8
    assert ELRASpectral([x], weight_decay=2.0).scales_weight_decay


@pytest.mark.parametrize("decay", [0.0, 0.1, 300.0])
def test_the_way_back_undoes_the_decay_too(decay):
    torch.manual_seed(0)
    x, plain = (nn.Parameter(torch.randn(4, 4, dtype=torch.float64)) for _ in range(2))
    groups = [{"params": [x], "weight_decay": decay, "lr": 5e-3}, {"params": [plain]}]
    optimizer = ELRASpectral(groups, lr=1e-2, warmup=0)
    starts = [x.detach().clone(), plain.detach().clone()]
    for loss in (1.0, 1e4, 1e4, 1.3):
        x.grad, plain.grad = torch.randn(2, 4, 4, dtype=torch.float64).unbind()
        optimizer.step(loss=loss)
        if loss == 1.0:
            directions = [optimizer.state[p]["previous_direction"].clone() for p in (x, plain)]
        length = ((starts[1] - plain.detach()) / directions[1]).mean().item()  # of the step, or of its retry
        torch.testing.assert_close(plain.detach(), starts[1] - length * directions[1])
        expected = (1 - min(length / 2 * decay, 0.5)) * starts[0] - length / 2 * directions[0]
        torch.testing.assert_close(x.detach(), expected)
    assert optimizer.restarts == 3


def test_an_update_without_a_gradient_keeps_the_average():
    def path(without):
        x, other = nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(3))
        optimizer = ELRASpectral([x, other], warmup=0)
        generator = torch.Generator().manual_seed(0)
        for number in range(6):
            gradient = torch.randn(4, 4, generator=generator)
            if number == without:
                before, average = x.detach().clone(), optimizer.state[x]["momentum"].clone()
            x.grad, other.grad = None if number == without else gradient, torch.ones(3)
            optimizer.step(loss=1.0)
            if number == without:
                assert torch.equal(x, before)
                assert torch.equal(optimizer.state[x]["momentum"], average)
                optimizer.step(loss=1e6)  # nothing of it to take back
                assert torch.equal(x, before)
        return optimizer.state[x]["momentum"]

    kept = path(without=4)
    assert torch.nn.functional.cosine_similarity(kept.flatten(), path(without=9).flatten(), dim=0) > 0.5
    assert kept.norm() > 1.2 * 0.1 * 4  # more than the last gradient alone


def test_steps_that_rounding_swallows_are_warned_of_once_and_stochastic_rounding_makes_them():
    def run(dtype, rounds):
        torch.manual_seed(0)
        x = nn.Parameter(torch.full((400, 1), 1.0, dtype=dtype))
        optimizer = ELRASpectral(
            [x], lr=1e-4, warmup=0, momentum=0.5, stochastic_rounding=rounds, lr_bounds=(1e-9, 1e-4)
        )
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            for _ in range(150):
                x.grad = torch.ones(400, 1, dtype=dtype)
                optimizer.step(loss=1.0)
        return 1 - x.detach().double().mean().item(), [str(w.message) for w in warned]

    moved, told = run(torch.bfloat16, rounds=False)
    assert moved == 0
    assert len(told) == 1
    assert "100% of the numbers stay where they are" in told[0]
    assert "stochastic_rounding=True" in told[0]
    exact, told = run(torch.float32, rounds=False)
    assert not told
    moved, told = run(torch.bfloat16, rounds=True)
    assert moved == pytest.approx(exact, rel=0.1)
    assert not told


def test_a_resumed_run_may_round_in_another_way():
    x = nn.Parameter(torch.ones(3, 3))
    optimizer = ELRASpectral([x], stochastic_rounding=True)
    optimizer.load_state_dict(ELRASpectral([x]).state_dict())
    assert optimizer.param_groups[0]["stochastic_rounding"]


@pytest.mark.parametrize("loss", [3.0, 1e3, 1e12])
def test_the_retry_is_shorter_but_still_a_step(loss):
    """However high the loss is: it may be the batch's, and then nothing would be left of the step."""
    x = nn.Parameter(torch.full((4, 4), 2.0, dtype=torch.float64))
    optimizer = ELRASpectral([x], lr=0.1, warmup=0)
    start = x.detach().clone()
    x.grad = 1e-3 * torch.eye(4, dtype=torch.float64)
    optimizer.step(loss=1.0)
    taken = x.detach() - start
    x.grad = torch.ones(4, 4, dtype=torch.float64)
    optimizer.step(loss=loss)
    again = x.detach() - start
    share = (again.norm() / taken.norm()).item()
    torch.testing.assert_close(again, share * taken)
    assert 0.0099 < share <= 0.5


@pytest.mark.parametrize("share", [0.5, 0.02])
def test_alpha_is_cropped_to_a_share_of_the_matrices_size(share):
    """Slopes that never fall, as along a straight line, make it grow; tables and vectors do not count."""
    matrix, table, vector = (
        nn.Parameter(torch.full((4, 4), 0.1)),
        nn.Parameter(torch.ones(6, 4)),
        nn.Parameter(torch.ones(5)),
    )
    params = [matrix, table, vector]
    start = [p.detach().clone() for p in params]
    optimizer = ELRASpectral(
        params, lr=share * 0.05, embeddings=[table], max_relative_step=share, max_correction=10, warmup=0
    )
    for number in range(30):
        size = matrix.detach().square().mean().sqrt().item()
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step(loss=1.0)
        if number > 8:
            assert 0.97 * share * size < optimizer.alpha < 1.00001 * share * size  # it falls between corrections
        with torch.no_grad():
            for p, value in zip(params, start, strict=True):
                p.copy_(value)


@pytest.mark.parametrize("on_device", [False, True])
def test_matrices_go_no_further_than_asked(on_device):
    """All the way in one direction, but for steps that are taken back; a resumed run counts on."""
    torch.manual_seed(0)
    matrix = nn.Parameter(torch.randn(8, 8))
    start = matrix.detach().clone()
    arguments = dict(lr=1e-2, max_drift=0.1, weights="trained", warmup=0, on_device=on_device)
    optimizer, distances = ELRASpectral([matrix], **arguments), []
    for number in range(120):
        matrix.grad = torch.eye(8)
        optimizer.step(loss=1e9 if number in (30, 31) else 1.0 + 0.01 * (number % 2))
        distances.append(((matrix.detach() - start).norm() / start.norm()).item())
        if number == 60:
            state, optimizer = optimizer.state_dict(), ELRASpectral([matrix], **arguments)
            optimizer.load_state_dict(state)
    assert optimizer.restarts > 0
    assert distances[10] > 0.04
    assert 0.09 < distances[-1] <= 0.1
    assert distances == pytest.approx(sorted(distances), abs=0.005)  # it ends gently


@pytest.mark.parametrize("on_device", [False, True])
def test_the_way_is_spread_over_a_run_whose_length_is_known(on_device):
    """All of it is used, a step from first to last falls as rates do, and what comes after the run hardly moves."""
    torch.manual_seed(0)
    matrix = nn.Parameter(torch.randn(8, 8))
    arguments = dict(lr=1.0, max_drift=0.1, weights="trained", warmup=0, on_device=on_device)
    optimizer, alphas = ELRASpectral([matrix], max_relative_step=10.0, **arguments), []
    optimizer.total_updates = 400
    size = matrix.detach().square().mean().sqrt().item()
    for _ in range(450):
        matrix.grad = torch.eye(8)
        optimizer.step(loss=1.0)
        alphas.append(optimizer.alpha)
    assert sum(alphas) == pytest.approx(0.1 * size, rel=1e-3)
    for number in (1, 100, 300):
        fallen = alphas[0] * math.sqrt(51 / (50 + number))
        assert alphas[number - 1] == pytest.approx(fallen, rel=0.02)
    assert max(alphas[400:]) <= alphas[399]


def trained_matrix(side=8):
    return nn.Parameter(torch.outer(torch.linspace(1, 9, side), torch.ones(side)) / 10)


@pytest.mark.parametrize("on_device", [False, True])
def test_a_way_that_is_used_up_too_soon_is_told_once(on_device, recwarn):
    for total in (None, 300):
        matrix = trained_matrix()
        optimizer = ELRASpectral([matrix], lr=1e-2, max_drift=0.01, weights="trained", warmup=0, on_device=on_device)
        optimizer.total_updates = total
        for _ in range(300):
            matrix.grad = torch.eye(8)
            optimizer.step(loss=1.0)
        assert optimizer.metrics["alpha"] >= 0
        told = [str(warning.message) for warning in recwarn.list]
        assert len(told) == 1  # and not of the second run
        assert re.fullmatch(r"max_drift=0.01 is used up to 95% after \d+ updates, .*total_updates = .*", told[0])


def test_weights_are_taken_for_what_they_are_said_to_be():
    torch.manual_seed(0)
    for start, looks in ((torch.randn(32, 32), False), (trained_matrix(32).detach(), True)):
        rates = {}
        for weights in ("auto", "new", "trained"):
            matrix = nn.Parameter(start.clone())
            optimizer = ELRASpectral([matrix], weights=weights, warmup=0, lr=1.0)
            assert optimizer.looks_trained is None
            matrix.grad = torch.eye(32)
            optimizer.step(loss=1.0)
            assert optimizer.looks_trained is {"auto": looks, "new": False, "trained": True}[weights]
            natural = optimizer._numbers()["rule"]["natural"]
            rates[weights] = natural
        size = start.square().mean().sqrt().item()
        assert rates["trained"] == pytest.approx(0.008 * size, rel=1e-5)
        assert rates["new"] == pytest.approx(0.2 / math.sqrt(32), rel=1e-5)
        assert rates["auto"] == rates["trained" if looks else "new"]


def test_a_bound_on_the_way_of_weights_that_look_new_is_told():
    matrix = nn.Parameter(torch.randn(32, 32))
    matrix.grad = torch.eye(32)
    with pytest.warns(UserWarning, match=r"max_drift=0.2 is for trained models.*pass weights='trained'"):
        ELRASpectral([matrix], max_drift=0.2).step(loss=1.0)


@pytest.mark.parametrize("find", [embeddings_of, outputs_of, experts_of, adapters_of])
def test_parameters_in_place_of_a_model_are_refused(find):
    with pytest.raises(ConfigurationError, match=rf"{find.__name__} takes a model, not a generator; pass"):
        find(llama().parameters())


def test_pairs_of_another_model_are_told():
    a, b = nn.Parameter(torch.randn(2, 6)), nn.Parameter(torch.zeros(8, 2))
    with pytest.warns(UserWarning, match="adapters: none of these 1 pairs is among params"):
        ELRASpectral([nn.Parameter(torch.randn(8, 6))], adapters=[(a, b, 2.0)])


def test_pairs_of_lora_have_no_bound_on_their_way():
    a, b = nn.Parameter(torch.randn(2, 6)), nn.Parameter(torch.zeros(8, 2))
    with pytest.raises(ConfigurationError, match=r"max_drift=0.1 bounds the way of trained matrices"):
        ELRASpectral([a, b], adapters=[(a, b, 2.0)], max_drift=0.1)


def test_groups_factors_and_parameters_without_gradient():
    torch.manual_seed(0)
    a, b, unused = (nn.Parameter(torch.randn(4, 4)) for _ in range(3))
    optimizer = ELRASpectral(
        [{"params": [a, unused]}, {"params": [b], "lr": 5e-4, "weight_decay": 0.1}], lr=1e-3, warmup=0
    )
    before = b.detach().clone()
    a.grad, b.grad = torch.randn(4, 4), torch.randn(4, 4)
    optimizer.step(loss=1.0)
    step = before * (1 - 0.1 * optimizer.alpha / 2) - b.detach()
    assert step.square().mean().sqrt().item() == pytest.approx(optimizer.alpha / 2, rel=1e-3)
    assert unused not in optimizer.state
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = b.detach().clone()
    optimizer.step(loss=1.0)
    assert torch.equal(b, before)


@pytest.mark.filterwarnings("ignore:ELRASpectral. the search for a learning rate")
@pytest.mark.parametrize("kind", [ELRA, ELRASpectral])
@pytest.mark.parametrize("lr", [1e-6, 1e-3])
def test_a_loss_of_terms_that_cancel_is_not_judged_by_its_rounding(kind, lr):
    """As a policy gradient's first pass: ratios are 1 and advantages have mean 0, so that the loss is ±1e-8."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = nn.Linear(8, 8)
    optimizer = kind(model.parameters(), lr=lr)
    for _ in range(40):
        log_probability = model(torch.randn(64, 8, generator=generator)).log_softmax(-1)[:, 0]
        advantage = torch.randn(64, generator=generator)
        loss = -((log_probability - log_probability.detach()).exp() * (advantage - advantage.mean())).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step(loss=loss.detach())
    assert optimizer.restarts == 0


@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_a_model_is_fine_tuned_while_alpha_stays_near_what_suits_trained_weights(momentum):
    optimizers = []
    for weights in ("new", "trained"):
        torch.manual_seed(0)
        matrix = nn.Parameter(torch.randn(32, 32))
        optimizer = ELRASpectral([matrix], weights=weights, momentum=momentum)
        assert not optimizer.fine_tunes
        for _ in range(30):
            matrix.grad = torch.randn(32, 32)
            optimizer.step(loss=1.0)
        optimizers.append(optimizer)
    new, trained = optimizers
    assert not new.fine_tunes
    assert trained.fine_tunes
    for more, near in ((3.9, True), (4.2, False)):
        numbers = trained._numbers_to_change()
        natural = numbers["rule"]["natural"] / math.sqrt(50 + (30 if momentum else 50))
        numbers["alpha"] = more * natural
        assert trained.fine_tunes is near
