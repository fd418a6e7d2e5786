"""CUDA graphs: kernels of a network, of views or of an objective, recorded once and then started together.

Small images cost a GPU less time than a program needs to start its kernels one by one: a step of ProPos with ResNet-18
on 512 CIFAR images has some 1,900 of them. What is replayed computes the same, on memory of its own.
"""

import gc
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, wraps
from typing import Any, TypeVar
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from torch.utils._pytree import tree_flatten, tree_unflatten

from deepclust.engine import distributed
from deepclust.errors import InputError

F = TypeVar("F", bound=Callable[..., Any])

_replaying = True
_all: "WeakSet[Replayed]" = WeakSet()


@contextmanager
def as_written() -> Iterator[None]:
    """Inside, nothing is replayed or recorded: every call runs its function."""
    global _replaying
    before, _replaying = _replaying, False
    try:
        yield
    finally:
        _replaying = before


def replaying() -> bool:
    """Whether calls are replayed here, rather than run as written, as they are while something is recorded."""
    return _replaying


def release() -> None:
    """Forget all recordings, and so give back their memory, which nothing else may use; later calls record anew.

    All or none: to destroy one graph takes memory from others with some versions of torch (pytorch issue 193402).
    """
    for call in _all:
        call.recordings.clear()
        call.seen.clear()


class Replayed:
    """Stands for calls of `function`, which may work on a `network`: on a GPU they are replayed from the second on.

    Calls are told apart by the shapes and memory order of their tensors, by what is trained, and by autocast; those
    whose backward pass is still to come have recordings of their own. Results are copies, and stay as they are. On a
    CPU, and where several processes train together, `function` is called as ever. It may look at no values, and hang on
    nothing but its tensors and the weights and buffers of `network`.
    """

    def __init__(self, function: Callable[..., Any], network: nn.Module | None = None) -> None:
        self.function = function
        self.network = network
        self.within = None if network is None else Within(function, network)
        self.held: list[tuple[Mapping[str, Tensor | None], str, Tensor | None, int]] | None = None
        self.weights: dict[str, Tensor] = {}
        self.buffers: list[Tensor] = []
        self.modules: list[nn.Module] = []
        self.seen: set[Hashable] = set()
        self.recordings: dict[Hashable, list[_Recording]] = {}
        _all.add(self)

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        usual = not _replaying or named or not inputs or not all(map(on_gpu, inputs))
        if usual or distributed.world_size() > 1:
            return self.function(*inputs, **named)
        self._follow()
        grad, device = torch.is_grad_enabled(), inputs[0].device.type
        kind = (
            *((x.shape, x.stride(), x.dtype, grad and x.requires_grad) for x in inputs),
            *(grad and w.requires_grad for w in self.weights.values()),
            *(m.training for m in self.modules),
            *(grad, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)),
        )
        if kind not in self.seen:  # it may be the only one of its kind, such as the last batch
            self.seen.add(kind)
            with as_written():  # what is inside is recorded with it, if at all
                return self.run(*inputs)
        alike = self.recordings.setdefault(kind, [])
        free = next((one for one in alike if one.lease is None), None)
        if free is None:
            try:
                free = _Recording(self, inputs)
            except (RuntimeError, TypeError, AttributeError) as error:
                what = "the views" if self.network is None else type(self.network).__name__
                raise InputError(
                    f"{what} could not be recorded as a CUDA graph: {error}",
                    expected="memory for it, tensors that come back, and operations that never wait for the GPU",
                    do="set hardware.graphs=false",
                ) from error
            alike.append(free)
        return free(inputs)

    def _follow(self) -> None:
        """Forget all recordings if the network holds other tensors, or the same elsewhere: they went to the CPU and
        back, say."""
        if self.network is None:
            return
        if self.held is not None and all(
            store.get(name) is tensor and (tensor is None or tensor.data_ptr() == place)
            for store, name, tensor, place in self.held
        ):
            return
        self.modules = list(self.network.modules())
        self.weights, self.buffers = dict(self.network.named_parameters()), list(self.network.buffers())
        self.held = [
            (store, name, tensor, 0 if tensor is None else tensor.data_ptr())
            for module in self.modules
            for store in (module._parameters, module._buffers)
            for name, tensor in store.items()
        ]
        if self.recordings:
            release()

    def run(self, *inputs: Tensor, weights: Mapping[str, Tensor] | None = None) -> Any:
        """The function called, with these in place of its weights of those names.

        Weights that autocast lowers are not kept for the next call, since they would lie in a recording.
        """
        device = inputs[0].device.type
        on, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        with torch.autocast(device, dtype=dtype, enabled=on, cache_enabled=False):
            if weights and self.within is not None:
                return functional_call(self.within, {f"network.{name}": w for name, w in weights.items()}, inputs)
            return self.function(*inputs)


class Within(nn.Module):
    """A function that works on a network, as a module, which can be called with other weights."""

    def __init__(self, function: Callable[..., Any], network: nn.Module) -> None:
        super().__init__()
        self.function = function
        self.network = network

    def forward(self, *inputs: Tensor) -> Any:
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


def replayable(
    *, by: Callable[[Any], Hashable] = lambda self: None, when: Callable[[Any], bool] = lambda self: True
) -> Callable[[F], F]:
    """Marks a part of a method's step, between its networks and its loss: it is replayed where the method asks for it.

    It takes tensors, or None, by position and gives tensors. They hang on nothing else but weights and buffers, which
    it changes in place if at all, and plain values that `by` gives: each is recorded by itself and kept, so there are
    to be few. It looks at no values of tensors, and draws no random numbers but those of layers. While `when` does not
    hold it runs as ever.
    """

    def mark(function: F) -> F:
        @wraps(function)
        def call(method: Any, *tensors: Tensor | None) -> Any:
            if method.replayed_parts is None or not when(method):
                return function(method, *tensors)
            return method.replayed_parts(function, method, tensors, by(method))

        return call  # type: ignore[return-value]

    return mark


class ReplayedParts:
    """The `replayable` parts of a method. A copy of the method goes without."""

    def __init__(self) -> None:
        self.calls: dict[Hashable, Replayed] = {}

    def __reduce__(self) -> Any:
        return type(None), ()

    def __call__(
        self, function: Callable[..., Any], method: nn.Module, tensors: tuple[Tensor | None, ...], values: Hashable
    ) -> Any:
        present = tuple(x is not None for x in tensors)

        def part(*given: Tensor) -> Any:
            rest = iter(given)
            return function(method, *(next(rest) if there else None for there in present))

        key = function, present, values
        if key not in self.calls:
            self.calls[key] = Replayed(part, method)
        return self.calls[key](*(x for x in tensors if x is not None))


# What is CUDA's; tests put a stand-in for a CPU here ------------------------------------------------------------------


def on_gpu(x: Any) -> bool:
    """Whether that is a tensor on a GPU."""
    return isinstance(x, Tensor) and x.is_cuda


@contextmanager
def first_times() -> Iterator[None]:
    """For the first few calls, in which libraries do what must not be recorded; no random number is used up."""
    present = torch.cuda.current_stream()
    aside = _aside(present.device)
    aside.wait_stream(present)
    with torch.random.fork_rng([present.device_index]), torch.cuda.stream(aside):
        yield
    present.wait_stream(aside)


@cache
def _aside(device: torch.device) -> torch.cuda.Stream:
    """The stream of first times; one, for libraries keep memory for each."""
    return torch.cuda.Stream(device)


class Graph:
    """What a function does on a GPU, recorded; `after` another one, which is replayed before it, on the same memory."""

    def __init__(self, function: Callable[[], Any], after: "Graph | None" = None) -> None:
        self.graph = torch.cuda.CUDAGraph()
        pool = None if after is None else after.graph.pool()
        # Other threads may go on meanwhile: the one that reads ahead does. Not so the garbage collector, which may find
        # an old graph, and to destroy one ends the recording.
        collects = gc.isenabled()
        gc.disable()
        try:
            with torch.cuda.graph(self.graph, pool, capture_error_mode="thread_local"):
                self.result = function()
        finally:
            if collects:
                gc.enable()

    def replay(self) -> None:
        self.graph.replay()


# ----------------------------------------------------------------------------------------------------------------------


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
            with first_times():
                for _ in range(3):
                    outputs, leaves = self._run()
                    found = gradients_of(outputs, leaves, [torch.ones_like(o) for o in outputs])
                    # Weights on which nothing hangs are to have no gradient, and those of other networks are many.
                    reached = [gradient is not None for gradient in found[len(inputs) :]]
                    self.trained = {n: w for (n, w), yes in zip(self.trained.items(), reached, strict=True) if yes}
                    del outputs, leaves, found
            self.forward = Graph(self._run)
            outputs, leaves = self.forward.result
            del self.forward.result
            self.outputs = [o.detach() for o in outputs]
            self.learns = [o.requires_grad for o in outputs]
            if any(self.learns):
                self.output_gradients = [torch.zeros_like(o) for o in self.outputs]
                self.backward = Graph(lambda: gradients_of(outputs, leaves, self.output_gradients), self.forward)
                self.gradients = self.backward.result
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
        # Copies, for autograd adds to what it is given.
        copies = iter(torch._foreach_mul([g for g in self.gradients if g is not None], 1.0))
        return [None if g is None else next(copies) for g in self.gradients]


def gradients_of(outputs: list[Tensor], leaves: list[Tensor], given: list[Tensor]) -> list[Tensor | None]:
    """Gradients of the leaves, those `given` of the outputs; None where there is none."""
    learning = [o for o in outputs if o.requires_grad]
    if not learning:
        return [None] * len(leaves)
    asked = [leaf for leaf in leaves if leaf.requires_grad]
    given = [g for g, o in zip(given, outputs, strict=True) if o.requires_grad]
    # As in a backward pass of its own, which no autocast surrounds: it would lower what was raised to 32 bits.
    with torch.autocast(leaves[0].device.type, enabled=False):
        found = iter(torch.autograd.grad(learning, asked, given, allow_unused=True))
    return [next(found) if leaf.requires_grad else None for leaf in leaves]


class _Lease:
    """Holds a recording until its backward pass is done or can no longer come."""

    def __init__(self, recording: _Recording) -> None:
        self.recording = recording
        self.token = recording.lease = object()

    @property
    def holds(self) -> bool:
        return self.recording.lease is self.token

    def end(self) -> None:
        if self.holds:
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
        if not ctx.lease.holds:
            raise InputError(
                "a replayed network was called back a second time, when its memory may hold another pass",
                expected="one backward pass for each forward pass",
                do="set hardware.graphs=false",
            )
        found = ctx.lease.recording.replay_backward(gradients)
        ctx.lease.end()
        return (None, *found)
