"""A model in training split over processes, layer by layer, by PyTorch's FSDP2: --shard.

Weights, gradients and AdamW's moments of the layers lie in equal parts on all devices; embeddings
and the last norm stay whole. Only training is split. Answers are drawn, and a teacher reads, with
whole copies in autocast's dtype: processes that decode take different numbers of steps, and could
not wait for each other's parts at each of them.

Paper:    none; the released code splits OPT 6.7B and LLaMA 7B by tensor parallelism.
Run:      torchrun --nproc_per_node=8 teacher.py --model=Qwen/Qwen3-8B --out=out/teacher --shard
Left out: a split teacher; --dtype=float16, whose scaling looks at each part alone; --compile.
"""

import copy
import math
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from config import Machine, UserError
from model import GPT


def whole(tensor: Tensor, to_save: bool = False) -> Tensor:
    """All of a tensor, for which every process has to call this. What is to be saved comes into the
    first process's main memory, and into no other's."""
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    if to_save:
        return full.to("cpu" if dist.get_rank() == 0 else "meta")
    return full


def split_like(tensor: Tensor, model: DTensor) -> DTensor:
    """This process's part of a whole tensor."""
    tensor = tensor.to(model.device_mesh.device_type, model.dtype)
    return distribute_tensor(tensor, model.device_mesh, model.placements)


def copied(model: nn.Module, of: Callable[[nn.Parameter], Tensor]) -> nn.Module:
    """A copy of the model whose weights are what `of` makes of its own."""
    memo = {id(p): nn.Parameter(of(p), requires_grad=False) for p in model.parameters()}
    if isinstance(model, GPT):
        return copy.deepcopy(model, memo)
    return type(model)(copy.deepcopy(model.whole, memo), model.config)


def shard(model: nn.Module, cfg, m: Machine) -> nn.Module:
    """Splits the model's layers over the processes, in place. Its state_dict() stays that of a
    whole model, and is read as such."""
    batch = getattr(cfg, "minibatch", 0) or cfg.batch_size
    if m.world == 1:
        raise UserError("--shard splits a model over several processes: start them with torchrun")
    if batch % m.world:
        raise UserError(f"--shard needs as many of {batch} answers for each of {m.world} processes")
    if m.dtype == torch.float16 or cfg.compile or cfg.decoder == "plain":
        raise UserError("--shard goes neither with --dtype=float16 nor with --compile, nor with "
                        "--decoder=plain: leave these out")
    skeleton = copied(model, lambda p: p.detach().to("meta"))
    mesh = init_device_mesh(m.device.type, (m.world,))
    for layer in model.h if isinstance(model, GPT) else model.layers():
        fully_shard(layer, mesh=mesh)

    def give(model, state: dict, prefix: str, *_) -> None:
        for name in list(state):
            state[name] = whole(state[name], to_save=True)

    def take(model, state: dict, *_) -> None:
        for name, p in model.named_parameters():
            if isinstance(p, DTensor) and name in state:
                state[name] = split_like(state[name], p)

    model.skeleton = [skeleton]  # in a list, as it is no part of the model
    model.register_state_dict_post_hook(give)
    model.register_load_state_dict_pre_hook(take)
    return model


def gathered(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """A whole copy of a sharded model, its matrices in `dtype`; without one, to be saved. Every
    process calls this."""
    def of(empty: nn.Parameter) -> Tensor:
        p = parameters[id(empty)]
        full = whole(p.detach(), to_save=dtype is None)
        return full.to(dtype) if dtype and isinstance(p, DTensor) and p.dim() == 2 else full

    skeleton, = model.skeleton
    parameters = dict(zip(map(id, skeleton.parameters()), model.parameters()))
    return copied(skeleton, of).eval()


def adamw(model: nn.Module, **given) -> torch.optim.AdamW:
    """AdamW over weights that are split and over those that are not, in two groups with one
    learning rate, the first's. Its state_dict() has whole tensors."""
    split = [p for p in model.parameters() if isinstance(p, DTensor)]
    others = [p for p in model.parameters() if not isinstance(p, DTensor)]
    optimizer = torch.optim.AdamW([{"params": others}, {"params": split}], **given)

    def one_rate(optimizer, *_) -> None:
        optimizer.param_groups[1]["lr"] = optimizer.param_groups[0]["lr"]

    def give(optimizer, state: dict) -> dict:
        moments = {i: {name: whole(value, to_save=True) for name, value in of_one.items()}
                   for i, of_one in state["state"].items()}
        return state | {"state": moments}

    def take(optimizer, state: dict) -> dict:
        parameters = [*others, *split]
        moments = {}
        for i, of_one in state["state"].items():
            moments[i] = {name: split_like(value, parameters[i]) if i >= len(others)
                          and value.dim() else value for name, value in of_one.items()}
        return state | {"state": moments}

    optimizer.register_step_pre_hook(one_rate)
    optimizer.register_state_dict_post_hook(give)
    optimizer.register_load_state_dict_pre_hook(take)
    return optimizer


def clip_grad_norm(model: nn.Module, m: Machine, largest: float) -> float:
    """Clips the norm of all gradients, and returns what it was."""
    grads = [p.grad for p in model.parameters()]
    squares = torch.zeros((), device=m.device)
    for grad in grads:
        if isinstance(grad, DTensor):
            squares += grad.mul_(m.world).to_local().square().sum()  # FSDP has made a mean of them
    m.sum(squares)
    squares += sum(grad.square().sum() for grad in grads if not isinstance(grad, DTensor))
    norm = math.sqrt(squares.item()) if squares.isfinite() else math.nan
    for grad in grads:
        grad.mul_(min(1.0, largest / (norm + 1e-6)))
    return norm
