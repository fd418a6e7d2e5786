"""CUDA graphs: calls of networks, views and parts of a method's step, recorded once and then replayed as a whole.

With small images a GPU spends less time on its kernels than the program needs to start them one by one: a step of
ProPos with ResNet-18 on 512 CIFAR images has some 1,900 of them. A recording (a capture, in CUDA's terms) starts them
together. A replayed call computes what the call itself would, on memory of its own; engine/graph_recording.py has the
recording.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from typing import Any, TypeVar
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.func import functional_call

from deepclust.engine import distributed, graph_recording
from deepclust.engine.batch_norm import GroupedBatchNorm
from deepclust.engine.graph_recording import Recording
from deepclust.errors import InputError

F = TypeVar("F", bound=Callable[..., Any])

_replay_enabled = True
_replayed_functions: "WeakSet[ReplayedFunction]" = WeakSet()


@contextmanager
def disable_replay() -> Iterator[None]:
    """Inside, nothing is recorded or replayed: every call runs its function."""
    global _replay_enabled
    before, _replay_enabled = _replay_enabled, False
    try:
        yield
    finally:
        _replay_enabled = before


def is_replay_enabled() -> bool:
    """Return whether calls may be replayed here; inside `disable_replay`, and so during a recording, they may not."""
    return _replay_enabled


def release_recordings() -> None:
    """Drop all recordings, whose memory nothing else can use; later calls are recorded again.

    They are only dropped all together: with some versions of torch, destroying one graph takes memory from others
    (pytorch issue 193402).
    """
    for function in _replayed_functions:
        function.recordings.clear()
        function.seen_signatures.clear()


class ReplayedFunction:
    """Replaces `function`, which may work on a `network`: on a GPU its calls are replayed from the second on.

    There is a recording for each signature: the shapes and memory order of the tensors, what is trained, and autocast.
    A call whose backward pass is still to come keeps its recording to itself, and the next call gets another one.
    Results are copies, which later calls do not change. On a CPU, and where several processes train together,
    `function` itself is called.

    `function` must not read values of tensors on the host, and its result may depend on nothing but its tensors and the
    weights and buffers of `network`.
    """

    def __init__(self, function: Callable[..., Any], network: nn.Module | None = None) -> None:
        self.function = function
        self.network = network
        self.module = None if network is None else FunctionAsModule(function, network)
        self.weights: dict[str, Tensor] = {}
        self.buffers: list[Tensor] = []
        self.modules: list[nn.Module] = []
        # Every parameter and buffer of the network: the dict that holds it, its name, the tensor and its address.
        self.tensor_places: list[tuple[Mapping[str, Tensor | None], str, Tensor | None, int]] | None = None
        self.seen_signatures: set[Hashable] = set()
        self.recordings: dict[Hashable, list[Recording]] = {}
        _replayed_functions.add(self)

    def __call__(self, *inputs: Any, **keywords: Any) -> Any:
        can_replay = _replay_enabled and inputs and not keywords and all(map(graph_recording.is_on_gpu, inputs))
        if not can_replay or distributed.world_size() > 1:
            return self.function(*inputs, **keywords)
        self._follow_network_tensors()
        signature = self._compute_signature(inputs)
        if signature not in self.seen_signatures:  # it may be the only call of its kind, such as the last batch
            self.seen_signatures.add(signature)
            with disable_replay():  # replayed functions that it calls become part of its recording, if there is one
                return self.call_function(*inputs)
        recordings = self.recordings.setdefault(signature, [])
        recording = next((one for one in recordings if one.reservation is None), None)
        if recording is None:
            recording = self._record(inputs)
            recordings.append(recording)
        return recording(inputs)

    def _compute_signature(self, inputs: tuple[Tensor, ...]) -> Hashable:
        grad, device = torch.is_grad_enabled(), inputs[0].device.type
        return (
            *((x.shape, x.stride(), x.dtype, grad and x.requires_grad) for x in inputs),
            *(grad and w.requires_grad for w in self.weights.values()),
            *(m.training for m in self.modules),
            *(m.groups.signature for m in self.modules if isinstance(m, GroupedBatchNorm)),
            *(grad, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)),
        )

    def _record(self, inputs: tuple[Tensor, ...]) -> Recording:
        try:
            with disable_replay():
                return Recording(self.call_function, inputs, self.weights, self.buffers)
        except (RuntimeError, TypeError, AttributeError) as error:
            name = "the views" if self.network is None else type(self.network).__name__
            raise InputError(
                f"{name} could not be recorded as a CUDA graph: {error}",
                expected="memory for it, tensors as results, and operations that never wait for the GPU",
                do="set hardware.graphs=false",
            ) from error

    def _follow_network_tensors(self) -> None:
        """Drop all recordings if the network holds other tensors than before, or holds them at other addresses.

        Addresses change when the network is moved to the CPU and back, say.
        """
        if self.network is None:
            return
        if self.tensor_places is not None and all(
            store.get(name) is tensor and (tensor is None or tensor.data_ptr() == address)
            for store, name, tensor, address in self.tensor_places
        ):
            return
        self.modules = list(self.network.modules())
        self.weights, self.buffers = dict(self.network.named_parameters()), list(self.network.buffers())
        self.tensor_places = [
            (store, name, tensor, 0 if tensor is None else tensor.data_ptr())
            for module in self.modules
            for store in (module._parameters, module._buffers)
            for name, tensor in store.items()
        ]
        if self.recordings:
            release_recordings()

    def call_function(self, *inputs: Tensor, weights: Mapping[str, Tensor] | None = None) -> Any:
        """Call the function, with `weights` in place of the network's weights of those names.

        Weights that autocast lowers are not cached for the next call, since they would lie in a recording's memory.
        """
        device = inputs[0].device.type
        enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        with torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=False):
            if weights and self.module is not None:
                return functional_call(self.module, {f"network.{name}": w for name, w in weights.items()}, inputs)
            return self.function(*inputs)


class FunctionAsModule(nn.Module):
    """A function that works on a network, as a module, so that it can be called with other weights."""

    def __init__(self, function: Callable[..., Any], network: nn.Module) -> None:
        super().__init__()
        self.function = function
        self.network = network

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(*inputs)


class AcceleratedFunctions:
    """Calls functions, which are compiled, replayed as CUDA graphs, both or neither.

    A function is compiled at its first call, in `compile_mode` of torch.compile, unless that is None. Functions are
    told apart by a key. Equal keys must mean the same operations on the same shapes.
    """

    def __init__(self, *, compile_mode: str | None, replayed: bool) -> None:
        self.compile_mode = compile_mode
        self.replayed = replayed
        self.functions: dict[Hashable, Callable[..., Any]] = {}

    def __call__(self, key: Hashable, function: Callable[..., Any], *inputs: Tensor) -> Any:
        if key not in self.functions:
            accelerated = function
            if self.compile_mode is not None:
                accelerated = torch.compile(lambda *tensors: function(*tensors), mode=self.compile_mode, dynamic=False)
            self.functions[key] = ReplayedFunction(accelerated) if self.replayed else accelerated
        return self.functions[key](*inputs)


def replayable(
    *, constants: Callable[[Any], Hashable] = lambda self: None, when: Callable[[Any], bool] = lambda self: True
) -> Callable[[F], F]:
    """Mark a part of a method's step, between its networks and its loss, that is replayed if `hardware.graphs` is set.

    The part is a method that takes tensors, or None, by position and returns tensors. Its result may depend on these,
    on weights and buffers of the method, and on plain Python values that `constants` returns. It changes tensors in
    place if at all, reads no values of tensors on the host, and draws no random numbers except in layers such as
    dropout.

    Args:
        constants: returns the plain values, given the method. Each value gets recordings of its own, and all are kept,
            so there should be few.
        when: returns whether the part may be replayed now, given the method; else it is called as usual.
    """

    def mark(function: F) -> F:
        @wraps(function)
        def call(method: Any, *tensors: Tensor | None) -> Any:
            if method.replayed_parts is None or not when(method):
                return function(method, *tensors)
            return method.replayed_parts(function, method, tensors, constants(method))

        return call  # type: ignore[return-value]

    return mark


class ReplayedParts:
    """The `replayable` parts of one method, each as a `ReplayedFunction`. A copy of the method has None instead."""

    def __init__(self) -> None:
        self.functions: dict[Hashable, ReplayedFunction] = {}

    def __reduce__(self) -> Any:
        return type(None), ()

    def __call__(
        self, function: Callable[..., Any], method: nn.Module, tensors: tuple[Tensor | None, ...], constants: Hashable
    ) -> Any:
        is_given = tuple(x is not None for x in tensors)

        def call_part(*given: Tensor) -> Any:
            remaining = iter(given)
            return function(method, *(next(remaining) if is_tensor else None for is_tensor in is_given))

        key = function, is_given, constants
        if key not in self.functions:
            self.functions[key] = ReplayedFunction(call_part, method)
        return self.functions[key](*(x for x in tensors if x is not None))
