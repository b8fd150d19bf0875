"""What only tests run on several processes, by ``lib.ready.together``."""

import contextlib
import copy
import itertools
import os
import warnings
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback

from hf_elra import ELRA, ELRASpectral, ElraTrainer
from hf_elra.errors import ConfigurationError
from hf_elra.optim import exchange, shards
from hf_elra.optim.directions.spectral import spectral_direction
from hf_elra.optim.tensors import local
from lib.many_processes import flat_weights, network, same_everywhere
from tests.conftest import arguments, llama, logged, token_rows, vit, vit_rows


def one_reads_garbage():
    """A NaN that one process alone sees, after gradients met; with and without kernels (in Triton's interpreter)."""
    dist.init_process_group("gloo")
    return [broken_on_one(kernels) for kernels in (False, True)]


def broken_on_one(kernels):
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    optimizer = ELRA(model.parameters(), fused=kernels)
    optimizer.process_group = dist.group.WORLD
    differing = 0
    for number in range(12):
        inputs = torch.randn(16, 4, generator=torch.Generator().manual_seed(number))
        optimizer.zero_grad()
        loss = (model(inputs) - inputs[:, :3]).square().mean()
        loss.backward()
        if number in (3, 7, 8) and dist.get_rank() == 1:
            model.bias.grad[1] = float("nan")
        optimizer.step(loss=loss)
        differing += not same_everywhere(flat_weights(model))
    finite = bool(flat_weights(model).isfinite().all())
    return {"differing": differing, "finite": finite, "non_finite": optimizer.metrics["non_finite"]}


def bare_loops():
    """DDP in a loop of the user's own, where every process has its own data and one meets outliers alone."""
    dist.init_process_group("gloo")
    return {
        f"{kind.__name__}, {'told the group' if told else 'alone'}": bare_loop(kind, told)
        for kind in (ELRA, ELRASpectral)
        for told in (True, False)
    }


def bare_loop(kind, told):
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    together = nn.parallel.DistributedDataParallel(model)
    optimizer = kind(model.parameters())
    if told:
        optimizer.process_group = dist.group.WORLD
    differing = 0
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for number in range(40):
            data = torch.randn(16, 7, generator=torch.Generator().manual_seed(2 * number + dist.get_rank()))
            outlier = 1000.0 if number in (20, 30) and dist.get_rank() == 1 else 1.0
            optimizer.zero_grad()
            loss = outlier * (together(data[:, :4]) - data[:, :3] - data[:, 4:]).square().mean()
            loss.backward()
            optimizer.step(loss=loss)
            differing += not same_everywhere(flat_weights(model))
    texts = [str(warning.message) for warning in warned]
    return {
        "differing": differing, "restarts": optimizer.restarts, "warnings": sum("process_group" in t for t in texts),
    }  # fmt: skip


def events_on_one():
    """What one process alone meets: processes stay alike, and α is soon where it is without."""
    dist.init_process_group("gloo")
    events = "spike", "nan_loss", "nan_gradient", "nothing"
    kinds = {"ELRA": ELRA, "ELRASpectral": ELRASpectral}
    return {name: {event: rate_after(kind, event) for event in ("plain", *events)} for name, kind in kinds.items()}


def rate_after(kind, event):
    torch.manual_seed(0)
    model = nn.Linear(16, 16)
    together = nn.parallel.DistributedDataParallel(model)
    optimizer = kind(model.parameters())
    optimizer.process_group = dist.group.WORLD
    differing = 0
    for number in range(51):
        data = torch.randn(16, 48, generator=torch.Generator().manual_seed(2 * number + dist.get_rank()))
        optimizer.zero_grad()
        happens = number == 30 and dist.get_rank() == 1
        nothing = happens and event == "nothing"
        outputs = together(data[:, :16])
        loss = (outputs - data[:, :16] - 3 * data[:, 16:32]).square().mean() * (0.0 if nothing else 1.0)
        loss.backward()
        told = loss.detach().clone()
        if happens and event in ("nan_loss", "nothing"):
            told.fill_(float("nan"))
        elif happens and event == "spike":
            told.mul_(1e4)
        elif happens and event == "nan_gradient":
            model.bias.grad[1] = float("nan")
        optimizer.step(loss=told)
        differing += not same_everywhere(flat_weights(model))
    return {"alpha": optimizer.alpha, "differing": differing, "restarts": optimizer.restarts}


class Mixture(nn.Module):
    """An embedding, a convolution, experts, vectors: sizes that two and four processes do not divide."""

    def __init__(self):
        super().__init__()
        self.table, self.convolution = nn.Embedding(7, 6), nn.Conv1d(6, 9, 3)
        self.experts = nn.Parameter(torch.randn(3, 9, 6) / 3)
        self.up, self.down = nn.Linear(6, 20), nn.Linear(20, 3)

    def forward(self, tokens):
        hidden = self.convolution(self.table(tokens).mT).mT.tanh()
        expert = self.experts[int(tokens[0, 0]) % 3]
        return self.down(torch.tanh(self.up(hidden @ expert)))


def last_even_dimension(parameter):
    """Where FSDP2 splits a parameter among two: other dimensions than the first it splits evenly alone."""
    return Shard(max(d for d, size in enumerate(parameter.shape) if d == 0 or size % 2 == 0))


SPLITS = {
    "copies": lambda model, mesh: None,
    "rows": lambda model, mesh: fully_shard(model, mesh=mesh),
    "columns": lambda model, mesh: fully_shard(model, mesh=mesh, shard_placement_fn=last_even_dimension),
    "tensor": lambda model, mesh: parallelize_module(model, mesh, TENSOR_PARALLEL),
    "tensor and rows": lambda model, mesh: fully_shard(
        parallelize_module(model, mesh["shard"], TENSOR_PARALLEL), mesh=mesh["replicate"]
    ),
}
TENSOR_PARALLEL = {
    "table": ColwiseParallel(output_layouts=Replicate()),
    "up": ColwiseParallel(),
    "down": RowwiseParallel(),
}


def spectral_on_shards(cases):
    """Of every case (shape of the mesh, how a model is split, momentum, decisions on the device): how far shards come
    from one process."""
    dist.init_process_group("gloo")
    return [spectral_beside_one(*case) for case in cases]


def spectral_beside_one(shape, split, momentum, on_device=False):
    """Fifty updates with spikes, a NaN on one process, and tokens and experts that are not seen any more."""
    mesh = init_device_mesh("cpu", tuple(shape), mesh_dim_names=("replicate", "shard")[-len(shape) :])
    torch.manual_seed(0)
    plain = Mixture().double()
    parted = copy.deepcopy(plain)
    SPLITS[split](parted, mesh)
    one, other = (
        ELRASpectral(model.parameters(), momentum=momentum, embeddings=[model.table.weight], experts=[model.experts],
                     weight_decay=0.1, on_device=where)
        for model, where in ((plain, False), (parted, on_device))
    )  # fmt: skip
    other.process_group = dist.group.WORLD
    rank, processes, differing, reductions = dist.get_rank(), dist.get_world_size(), 0, set()
    for number in range(50):
        generator = torch.Generator().manual_seed(number)
        tokens = torch.randint(0, 7 if number < 10 else 4, (4, 5), generator=generator)
        tokens[:, 0] = number % 3 if number < 10 else 1
        targets = torch.randn(4, 3, 3, generator=generator).double() / 2 + 1
        part = slice(rank * 4 // processes, (rank + 1) * 4 // processes) if "tensor" not in split else slice(None)
        for model, optimizer, own in ((plain, one, slice(None)), (parted, other, part)):
            optimizer.zero_grad()
            (model(tokens[own]) - targets[own]).square().mean().backward()
            whole_loss = (plain(tokens) - targets).square().mean().item()
            if split == "copies" and model is parted:
                for p in model.parameters():
                    dist.all_reduce(p.grad)
                    p.grad /= processes
            if number == 30 and rank == processes - 1 and model is parted:
                local(model.up.weight.grad).view(-1)[:1] = float("nan")
            elif number == 30 and model is plain:
                model.up.weight.grad[-1, -1] = float("nan")
            with Reductions() as counted:
                optimizer.step(loss=whole_loss * (50 if number in (13, 14, 40) else 1))
        reductions.add(counted.number if number else 1)  # the first update looks at the weights
        differing += not same_everywhere(flat_weights(parted))
    names = "alpha", "restarts", "non_finite"
    return {
        "apart": (flat_weights(plain) - flat_weights(parted)).abs().max().item(),
        "numbers": [[optimizer.metrics[name] for name in names] for optimizer in (one, other)],
        "differing": differing,
        "reductions": sorted(reductions),
    }


class Adapted(nn.Module):
    """A frozen layer, of which a singular value stands out if it is stretched, a pair of LoRA beside it, and a head."""

    def __init__(self, stretch):
        super().__init__()
        self.base = nn.Linear(40, 33, bias=False).requires_grad_(False)
        self.base.weight.data += stretch
        self.first, self.second = nn.Linear(40, 3, bias=False), nn.Linear(3, 33, bias=False)
        self.head = nn.Linear(33, 9)
        nn.init.zeros_(self.second.weight)

    def forward(self, inputs):
        return self.head(self.base(inputs) + 2 * self.second(self.first(inputs)))

    def pairs(self):
        return [(self.first.weight, self.second.weight, 2.0, self.base.weight)]


def adapters_on_shards(stretches):
    """Of every stretch of the frozen weights, split by FSDP2 as all others: bounds and path beside one process."""
    dist.init_process_group("gloo")
    return [adapters_beside_one(stretch) for stretch in stretches]


def adapters_beside_one(stretch):
    torch.manual_seed(0)
    plain = Adapted(stretch).double()
    parted = fully_shard(copy.deepcopy(plain), mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    one, other = (
        ELRASpectral([p for p in model.parameters() if p.requires_grad], adapters=model.pairs())
        for model in (plain, parted)
    )
    other.process_group = dist.group.WORLD
    for number in range(30):
        inputs = torch.randn(16, 40, generator=torch.Generator().manual_seed(number)).double()
        for model, optimizer in ((plain, one), (parted, other)):
            optimizer.zero_grad()
            loss = (model(inputs) - inputs[:, :9]).square().mean()
            loss.backward()
            optimizer.step(loss=loss)
    return {
        "apart": (flat_weights(plain) - flat_weights(parted)).abs().max().item(),
        "alpha": [optimizer.alpha for optimizer in (one, other)],
        "room": [optimizer.parts().rule.usually for optimizer in (one, other)],
        "split": type(parted.base.weight).__name__,
    }


def checkpoint_of_shards(folder):
    """A bare loop with FSDP2 in float32, saved after three of six updates and gone on from by others: whether both end
    at the same bits, and the types of the state."""
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))

    def made():
        torch.manual_seed(0)
        model = Mixture()
        fully_shard(model, mesh=mesh)
        optimizer = ELRASpectral(model.parameters(), embeddings=[model.table.weight], experts=[model.experts])
        optimizer.process_group = dist.group.WORLD
        return model, optimizer

    def train(model, optimizer, numbers):
        for number in numbers:
            tokens = torch.randint(0, 7, (4, 5), generator=torch.Generator().manual_seed(number))
            optimizer.zero_grad()
            loss = model(tokens).square().mean()
            loss.backward()
            optimizer.step(loss=loss.detach())

    model, optimizer = made()
    train(model, optimizer, range(3))
    saved = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    checkpoint.save(saved, checkpoint_id=folder)
    train(model, optimizer, range(3, 6))
    other, other_optimizer = made()
    loaded = dict(zip(("model", "optimizer"), get_state_dict(other, other_optimizer), strict=True))
    checkpoint.load(loaded, checkpoint_id=folder)
    set_state_dict(other, other_optimizer, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
    train(other, other_optimizer, range(3, 6))
    kept = [t for state in other_optimizer.state.values() for t in state.values()]
    return {
        "same": torch.equal(flat_weights(model), flat_weights(other)),
        "types": sorted({f"{type(t).__name__} {t.dtype}" for t in kept}),
    }


def bfloat16_on_shards(on_device=False):
    """Five updates with stochastic rounding, of a vector that two processes cannot split evenly, of one that is copied,
    and of one that is no DTensor: whether copies are alike, how far all have come, and whether parts are alike."""
    dist.init_process_group("gloo")
    mesh, ends = init_device_mesh("cpu", (2,)), []
    for resumes in (False, True):
        made = [torch.ones(8001), torch.ones(4001), torch.ones(3000)]
        placements = [[Shard(0)], [Replicate()], None]
        params = [
            nn.Parameter(t.bfloat16() if p is None else distribute_tensor(t.bfloat16(), mesh, p))
            for t, p in zip(made, placements, strict=True)
        ]
        given = dict(lr=2e-4, warmup=0, momentum=0.0, stochastic_rounding=True, on_device=on_device)
        optimizer = ELRASpectral(params, **given)
        optimizer.process_group = dist.group.WORLD
        for number in range(5):
            for p in params:
                p.grad = torch.ones_like(p)
            optimizer.step(loss=1.0)
            if resumes and number == 2:
                state, optimizer = optimizer.state_dict(), ELRASpectral(params, **given)
                optimizer.process_group = dist.group.WORLD
                optimizer.load_state_dict(state)
        split, copied, plain = params
        whole = split.full_tensor().detach().float()
        ends.append(torch.cat([whole.view(-1), copied.to_local().detach().view(-1), plain.detach()]))
    moved = [float(1 - t.float().mean()) for t in (whole, copied.full_tensor(), plain)]
    copies = torch.cat([copied.to_local().detach().view(-1), plain.detach()])
    return {
        "copies": same_everywhere(copies),
        "moved": moved,
        "alike": float((whole[:4000] == whole[4001:]).float().mean()),
        "chance": float((whole[:4000] == whole[:4000].flip(0)).float().mean()),
        "resumed": torch.equal(*ends),
    }


class Moved(TorchDispatchMode):
    """Counts the bytes that an all-gather or an all-to-all brings to this process, its own among them."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.name() in ("c10d::_allgather_base_", "c10d::alltoall_base_"):
            self.bytes += args[0].nbytes
        return result


class Reductions(TorchDispatchMode):
    """Counts all-reduces."""

    def __init__(self):
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.number += "allreduce" in str(function.name())
        return function(*args, **(kwargs or {}))


def copies_share_polar_factors(shapes, types):
    """Of every type of weights and state: whether weights differ from those of a process that does all, and the bytes
    of an update."""
    dist.init_process_group("gloo")
    return [beside_all_on_each(shapes, getattr(torch, dtype), state_dtype) for dtype, state_dtype in types]


def beside_all_on_each(shapes, dtype, state_dtype):
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]
    ours = [[nn.Parameter(t.clone()) for t in weights] for _ in range(2)]
    optimizers = [
        ELRASpectral(params, distribute=how, experts=[p for p in params if p.dim() == 3], state_dtype=state_dtype)
        for params, how in zip(ours, ("auto", "off"), strict=True)
    ]
    moved, differing = [Moved(), Moved()], 0
    for _ in range(5):
        gradients = [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]
        for params, optimizer, counter in zip(ours, optimizers, moved, strict=True):
            optimizer.process_group = dist.group.WORLD
            for p, gradient in zip(params, gradients, strict=True):
                p.grad = gradient.clone()
            with counter:
                optimizer.step(loss=1.0)
        flat = [torch.cat([p.detach().reshape(-1) for p in params]) for params in ours]
        differing += not torch.equal(*flat) or not same_everywhere(flat[0])
    return {"differing": differing, "moved": [counter.bytes / 5 for counter in moved]}


def gloo_stays_on_the_host():
    """What gloo can move; what an update moves where it cannot; the error for parts that it would have to move."""
    dist.init_process_group("gloo")
    able = [shards.can_move(dist.group.WORLD, device) for device in ("cpu", "cuda")]
    with mock.patch.object(shards, "can_move", return_value=False):
        copies = beside_all_on_each([(8, 4), (6,)], torch.float32, "auto")
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        split = nn.Parameter(distribute_tensor(torch.ones(8, 4), mesh, [Shard(0)]))
        split.grad = torch.ones_like(split)
        try:
            ELRASpectral([split]).step(loss=1.0)
        except ConfigurationError as error:
            return {"able": able, "copies": copies, "error": str(error)}
    return None


def split_matrices_are_sent(numbers, rows, columns, types):
    """Of every number of matrices and type of state: the bytes that an update brings to all processes together."""
    dist.init_process_group("gloo")
    mesh, found = init_device_mesh("cpu", (dist.get_world_size(),)), []
    for number, state_dtype in itertools.product(numbers, types):
        made = [torch.randn(rows, columns, generator=torch.Generator().manual_seed(k)) for k in range(number)]
        params = [nn.Parameter(distribute_tensor(t, mesh, [Shard(0)])) for t in made]
        optimizer, counter = ELRASpectral(params, state_dtype=state_dtype), Moved()
        for update in range(3):
            for p in params:
                p.grad = torch.ones_like(p)
            with counter if update else contextlib.nullcontext():  # the first one looks at whole matrices, too
                optimizer.step(loss=1.0)
        moved = torch.tensor(float(counter.bytes))
        dist.all_reduce(moved)
        found.append(moved.item() / 2)
    return found


def experts_split_twice():
    """Directions of experts that are split between processes, and within themselves among others; and of copies of
    experts that others have: how far they are from those of one process."""
    dist.init_process_group("gloo")
    mesh, apart = init_device_mesh("cpu", (2, 2)), []
    experts = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    (expected,) = spectral_direction([experts], [False], [True])
    for placements in ([Shard(0), Shard(1)], [Shard(2), Shard(0)], [Replicate(), Shard(0)], [Shard(1), Shard(1)]):
        (found,) = spectral_direction([distribute_tensor(experts, mesh, placements)], [False], [True])
        apart.append((found.full_tensor() - expected).abs().max().item())
    # Some processes have an expert and others none; other matrices are exchanged among all.
    shapes, placements = [(5, 4), (1, 5, 4), (6, 4), (7, 4)], [Shard(0), Shard(1)]
    generator = torch.Generator().manual_seed(1)
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    flags = [False] * len(shapes), [t.dim() == 3 for t in tensors]
    wholes = spectral_direction(tensors, *flags)
    found = spectral_direction([distribute_tensor(t, mesh, placements) for t in tensors], *flags, batch=1)
    return apart + [(f.full_tensor() - w).abs().max().item() for f, w in zip(found, wholes, strict=True)]


def transfers_go_on_meanwhile(split):
    """What a process does with five batches of matrices that are copied, or split by rows: (what, which), in turn."""
    dist.init_process_group("gloo")
    mesh, events, sent = init_device_mesh("cpu", (2,)), [], itertools.count()

    def recorded(transfer):
        def call(*args, **kwargs):
            number = next(sent)
            events.append(("sent", number))
            work = transfer(*args, **kwargs)
            return mock.Mock(wait=lambda: (events.append(("arrived", number)), work.wait()))

        return call

    def compute(batch):
        events.append(("computed", len(batch)))
        return 2 * batch

    whole = [torch.full((4, 3), float(k)) for k in range(10)]
    placements = (Shard(0) if split else Replicate(),)
    parts = [distribute_tensor(t, mesh, placements).to_local() for t in whole]
    pieces = [exchange.Piece(part, (4, 3), mesh, placements) for part in parts]
    with (
        mock.patch.object(dist, "all_to_all_single", recorded(dist.all_to_all_single)),
        mock.patch.object(dist, "all_gather_into_tensor", recorded(dist.all_gather_into_tensor)),
    ):
        results = exchange.each_once(pieces, compute, most=12)
    right = all(torch.equal(result, 2 * part) for result, part in zip(results, parts, strict=True))
    return {"right": right, "events": events}


def sharded_offload():
    """The error for a memory layout that cannot be sharded."""
    dist.init_process_group("gloo")
    model = fully_shard(network(), mesh=init_device_mesh("cpu", (2,)))
    optimizer = ELRA(model.parameters(), memory="offload")
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    try:
        optimizer.step(loss=1.0)
    except ValueError as error:
        return str(error)


def accelerate_shards_on_cpu():
    """Let Accelerate use FSDP without a GPU, for which it takes DDP otherwise: for gloo both are the same to it."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    stock = PartialState.__init__

    def patched(self, *args, **kwargs):
        stock(self, *args, **kwargs)
        if self._shared_state.get("distributed_type") == DistributedType.MULTI_CPU:
            self._shared_state["distributed_type"] = DistributedType.MULTI_GPU

    PartialState.__init__ = patched


def fsdp_trainer(folder, resume=None, state="SHARDED_STATE_DICT", optim="elra"):
    """Ten updates of a Trainer with FSDP2 through Accelerate, checkpoint after five; or go on from one."""
    accelerate_shards_on_cpu()
    processes = int(os.environ["WORLD_SIZE"])
    settings = {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"], "state_dict_type": state}
    trainer = ElraTrainer(
        llama().double(),
        arguments(
            f"{folder}/{state}-{processes}", fsdp=True, fsdp_config=settings, save_strategy="steps", save_steps=5,
            per_device_train_batch_size=8 // processes, elra_control_cycle="2ba", optim=optim,
        ),
        train_dataset=token_rows(),
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    return {
        "sharded": type(next(trainer.model_wrapped.parameters())).__name__,
        "loss": logged(trainer, "loss"),
        "alpha": logged(trainer, "alpha"),
        "batches": logged(trainer, "batch_size"),
        "restarts": logged(trainer, "restarts"),
        "evaluation": trainer.evaluate(token_rows(8))["eval_loss"],
        "weights": flat_weights(trainer.model).norm().item(),
    }


def noise_scale(folder):
    """Five updates of two micro-batches on every process, at one point; what every process makes of them."""
    trainer = ElraTrainer(
        llama().double(),
        arguments(
            folder, optim="sgd", learning_rate=0.0, per_device_train_batch_size=2, gradient_accumulation_steps=2,
            elra_batch_control="noise", elra_control_cycle="1ba", max_steps=5,
        ),
        train_dataset=token_rows(200, unequal=True),
    )  # fmt: skip
    trainer.train()
    told = torch.tensor(
        [trainer.elra.size.noise_scale.signal, trainer.elra.size.noise_scale.noise], dtype=torch.float64
    )
    everywhere = trainer.accelerator.gather(told).view(-1, 2)
    whole = trainer.model_wrapped.module
    whole.zero_grad()
    rows = token_rows(200, unequal=True)
    inputs = {name: torch.stack([row[name] for row in rows]) for name in ("input_ids", "labels")}
    whole(**inputs).loss.backward()
    square = sum(p.grad.square().sum().item() for p in whole.parameters())
    return {
        "equal": bool((everywhere == everywhere[0]).all()),
        "signal": everywhere[0, 0].item() / (1 - 0.98**5),
        "square": square,
        "batches": [entry["batch_size"] for entry in trainer.state.log_history if "condition" in entry],
    }


def losses_of_both_kinds(folder):
    """Three updates of 16 rows, by a model that divides by the number of items and by one that ignores it."""
    processes, losses = int(os.environ["WORLD_SIZE"]), {}
    for kind, model, rows in (
        ("divides", llama().double(), token_rows(unequal=True)),
        ("ignores", vit().double(), vit_rows()),
    ):
        trainer = ElraTrainer(
            model,
            arguments(
                folder, per_device_train_batch_size=4, gradient_accumulation_steps=4 // processes, max_steps=3,
            ),
            train_dataset=rows,
        )  # fmt: skip
        seen = []
        trainer.elra_callback.count = lambda samples, tokens, loss, seen=seen: seen.append(float(loss))
        trainer.train()
        losses[kind] = seen
    return losses


def line_losses(folder):
    """Three updates of 16 rows: the loss that was observed, and line losses of these rows and of the next ones."""
    noted, processes = [], int(os.environ.get("WORLD_SIZE", "1"))

    class Probing(ELRA):
        needs_line_loss = True

        def step(self, closure=None, *, loss=None):
            noted.append([float(self._observed_loss), self.line_loss(0.0), self.line_loss(0.1, batches=1)])
            return super().step(closure, loss=loss)

    trainer = ElraTrainer(
        llama().double(),
        arguments(
            folder, per_device_train_batch_size=8 // processes, gradient_accumulation_steps=2, max_steps=3,
            elra_max_micro_batch="auto",
        ),
        train_dataset=token_rows(unequal=True),
        optimizer_cls_and_kwargs=(Probing, {"lr": 1e-3}),
    )  # fmt: skip
    trainer.train()
    everywhere = trainer.accelerator.gather(torch.tensor([noted], dtype=torch.float64))
    return {"equal": bool((everywhere[:, :, 1:] == everywhere[0, :, 1:]).all()), "noted": everywhere.mean(0).tolist()}


def one_without_labels(folder):
    """Three updates in which the second process has no labels: what the optimizer counts, and the losses of both."""

    class Unlabelled(ElraTrainer):
        def compute_loss(self, model, inputs, **given):
            has_none = self.accelerator.process_index == 1 and self.state.global_step in (8, 9, 10)
            labels = torch.full_like(inputs["labels"], -100) if has_none else inputs["labels"]
            loss = cross_entropy(model(inputs["pixel_values"]).logits, labels)
            own.append(float(loss))
            return loss

    own, seen, found = [], [], {}
    for optim in ("elra", "elra_spectral"):
        trainer = Unlabelled(
            vit().double(),
            arguments(folder, optim=optim, per_device_train_batch_size=4, max_steps=16),
            train_dataset=vit_rows(),
        )
        own.clear(), seen.clear()
        trainer.elra_callback.count = lambda samples, tokens, loss: seen.append(float(loss))
        trainer.train()
        counts = {name: logged(trainer, name)[-1] for name in ("non_finite", "skipped")}
        found[optim] = {
            **counts,
            "own": own[8:11],
            "mean": seen[8:11],
            "same": same_everywhere(flat_weights(trainer.model)),
        }
    return found


def split_batches(folder):
    """Ten updates of 8 rows, each split in two; counts as they are logged."""
    sizes = []

    class Note(ElraTrainer):
        def compute_loss(self, model, inputs, **kwargs):
            sizes.append(len(inputs["input_ids"]))
            return super().compute_loss(model, inputs, **kwargs)

    trainer = Note(llama(), arguments(folder, accelerator_config={"split_batches": True}), train_dataset=token_rows())
    trainer.train()
    return {
        "samples": trainer.elra_callback.samples,
        "batch_size": logged(trainer, "batch_size"),
        "epoch": trainer.state.epoch,
        "per_process": max(sizes),
    }


def rows_of_a_resumed_run(folder):
    """Rows that a run trains on which is interrupted in its second epoch and goes on, in batches of 2 x 4 or 2 x 3."""

    class Note(ElraTrainer):
        def compute_loss(self, model, inputs, **kwargs):
            mine = inputs.pop("number")
            self.rows = getattr(self, "rows", []) + self.accelerator.gather(mine).tolist()
            return super().compute_loss(model, inputs, **kwargs)

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = control.should_save = state.global_step == 7

    def run(name, batch=4, resume=None, **given):
        rows = [{**row, "number": i} for i, row in enumerate(token_rows(40))]
        trainer = Note(
            llama(),
            arguments(f"{folder}/{name}", per_device_train_batch_size=batch, max_steps=-1, num_train_epochs=3,
                      remove_unused_columns=False, elra_batch_control="off"),
            train_dataset=rows, **given,
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        trainer.accelerator.wait_for_everyone()  # until the checkpoint is written
        return trainer.rows

    whole, before = run("whole"), run("part", callbacks=[Stop()])
    checkpoint = f"{folder}/part/checkpoint-7"
    after = run("again", resume=checkpoint)
    return {"whole": whole, "before": before, "after": after, "other": run("other", batch=3, resume=checkpoint)}
