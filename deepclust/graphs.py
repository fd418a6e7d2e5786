"""CUDA graphs: the kernels of a network, or of the views, recorded once and from then on started together.

Small images cost a GPU less time than a program needs to start its kernels one by one: a step of ProPos with ResNet-18
on 512 CIFAR images has some 1,900 of them. What is replayed computes the same, on memory of its own.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from torch.utils._pytree import tree_flatten, tree_unflatten

from deepclust import distributed
from deepclust.errors import InputError

_replaying = True


@contextmanager
def as_written() -> Iterator[None]:
    """Inside, nothing is replayed or recorded: every call runs its function."""
    global _replaying
    before, _replaying = _replaying, False
    try:
        yield
    finally:
        _replaying = before


class Replayed:
    """Stands for calls of `function`, that of `network` where it is one: on a GPU they are replayed from the second on.

    Calls are told apart by the shapes and memory order of their tensors, by what is trained, and by autocast; those
    whose backward pass is still to come have recordings of their own. Results are copies, and stay as they are. On a
    CPU, and where several processes train together, `function` is called as ever. It may look at no values, and hang on
    nothing but its tensors and the weights and buffers of `network`.
    """

    def __init__(self, function: Callable[..., Any], network: nn.Module | None = None) -> None:
        self.function = function
        self.network = network
        self.weights: dict[str, Tensor] = {}
        self.buffers: list[Tensor] = []
        self.places: tuple[int, ...] = ()
        self.seen: set[Hashable] = set()
        self.recordings: dict[Hashable, list[_Recording]] = {}

    def __call__(self, *inputs: Any) -> Any:
        on_gpu = inputs and all(isinstance(x, Tensor) and x.is_cuda for x in inputs)
        if not (_replaying and on_gpu) or distributed.world_size() > 1:
            return self.function(*inputs)
        self._follow()
        grad = torch.is_grad_enabled()
        kind = (
            *((x.shape, x.stride(), x.dtype, grad and x.requires_grad) for x in inputs),
            *(grad and w.requires_grad for w in self.weights.values()),
            *(self.network is not None and self.network.training, grad),
            *(torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")),
        )
        if kind not in self.seen:  # it may be the only one of its kind, such as the last batch
            self.seen.add(kind)
            return self.run(*inputs)
        alike = self.recordings.setdefault(kind, [])
        free = next((one for one in alike if one.lease is None), None)
        if free is None:
            try:
                free = _Recording(self, inputs)
            except RuntimeError as error:
                what = "the views" if self.network is None else type(self.network).__name__
                raise InputError(
                    f"{what} could not be recorded as a CUDA graph: {error}",
                    expected="memory for it, and operations that never wait for the GPU",
                    do="set hardware.graphs=false",
                ) from error
            alike.append(free)
        return free(inputs)

    def _follow(self) -> None:
        """Forget the recordings if the weights lie elsewhere by now: they went to the CPU and back, say."""
        if self.network is None or (self.places and self.places == self._lie()):
            return
        self.weights, self.buffers = dict(self.network.named_parameters()), list(self.network.buffers())
        self.places = self._lie()
        self.recordings.clear()

    def _lie(self) -> tuple[int, ...]:
        return tuple(t.data_ptr() for t in (*self.weights.values(), *self.buffers))

    def run(self, *inputs: Tensor, weights: Mapping[str, Tensor] | None = None) -> Any:
        """The function called, with these in place of its weights of those names.

        Weights that autocast lowers are not kept for the next call, since they would lie in a recording.
        """
        on, dtype = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
        with torch.autocast("cuda", dtype=dtype, enabled=on, cache_enabled=False):
            if weights and self.network is not None:
                return functional_call(self.network, dict(weights), inputs)  # which calls this object
            return self.function(*inputs)


class Prepared:
    """Functions by a key, each compiled in that `mode` of torch.compile, unless it is None, and replayed if asked.

    Equal keys mean the same operations on the same shapes.
    """

    def __init__(self, *, mode: str | None, replayed: bool) -> None:
        self.mode = mode
        self.replayed = replayed
        self.functions: dict[Hashable, Callable[..., Any]] = {}

    def __call__(self, key: Hashable, function: Callable[..., Any], *inputs: Tensor) -> Any:
        if key not in self.functions:
            made = function
            if self.mode is not None:
                made = torch.compile(lambda *tensors: function(*tensors), mode=self.mode, dynamic=False)
            self.functions[key] = Replayed(made) if self.replayed else made
        return self.functions[key](*inputs)


class _Recording:
    """A call of one kind, and its backward pass, as a graph each; leased from the one to the other."""

    def __init__(self, call: Replayed, inputs: tuple[Tensor, ...]) -> None:
        self.call = call
        self.lease: object | None = None
        self.inputs = [x.detach().clone() for x in inputs]
        grad = torch.is_grad_enabled()
        self.wanted = [grad and x.requires_grad for x in inputs]
        self.trained = {name: w for name, w in call.weights.items() if grad and w.requires_grad}
        buffers = [b.clone() for b in call.buffers]
        with as_written():
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):  # what libraries do the first few times is not to be recorded
                for _ in range(3):
                    outputs, leaves = self._run()
                    gradients_of(outputs, leaves, [torch.ones_like(o) for o in outputs])
                    del outputs, leaves
            torch.cuda.current_stream().wait_stream(aside)
            # Other threads may go on meanwhile: the one that reads ahead does.
            self.forward = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.forward, capture_error_mode="thread_local"):
                outputs, leaves = self._run()
            self.outputs = [o.detach() for o in outputs]
            self.learns = [o.requires_grad for o in outputs]
            if any(self.learns):
                self.output_gradients = [torch.zeros_like(o) for o in self.outputs]
                self.backward = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self.backward, self.forward.pool(), capture_error_mode="thread_local"):
                    self.gradients = gradients_of(outputs, leaves, self.output_gradients)
        for buffer, value in zip(call.buffers, buffers, strict=True):
            # Running figures, which the first few times have moved. As data, for a pass that awaits its backward pass
            # may hold them.
            buffer.data.copy_(value)

    def _run(self) -> tuple[list[Tensor], list[Tensor]]:
        """Outputs, and the leaves that they hang on: new ones, which autograd has not tied to a stream yet."""
        inputs = [x.detach().requires_grad_(wants) for x, wants in zip(self.inputs, self.wanted, strict=True)]
        weights = {name: nn.Parameter(w.detach()) for name, w in self.trained.items()}
        outputs, self.spec = tree_flatten(self.call.run(*inputs, weights=weights))
        return outputs, [*inputs, *weights.values()]

    def __call__(self, inputs: tuple[Tensor, ...]) -> Any:
        learns = any(self.learns)
        outputs = _Pass.apply(self, *inputs, *self.trained.values()) if learns else self.replay(inputs)
        return tree_unflatten(outputs, self.spec)

    def replay(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given)
        self.forward.replay()
        return tuple(o.clone() for o in self.outputs)

    def replay_backward(self, gradients: tuple[Tensor, ...]) -> list[Tensor | None]:
        """Gradients of the leaves from those of the outputs; None for a leaf on which nothing hangs."""
        for own, given in zip(self.output_gradients, gradients, strict=True):
            own.copy_(given)
        self.backward.replay()
        copies = iter(
            torch._foreach_mul([g for g in self.gradients if g is not None], 1.0)
        )  # for autograd adds to them
        return [None if g is None else next(copies) for g in self.gradients]


def gradients_of(outputs: list[Tensor], leaves: list[Tensor], given: list[Tensor]) -> list[Tensor | None]:
    """Gradients of the leaves, those `given` of the outputs; None where there is none."""
    learning = [o for o in outputs if o.requires_grad]
    if not learning:
        return [None] * len(leaves)
    asked = [leaf for leaf in leaves if leaf.requires_grad]
    given = [g for g, o in zip(given, outputs, strict=True) if o.requires_grad]
    found = iter(torch.autograd.grad(learning, asked, given, allow_unused=True))
    return [next(found) if leaf.requires_grad else None for leaf in leaves]


class _Lease:
    """Holds a recording until its backward pass is done or can no longer come."""

    def __init__(self, recording: _Recording) -> None:
        self.recording = recording
        self.token = recording.lease = object()

    def end(self) -> None:
        if self.recording.lease is self.token:
            self.recording.lease = None

    __del__ = end


class _Pass(torch.autograd.Function):
    """A replayed call in autograd's graph: its inputs and the weights that are trained."""

    @staticmethod
    def forward(ctx: Any, recording: _Recording, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.lease = _Lease(recording)
        outputs = recording.replay(tensors[: len(recording.inputs)])
        ctx.mark_non_differentiable(*(o for o, learns in zip(outputs, recording.learns, strict=True) if not learns))
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        recording: _Recording = ctx.lease.recording
        found = recording.replay_backward(gradients)
        ctx.lease.end()
        return (None, *found)
