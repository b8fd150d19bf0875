"""What every optimizer of this package must do, whatever it is made of; the list of them is in ``cases.py``."""

import contextlib
import copy
import functools
import importlib
import inspect
import io
import itertools
import math
import pickle
import pkgutil

import pytest
import torch
from torch import nn

import hf_elra.optim
from hf_elra.errors import ConfigurationError
from hf_elra.optim import OPTIMIZERS, LossAwareOptimizer
from lib.ready import together
from tests.conftest import llama, trainer, weights
from tests.contract.cases import CASES, step
from tests.contract.processes import two_processes

FULL = [case for case in CASES if not case.brief]
every = pytest.mark.parametrize("case", FULL, ids=[case.name for case in FULL])
each = pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])  # also those of the short list
with_twin = pytest.mark.parametrize("case", [c for c in CASES if c.twin], ids=[c.name for c in CASES if c.twin])
in_a_trainer = pytest.mark.parametrize("case", [c for c in FULL if c.optim], ids=[c.name for c in FULL if c.optim])
each_in_a_trainer = pytest.mark.parametrize(
    "case", [c for c in CASES if c.optim], ids=[c.name for c in CASES if c.optim]
)


def each_with(names, values, brief):
    """Every case with all of ``values``, those of the short list with ``brief`` alone."""
    lot = [(case, *value) for case in CASES for value in ([brief] if case.brief else values)]
    ids = ["-".join([case.name, *(str(v).removeprefix("torch.") for v in value)]) for case, *value in lot]
    return pytest.mark.parametrize(("case", *names), lot, ids=ids)


PER_GROUP = {"lr", "weight_decay"}
LAST_STEP = {"previous_direction", "previous_point"}
"""State that says how the last step is taken back."""


# ---- the list ----


def test_every_optimizer_is_on_the_list():
    for module in pkgutil.walk_packages(hf_elra.optim.__path__, "hf_elra.optim."):
        with contextlib.suppress(ImportError):  # of kernels where there is no Triton
            importlib.import_module(module.name)

    def below(kind):
        return {kind}.union(*map(below, kind.__subclasses__()))

    ours = {kind for kind in below(LossAwareOptimizer) if kind.__module__.startswith("hf_elra.")}
    complete = {kind for kind in ours if ours & below(kind) == {kind}}  # those that are nobody's base
    public = {kind for kind in vars(hf_elra.optim).values() if isinstance(kind, type) and kind in ours} - {
        LossAwareOptimizer
    }
    assert complete | public == {case.optimizer for case in CASES}
    assert {(case.optim, case.optimizer) for case in CASES if case.optim} == set(OPTIMIZERS.items())


# ---- a small training with trouble in it ----


def network(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).to(dtype)


def train(model, optimizer, numbers, events=None):
    """Updates with these numbers, each from a batch of its own; the losses."""
    events, losses = events or {}, []
    for number in numbers:
        generator = torch.Generator().manual_seed(number)
        inputs = torch.randn(16, 6, generator=generator).to(next(model.parameters()).dtype)
        optimizer.zero_grad()
        loss = (model(inputs) - inputs[:, :4] - 0.1).float().square().mean()
        loss.backward()
        happen(events.get(number, "nothing"), optimizer, loss.item())
        losses.append(loss.item())
        if number % 7 == 6:
            optimizer.end_cycle()
    return losses


def happen(event, optimizer, loss):
    """Make an update from the gradients that are there, with something that happens to it."""
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
    if event == "spike":
        loss = loss * 1e3 + 1
    elif event == "no information":
        loss = math.nan
        for gradient in gradients:
            gradient.zero_()
    elif event.endswith(" loss"):
        loss = float(event.removesuffix(" loss"))
    elif event.endswith(" gradient"):
        gradients[0].view(-1)[1] = float(event.removesuffix(" gradient"))
    elif event.endswith(" gradients"):
        for gradient in gradients:
            gradient.fill_(float(event.removesuffix(" gradients")))
    step(optimizer, loss=loss)


TROUBLE = {2: "spike", 17: "nan loss", 22: "spike", 23: "spike", 28: "nan gradient", 31: "no information"}


def kept(optimizer):
    """Everything in an optimizer's state."""
    return [v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]


def same(model, optimizer, other, other_optimizer):
    """Whether two trainings are at the same place, bit by bit."""
    return (
        torch.equal(weights(model), weights(other))
        and optimizer.metrics == other_optimizer.metrics
        and all(map(torch.equal, kept(optimizer), kept(other_optimizer)))
    )


# ---- construction ----


def one():
    return [nn.Parameter(torch.ones(2, 2))]


@pytest.mark.parametrize(
    ("case", "given", "message"),
    [(case, *wrong) for case in CASES for wrong in case.wrong],
    ids=[f"{case.name}, {next(iter(given))}" for case in CASES for given, _ in case.wrong],
)
def test_a_value_that_cannot_be_used_is_named(case, given, message):
    with pytest.raises(ConfigurationError, match=message):
        case.make(one(), **given)


@each
def test_a_value_of_a_wrong_type_is_named(case):
    for name in list(inspect.signature(case.optimizer).parameters)[1:]:
        with pytest.raises(ConfigurationError, match=name):
            case.make(one(), **{name: object()})


@every
def test_a_group_sets_its_own_rate_and_weight_decay_and_nothing_else(case):
    case.make([{"params": one(), "lr": 1e-4, "weight_decay": 0.1}])
    for name in case.make(one()).defaults.keys() & inspect.signature(case.optimizer).parameters.keys() - PER_GROUP:
        with pytest.raises(ConfigurationError, match=f"{name}=7 cannot be set for one group"):
            case.make([{"params": one(), name: 7}])
    with pytest.raises(ConfigurationError, match="weight_decay=-2"):
        case.make([{"params": one(), "weight_decay": -2}])


@every
def test_parameters_that_cannot_be_trained_are_refused(case):
    with pytest.raises(ConfigurationError, match="complex"):
        case.make([nn.Parameter(torch.zeros(2, dtype=torch.complex64))])
    embedding = nn.Embedding(10, 3, sparse=True)
    optimizer = case.make(embedding.parameters())
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse=False"):
        step(optimizer, loss=1.0)


@every
def test_it_warns_once_where_it_needs_the_loss(case, recwarn):
    model = network()
    optimizer = case.make(model.parameters())
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.ones(2, 6)).sum().backward()
        step(optimizer)
    assert sum("was not told the loss" in str(warning.message) for warning in recwarn) == case.needs_loss
    assert weights(model).isfinite().all()


# ---- the twin ----


@with_twin
@pytest.mark.parametrize("seed", range(2))
def test_it_walks_with_its_twin(case, seed):
    model = network(torch.float64, seed)
    params = list(model.parameters())
    optimizer = case.make([{"params": params[:1]}, {"params": params[1:]}])
    twin = case.twin([p.detach() for p in params], **case.arguments)
    stock_step = optimizer.step

    def both(loss):
        gradients = [p.grad.clone() for p in params]
        stock_step(loss=loss)
        twin.step(loss, gradients)
        assert (optimizer.restarts, optimizer.metrics["skipped"]) == (twin.restarts, twin.skipped)
        assert optimizer.alpha == pytest.approx(twin.alpha, rel=1e-6)
        for p, x in zip(params, twin.x, strict=True):
            torch.testing.assert_close(p.detach(), x, rtol=1e-6, atol=1e-9)
            p.data.copy_(x)  # so that rounding does not add up

    optimizer.step, end_cycle = both, optimizer.end_cycle
    optimizer.end_cycle = lambda: (end_cycle(), twin.end_cycle())
    train(model, optimizer, range(45), TROUBLE)
    assert optimizer.restarts > 3


# ---- state ----


@each_with(
    ("dtype", "at"), list(itertools.product([torch.float32, torch.bfloat16], [5, 24, 29])), brief=(torch.float32, 24)
)
def test_a_saved_state_goes_on_bit_for_bit(case, dtype, at):
    """In a warm-up if there is one, after two retries, and after a NaN."""
    model = network(dtype)
    optimizer = case.make(model.parameters(), stochastic_rounding=dtype == torch.bfloat16)
    train(model, optimizer, range(at), TROUBLE)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = network(dtype, seed=1)
    other_optimizer = case.make(other.parameters(), stochastic_rounding=dtype == torch.bfloat16)
    other.load_state_dict(saved["model"])
    other_optimizer.load_state_dict(saved["optimizer"])
    for further in (model, optimizer), (other, other_optimizer):
        train(*further, range(at, 45), TROUBLE)
    assert optimizer.restarts > 3
    assert same(model, optimizer, other, other_optimizer)


@every
@pytest.mark.parametrize("how", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))], ids=["copy", "pickle"])
@pytest.mark.parametrize("at", [5, 24])
def test_a_copy_goes_on_like_the_original(case, how, at):
    model = network()
    optimizer = case.make(model.parameters())
    train(model, optimizer, range(at), TROUBLE)
    other, other_optimizer = how((model, optimizer))
    for further in (model, optimizer), (other, other_optimizer):
        train(*further, range(at, 45), TROUBLE)
    assert same(model, optimizer, other, other_optimizer)


@every
def test_the_state_of_another_optimizer_or_model_is_refused(case):
    others = {other.optimizer: other for other in CASES if other.optimizer is not case.optimizer}
    for other in (torch.optim.AdamW(one()), *(o.make(one()) for o in others.values())):
        with pytest.raises(ConfigurationError, match=f"it was not written by {case.optimizer.__name__}"):
            case.make(one()).load_state_dict(other.state_dict())
    model = network()
    optimizer = case.make(model.parameters())
    train(model, optimizer, range(3))
    with pytest.raises(ConfigurationError, match=r"of parameter 0 has shape \(8, 6\), but that parameter has \(2, 2\)"):
        case.make([p for _ in range(4) for p in one()]).load_state_dict(optimizer.state_dict())


# ---- trouble ----


@each_with(
    ("event",),
    [(f"{bad} {what}",) for bad in ("nan", "inf", "-inf") for what in ("loss", "gradient", "gradients")],
    brief=("nan gradient",),
)
def test_what_is_not_finite_reaches_neither_weights_nor_state(case, event):
    for when in (0, 4, 15):
        model = network()
        optimizer = case.make(model.parameters(), soft_restart=False)
        for number in range(when + 4):
            train(model, optimizer, [number], {when: event})
            assert all(tensor.isfinite().all() for tensor in [weights(model), *kept(optimizer)])
        assert optimizer.metrics["non_finite"] == optimizer.restarts == 1


@every
def test_what_stays_not_finite_is_an_error(case):
    model = network()
    optimizer = case.make(model.parameters())
    train(model, optimizer, range(3))
    before = optimizer.restarts
    with pytest.raises(RuntimeError, match="non-finite over 20 updates in a row"):
        train(model, optimizer, range(3, 200), dict.fromkeys(range(3, 200), "nan loss"))
    assert optimizer.restarts == before + 19
    assert weights(model).isfinite().all()


EVENTS = {
    "spike": ["spike"],
    "small spike": ["small spike"],
    "NaN loss": ["nan loss"],
    "NaN gradient": ["nan gradient"],
    "no information": ["no information"],
    "two spikes": ["spike", "nothing", "spike"],
    "three spikes": ["spike"] * 3,
    "dirty data": ["dirty"],
    "new level": ["level"],
}


@functools.cache
def rates_with(case, event, when, seed):
    """α after every update of a noisy linear regression, in which something happens from ``when`` on."""
    generator = torch.Generator().manual_seed(seed)
    matrix = nn.Parameter(torch.randn(16, 16, generator=generator))
    target = torch.randn(16, 16, generator=generator)
    further = {"max_first_step": None} if "max_first_step" in inspect.signature(case.optimizer).parameters else {}
    optimizer, rates, level = case.make([matrix], **further), [], 1.0
    events = EVENTS.get(event, [])
    for number in range(when + len(events) + 20 if events else 65):
        inputs = torch.randn(32, 16, generator=generator)
        wanted = inputs @ target + 3 * torch.randn(32, 16, generator=generator)
        now = events[number - when] if 0 <= number - when < len(events) else "nothing"
        if now == "dirty":
            wanted = 100 * torch.randn(32, 16, generator=generator)
        level = 30.0 if now == "level" else level
        loss = (inputs @ matrix - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        happen(now, optimizer, loss.item() * level * (3.0 if now == "small spike" else 1.0))
        rates.append(optimizer.alpha)
    assert matrix.isfinite().all()
    return rates


@every
@pytest.mark.parametrize("event", EVENTS)
def test_the_rate_is_back_twenty_updates_after_any_event(case, event):
    """Where it was, or where it would have gone by itself; after several events at least where it was."""
    for when, seed in ((1, 0), (9, 1), (22, 0), (34, 1)):
        without, with_ = rates_with(case, "nothing", 0, seed), rates_with(case, event, when, seed)
        after = when + len(EVENTS[event]) - 1 + 20
        lowest, highest = min(with_[when - 1], without[after]), max(without[when - 1 : after + 1])
        assert with_[after] > 0.49 * lowest, (when, seed)
        if len(EVENTS[event]) == 1:
            assert with_[after] < 2.01 * highest, (when, seed)


@every
@pytest.mark.parametrize("loss", [3.0, 1e3, 1e12])
def test_the_retry_is_shorter_but_still_a_step(case, loss):
    """However high the loss is: it may be the batch's, and then nothing would be left of the step."""
    (x,) = one()
    optimizer, start = case.make([x], weight_decay=0.0), x.detach().clone()
    x.grad = 1e-3 * torch.eye(2)
    step(optimizer, loss=1.0)
    taken = x.detach() - start
    x.grad = torch.ones(2, 2)
    step(optimizer, loss=loss)
    again = x.detach() - start
    share = (again.norm() / taken.norm()).item()
    assert optimizer.restarts == 1
    assert 0.099 < share < 0.501
    torch.testing.assert_close(again, share * taken, rtol=1e-3, atol=1e-6)


@every
def test_a_step_is_cropped_to_a_share_of_the_weights(case):
    """Slopes that never fall, as along a straight line, make α grow until it is."""
    x = nn.Parameter(torch.full((4, 4), 5.0))
    optimizer = case.make([x], max_relative_step=0.005)
    for _ in range(40):
        length = x.norm().item()
        x.grad = torch.ones(4, 4)
        step(optimizer, loss=1.0)
        assert optimizer.metrics["step_norm"] < 0.00501 * length
    if case.grows:
        assert optimizer.metrics["step_norm"] == pytest.approx(0.005 * length, rel=2e-2)


# ---- parameters of all kinds ----


@every
def test_frozen_unused_empty_and_scalar_parameters(case):
    torch.manual_seed(0)
    frozen, unused, empty = torch.ones(2), nn.Parameter(torch.ones(3)), nn.Parameter(torch.empty(0, 4))
    scalar, turned = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.randn(2, 3).t())
    optimizer = case.make([frozen, unused, empty, scalar, turned])
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = scalar**2 + (turned**2).sum() + empty.sum()
        loss.backward()
        step(optimizer, loss=loss)
        losses.append(loss.item())
    assert torch.equal(unused, torch.ones(3))
    assert torch.equal(frozen, torch.ones(2))
    assert losses[-1] < 0.9 * losses[0]


@every
@pytest.mark.parametrize("when", [3, 25])
def test_a_parameter_without_a_gradient_for_one_update_stays_and_so_does_its_state(case, when):
    model = network()
    optimizer = case.make(model.parameters())
    train(model, optimizer, range(when))
    p = model[2].weight

    def state_of_p():
        return {key: value.clone() for key, value in optimizer.state.get(p, {}).items() if key not in LAST_STEP}

    before, state = p.detach().clone(), state_of_p()
    for loss in (1e-3, 1e6):  # after which nothing of it is to be taken back
        optimizer.zero_grad()
        model(torch.ones(2, 6)).square().mean().backward()
        p.grad = None
        step(optimizer, loss=loss)
        assert torch.equal(p, before)
        now = state_of_p()
        assert now.keys() >= state.keys()
        assert all(torch.equal(now[key], value) for key, value in state.items())
    train(model, optimizer, range(when, when + 2))
    assert not torch.equal(p, before)


# ---- groups, schedules, gradient decay ----


@every
def test_the_path_does_not_depend_on_the_grouping(case):
    ends = []
    for cuts in ([4], [1, 3], [1, 1, 1, 1]):
        model = network(torch.float64)
        params = iter(model.parameters())
        optimizer = case.make([{"params": list(itertools.islice(params, size))} for size in cuts])
        train(model, optimizer, range(45), TROUBLE)
        ends.append(weights(model))
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(ends[0], ends[2], rtol=1e-9, atol=1e-12)


def twin_steps(case, change):
    """Steps and rates of two equal optimizers, the second of which was changed, from where training has led them."""
    found = []
    for changes in (False, True):
        model = network(torch.float64)
        params = list(model.parameters())
        optimizer = case.make([{"params": params[:2]}, {"params": params[2:]}], weight_decay=0.0)
        train(model, optimizer, range(30))
        if changes:
            change(optimizer)
        before = [p.detach().clone() for p in params]
        train(model, optimizer, [30])
        found.append([(p.detach() - q) / optimizer.alpha for p, q in zip(params, before, strict=True)])
    return found


@every
def test_a_groups_rate_is_its_share_and_zero_is_a_standstill(case):
    for share in (0.5, 0.0):

        def change(optimizer, share=share):
            optimizer.param_groups[1]["lr"] *= share

        whole, part = twin_steps(case, change)
        assert not torch.equal(whole[0], torch.zeros_like(whole[0]))
        for number, (a, b) in enumerate(zip(whole, part, strict=True)):
            torch.testing.assert_close(b, a * (share if number > 1 else 1.0))


@every
def test_gradient_decay_shortens_the_step(case):
    def change(optimizer):
        optimizer.gradient_decay = 0.25

    for whole, part in zip(*twin_steps(case, change), strict=True):
        torch.testing.assert_close(part, 0.25 * whole)


# ---- bfloat16 ----


@every
@pytest.mark.parametrize("rounds", [False, True])
def test_bfloat16_is_trained(case, rounds):
    ends = []
    for _ in range(2):
        model = network(torch.bfloat16)
        optimizer = case.make(model.parameters(), stochastic_rounding=rounds)
        losses = train(model, optimizer, range(60), TROUBLE)
        ends.append(weights(model))
    assert ends[0].dtype == torch.bfloat16
    assert torch.equal(*ends)
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


# ---- torch.compile, processes, Trainer, LoRA ----


@every
def test_in_a_compiled_training_step(case, caplog):
    """The step is left out of the compiled graphs: same path, and nothing is compiled for every parameter."""

    def training_step(model, optimizer, inputs):
        loss = (model(inputs) - inputs.sum(1, keepdim=True)).square().mean()
        loss.backward()
        step(optimizer, loss=loss.detach())
        optimizer.zero_grad()

    torch.compiler.reset()  # every case compiles the same function anew, and there is a limit to that
    ends = []
    for way in (training_step, torch.compile(training_step, backend="eager")):
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(n, n + 1) for n in range(2, 14)))
        optimizer = case.make(model.parameters())
        for number in range(5):
            way(model, optimizer, torch.randn(4, 2, generator=torch.Generator().manual_seed(number)))
        ends.append((model, optimizer))
    assert same(*ends[0], *ends[1])
    assert "recompile_limit" not in caplog.text


on_two_processes = functools.cache(lambda: together(two_processes, 2))


@every
def test_two_processes_stay_alike_whatever_one_of_them_meets(case):
    assert on_two_processes()[case.name]["differing"] == 0


@every
def test_shards_are_trained_or_refused(case):
    told = on_two_processes()[case.name]["shards"]
    assert told == "finite" if case.takes_shards else "DTensor" in told


@each_in_a_trainer
def test_a_resumed_training_goes_on_bit_for_bit(case, tmp_path):
    given = dict(optim=case.optim, optim_args=case.optim_args, max_steps=22, save_strategy="steps", save_steps=7)
    whole = trainer(tmp_path, **given)
    whole.train()
    checkpoint = min(tmp_path.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    again = trainer(tmp_path / "again", **given)
    again.train(resume_from_checkpoint=str(checkpoint))
    assert torch.equal(weights(whole.model), weights(again.model))
    assert again.elra_optimizer.metrics == whole.elra_optimizer.metrics


@in_a_trainer
def test_lora_alone_is_trained(case, tmp_path):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(llama(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer(tmp_path, model=model, optim=case.optim, optim_args=case.optim_args, max_steps=30).train()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if "lora_" in name}
    assert all(p.isfinite().all() for p in model.parameters())
