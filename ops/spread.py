"""A model over the ranks of a run: a copy on each (DDP), or a share of the rows of each weight on each (FSDP2).

Both forms show the loop the same thing: `forward`, which every rank calls on its part of a batch; `weights`, the
tensors that this rank's optimizer owns; gradients that are *sums* over ranks; and the whole model, put together, for
evaluation and for its file. Rank r's rows of a weight are the r-th of `torch.chunk`'s parts, in both forms: what a rank
writes into a checkpoint does not tell which of them wrote it. May not live here: what is learned, files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.attention import keep_compiled_forms
from ops.jobs import Worker

Build = Callable[[], nn.Module]
Blocks = Callable[[Any], Sequence[nn.Module]]


class Spread:
    """One rank's part of a model that is trained.

    `weights` are this rank's tensors by the names of the whole model's parameters, fp32: whole ones, or its rows.
    """

    def __init__(self, build: Build, blocks: Blocks, worker: Worker, precision: str, source: nn.Module | None) -> None:
        """`build` makes the model's structure, `blocks` names the parts that are compiled, recomputed and sharded one
        by one. `source` has the initial weights, on rank 0; None on all ranks leaves them for `restore` to fill."""
        self._build, self._worker = build, worker
        self.is_sharded = worker.sharded and worker.world > 1
        model, has_source = self.skeleton(), any(worker.gather(source is not None))
        self.shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        for block in blocks(model) if worker.recompute else ():
            # Inside of what FSDP2 wraps: a block's shares are put together once for its backward pass, not twice.
            block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
        if self.is_sharded:
            self._shard(model, blocks(model), precision)
        if worker.compile:
            keep_compiled_forms()
        for block in blocks(model) if worker.compile else ():
            block.compile()
        _materialise(model, worker.device)
        self.model = model
        self.weights = {name: _own(parameter) for name, parameter in model.named_parameters()}
        if has_source:
            self._share(source)
        self.forward: Callable[..., Any] = model
        if worker.world > 1 and not self.is_sharded:
            self.forward = _data_parallel(model, worker)

    def skeleton(self) -> nn.Module:
        """The model without memory for its weights."""
        with torch.device("meta"):
            return self._build()

    def rows(self, name: str) -> tuple[int, int]:
        """(first, stop): the rows of a weight that `weights` holds here."""
        rows = self.shapes[name][0]
        return self._worker.part(rows) if self.is_sharded else (0, rows)

    def share(self, name: str, tensor: Tensor) -> Tensor:
        """This rank's part of a tensor like `weights[name]`: the rows that it writes into a checkpoint."""
        if self.is_sharded:
            return tensor
        first, stop = self._worker.part(self.shapes[name][0])
        return tensor[first:stop]

    @contextmanager
    def part_of_a_batch(self, *, is_last: bool) -> Iterator[None]:
        """Around forward and backward of one part: a copy's gradients are summed over ranks with the last one only."""
        is_kept = not is_last and isinstance(self.forward, nn.parallel.DistributedDataParallel)
        with self.forward.no_sync() if is_kept else nullcontext():  # type: ignore[attr-defined]
            yield

    def gradients(self) -> list[Tensor]:
        """Hands each of `weights` its gradient, summed over ranks, and returns them."""
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None:
                self.weights[name].grad = _local(parameter.grad)
        return [weight.grad for weight in self.weights.values() if weight.grad is not None]

    def forget_gradients(self) -> None:
        """Before the next update."""
        self.model.zero_grad(set_to_none=True)
        for weight in self.weights.values():
            weight.grad = None

    def norm(self, gradients: Sequence[Tensor]) -> Tensor:
        """The norm of the whole gradient."""
        norm = torch.nn.utils.get_total_norm(gradients) if gradients else torch.zeros((), device=self._worker.device)
        return self._worker.sum(norm.square()).sqrt() if self.is_sharded else norm

    def whole(self, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """(name, the whole weight) of tensors like `weights`, on every rank: all ranks go through it together."""
        for name, tensor in tensors.items():
            yield name, self._together(name, tensor.detach())

    def replica(self, tensors: Mapping[str, Tensor], precision: str) -> Any:
        """The whole model with these weights, ready to be called, frozen; put together from all ranks."""
        dtype = torch.bfloat16 if self.is_sharded and precision == "bf16" else torch.float32
        model = self.skeleton()
        model.load_state_dict({name: tensor.to(dtype) for name, tensor in self.whole(tensors)}, assign=True)
        return model.to(self._worker.device).requires_grad_(False).eval()

    def _shard(self, model: nn.Module, blocks: Sequence[nn.Module], precision: str) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

        self._mesh = init_device_mesh(self._worker.device, (self._worker.world,))
        reduced = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
        policy = reduced if precision == "bf16" else MixedPrecisionPolicy()
        for module in (*blocks, model):
            fully_shard(module, mesh=self._mesh, mp_policy=policy)
        for part in model.modules():
            if isinstance(part, FSDPModule):
                part.set_gradient_divide_factor(1.0)  # sums, not means
                part.set_force_sum_reduction_for_comms(True)  # gloo knows no other

    @torch.no_grad()
    def _share(self, source: nn.Module | None) -> None:
        """Rank 0's initial weights to all ranks, one weight at a time."""
        given = dict(source.named_parameters()) if source is not None else {}
        for name, weight in self.weights.items():
            first, stop = self.rows(name)
            if self._worker.world == 1:
                weight.copy_(given[name])
                continue
            whole = torch.zeros(self.shapes[name], device=self._worker.device)
            if name in given:
                whole.copy_(given[name])
            torch.distributed.broadcast(whole, 0)
            weight.copy_(whole[first:stop])

    def _together(self, name: str, tensor: Tensor) -> Tensor:
        if not self.is_sharded:
            return tensor
        from torch.distributed.tensor import DTensor, Shard

        shape = torch.Size(self.shapes[name])
        stride = torch.empty(shape, device="meta").stride()
        spread = DTensor.from_local(tensor, self._mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)
        return spread.full_tensor()


def autocast(device: str, precision: str) -> AbstractContextManager[Any]:
    """Around a forward pass: bf16 where it is safe, or nothing."""
    return torch.autocast(device, torch.bfloat16) if precision == "bf16" else nullcontext()


def _own(parameter: nn.Parameter) -> Tensor:
    """The tensor that the optimizer changes: the parameter, or this rank's rows of it, on the same memory."""
    local = _local(parameter)
    return parameter if local is parameter else nn.Parameter(local.detach())


def _local(tensor: Tensor) -> Tensor:
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _materialise(model: nn.Module, device: str) -> None:
    """Gives the weights memory, without values. Buffers are computed from settings and exist: they move only."""
    buffers = {name: buffer for name, buffer in model.named_buffers() if buffer.device.type != "meta"}
    model.to_empty(device=device)
    for name, buffer in buffers.items():
        owner, _, own = name.rpartition(".")
        setattr(model.get_submodule(owner), own, buffer.to(device))


def _data_parallel(model: nn.Module, worker: Worker) -> nn.Module:
    data_parallel = nn.parallel.DistributedDataParallel
    # Buffers are masks, equal everywhere: nothing to be sent with each step.
    buffers = [name for name, _ in model.named_buffers()]
    data_parallel._set_params_and_buffers_to_ignore_for_model(model, buffers)  # type: ignore[no-untyped-call]
    device_ids = [torch.cuda.current_device()] if worker.device == "cuda" else None
    parallel = data_parallel(model, device_ids, init_sync=False, gradient_as_bucket_view=True)
    parallel.register_comm_hook(None, lambda state, bucket: _sum(bucket))
    return parallel


def _sum(bucket: Any) -> torch.futures.Future[Tensor]:
    """Sums a bucket of gradients over ranks: the objective is a sum, divided by its count over all ranks."""
    work = torch.distributed.all_reduce(bucket.buffer(), async_op=True)
    summed: torch.futures.Future[Tensor] = work.get_future().then(lambda done: done.value()[0])
    return summed
