"""Running a network on shapes alone: its FLOPs, and the memory that its tensors take.

Tensors are torch's fake ones: shapes and dtypes without data, so a model of any size runs in
seconds on any machine, backward pass included. They live on the CPU, where autograd needs no
GPU; what a GPU does otherwise (which operations autocast keeps in float32) is done here.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

FEW = 2  # blocks of a row that are run: the first and last may do more than those between
# Of the operations that autocast runs in float32 on a GPU and not on the CPU, those that are in
# networks here.
FLOAT32_ON_GPU = {"layer_norm", "group_norm", "rms_norm", "softmax", "pow", "rsqrt", "sum", "norm"}


class Cost(NamedTuple):
    """Of one run. Bytes count what it made: neither parameters nor its inputs."""

    forward: int  # FLOPs of matrix products, convolutions and attention; a multiply-add is 2
    backward: int  # the same of the backward pass, recomputation included
    kept: int  # bytes that the result holds, which are those saved for the backward pass
    peak: int  # bytes at once, backward pass included; gradients of parameters are freed on arrival


@contextmanager
def without_data(*, gpu: bool) -> Iterator[None]:
    """Within it tensors have no data; with ``gpu`` autocast has the GPU's rules.

    What was made within one such block must not be used in another, where views would be copies.
    """
    with FakeTensorMode(), _Rules(gpu=gpu):
        yield


def give_shapes(network: nn.Module) -> nn.Module:
    """Replace what ``network``, built on the meta device, holds there; call it ``without_data``.

    Two steps, because modules cannot be moved or cast while their tensors are fake.
    """
    for module in network.modules():
        held_by: list[Any] = [module._parameters, module._buffers, vars(module)]
        for held in held_by:
            for name, tensor in held.items():
                if isinstance(tensor, Tensor) and tensor.is_meta:
                    held[name] = _on_cpu(tensor)
    return network


def _on_cpu(tensor: Tensor) -> Tensor:
    fake = torch.empty(tensor.shape, dtype=tensor.dtype)
    is_parameter = isinstance(tensor, nn.Parameter)
    return nn.Parameter(fake, requires_grad=tensor.requires_grad) if is_parameter else fake


class _Rules(TorchFunctionMode):
    def __init__(self, *, gpu: bool) -> None:
        super().__init__()
        self._float32 = FLOAT32_ON_GPU if gpu else set[str]()

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.numpy:
            return args[0]  # a fake tensor has no array to give
        given: Any = (args, kwargs or {})
        if func.__name__ in self._float32 and torch.is_autocast_enabled("cpu"):
            given = tree_map_only(Tensor, _float32, given)
        return func(*given[0], **given[1])


def _float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


class Meter(TorchDispatchMode):
    """Counts FLOPs, and the bytes of tensors made within it while they live; views cost nothing.

    torch's own FlopCounterMode keeps what checkpointing recomputes alive, so only its formulas are
    used here.
    """

    def __init__(self, existing: Iterable[Tensor]) -> None:
        super().__init__()
        self.flops = self.bytes = self.peak = 0
        self._seen: dict[int, weakref.ref[Any]] = {}
        for tensor in existing:
            self._see(tensor, counts=False)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        made = func(*args, **kwargs)
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=made)
        for leaf in tree_leaves(made):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        return made

    def _see(self, tensor: Tensor, *, counts: bool = True) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._seen:
            return
        size = storage.nbytes() if counts else 0

        def gone(_: object) -> None:
            del self._seen[key]
            self.bytes -= size

        self._seen[key] = weakref.ref(storage, gone)
        self.bytes += size
        self.peak = max(self.peak, self.bytes)


def measure(
    run: Callable[[], Tensor], network: nn.Module, inputs: Iterable[Tensor], *, backward: bool
) -> Cost:
    """What ``run`` costs, and with ``backward`` its backward pass from the sum of its result.

    ``inputs`` and the tensors of ``network`` exist before. It need not be ``without_data``.
    """
    trained = [p for p in network.parameters() if p.requires_grad]
    hooks = [p.register_post_accumulate_grad_hook(_drop) for p in trained] if backward else []
    with Meter([*network.parameters(), *network.buffers(), *inputs]) as meter:
        with torch.set_grad_enabled(backward):
            result = run()
        forward, kept = meter.flops, meter.bytes
        if backward:
            loss = result.float().sum()
            # Not loss.backward(): within it the rules, a function mode, would not hold.
            _engine_run_backward((loss,), (torch.ones_like(loss),), False, False, (), True, True)
    for hook in hooks:
        hook.remove()
    return Cost(forward, meter.flops - forward, kept, meter.peak)


def _drop(parameter: Tensor) -> None:
    parameter.grad = None


# --- repeated blocks


def scaled(
    run: Callable[[], Cost], network: nn.Module, blocks: tuple[type[nn.Module], ...]
) -> Cost:
    """``run``'s cost, from runs over few of the network's ``blocks``.

    Equal blocks in a row do the same work and keep as much for the backward pass: each one after
    the second adds the same. Only a peak that moves to another place as blocks are added is missed.
    """
    rows = list(_rows(network, blocks))
    with _cut(network, rows, {}):
        cost = short = run()
    for place, row in enumerate(rows):
        if len(row) > FEW:
            with _cut(network, rows, {place: FEW + 1}):
                longer = run()
            added = (
                (len(row) - FEW) * (long - few) for long, few in zip(longer, short, strict=True)
            )
            cost = Cost(*(total + more for total, more in zip(cost, added, strict=True)))
    return cost


def _rows(network: nn.Module, blocks: tuple[type[nn.Module], ...]) -> Iterator[list[str]]:
    """Names of equal blocks that follow each other in one list."""
    named = [(name, block) for name, block in network.named_modules() if isinstance(block, blocks)]

    def kind(entry: tuple[str, nn.Module]) -> object:
        name, block = entry
        shapes = [(n, p.shape, p.dtype, p.requires_grad) for n, p in block.named_parameters()]
        return name.rpartition(".")[0], type(block), shapes

    for _, row in itertools.groupby(named, kind):
        yield [name for name, _ in row]


@contextmanager
def _cut(network: nn.Module, rows: list[list[str]], lengths: dict[int, int]) -> Iterator[None]:
    """Within it each row has ``FEW`` blocks, or as many as ``lengths`` gives for its place."""
    kept = {name for i, row in enumerate(rows) for name in row[: lengths.get(i, FEW)]}
    whole: dict[str, nn.ModuleList] = {}
    for name in {name.rpartition(".")[0] for row in rows for name in row}:
        found = network.get_submodule(name)
        assert isinstance(found, nn.ModuleList)
        whole[name] = found
        few = nn.ModuleList(b for i, b in enumerate(found) if f"{name}.{i}" in kept)
        network.set_submodule(name, few)
    yield
    for name, modules in whole.items():
        network.set_submodule(name, modules)
