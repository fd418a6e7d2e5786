"""One recording: the forward and the backward pass of a call as CUDA graphs, and how autograd replays them.

engine/cuda_graphs.py decides which calls are recorded and when a recording is replayed.
"""

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_flatten, tree_unflatten

from deepclust.errors import InputError

NUM_WARM_UP_CALLS = 3

# What only works with CUDA; tests on a CPU replace is_on_gpu, warm_up and CudaGraph -----------------------------------


def is_on_gpu(value: Any) -> bool:
    """Return whether `value` is a tensor on a GPU."""
    return isinstance(value, Tensor) and value.is_cuda


@contextmanager
def warm_up() -> Iterator[None]:
    """Inside, calls run on a stream of their own, and the random numbers that they draw are given back at the end.

    The first few calls of an operation must not be recorded: libraries allocate memory and choose algorithms in them.
    """
    current_stream = torch.cuda.current_stream()
    warm_up_stream = _get_warm_up_stream(current_stream.device)
    warm_up_stream.wait_stream(current_stream)
    with torch.random.fork_rng([current_stream.device_index]), torch.cuda.stream(warm_up_stream):
        yield
    current_stream.wait_stream(warm_up_stream)


@cache
def _get_warm_up_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the same stream each time, since libraries keep memory for every stream."""
    return torch.cuda.Stream(device)


class CudaGraph:
    """What `function` does on a GPU, recorded once so that it can be replayed on the same memory.

    `after` is another graph that is always replayed before this one; the two share their memory.
    """

    def __init__(self, function: Callable[[], Any], after: "CudaGraph | None" = None) -> None:
        self.graph = torch.cuda.CUDAGraph()
        pool = None if after is None else after.graph.pool()
        # Other threads, such as the one that reads the next batch, may run during the recording. The garbage collector
        # may not: it could destroy an old graph, and that ends the recording.
        was_collecting = gc.isenabled()
        gc.disable()
        try:
            with torch.cuda.graph(self.graph, pool, capture_error_mode="thread_local"):
                self.result = function()
        finally:
            if was_collecting:
                gc.enable()

    def replay(self) -> None:
        self.graph.replay()


# ----------------------------------------------------------------------------------------------------------------------


class Recording:
    """A call of a function with `inputs`, recorded as one CUDA graph, and its backward pass as another.

    A replayed forward pass keeps what its backward pass needs in the memory of the recording. Until that backward pass
    is done, the recording is reserved and cannot serve another call.

    Args:
        function: called as `function(*inputs, weights=weights)`; it returns tensors in any nesting.
        inputs: the tensors of the call that is recorded; replayed calls have others of the same shapes.
        weights: the parameters that `function` may use, by name.
        buffers: the buffers that `function` may change in place, such as running statistics.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        inputs: Sequence[Tensor],
        weights: Mapping[str, Tensor],
        buffers: Sequence[Tensor],
    ) -> None:
        self.function = function
        self.reservation: object | None = None
        self.inputs = [x.detach().clone() for x in inputs]
        grad = torch.is_grad_enabled()
        self.input_needs_grad = [grad and x.requires_grad for x in inputs]
        self.trained_weights = {name: w for name, w in weights.items() if grad and w.requires_grad}
        buffers_before = [b.clone() for b in buffers]
        with warm_up():
            for _ in range(NUM_WARM_UP_CALLS):
                outputs, leaves = self._call_function()
                gradients = compute_gradients(outputs, leaves, [torch.ones_like(o) for o in outputs])
                # Weights that the outputs do not depend on get no gradient: many belong to a method's other networks.
                is_used = [gradient is not None for gradient in gradients[len(inputs) :]]
                self.trained_weights = {
                    name: w for (name, w), used in zip(self.trained_weights.items(), is_used, strict=True) if used
                }
                del outputs, leaves, gradients
        self.forward = CudaGraph(self._call_function)
        outputs, leaves = self.forward.result
        del self.forward.result
        self.outputs = [o.detach() for o in outputs]
        self.output_needs_grad = [o.requires_grad for o in outputs]
        if any(self.output_needs_grad):
            self.output_gradients = [torch.zeros_like(o) for o in self.outputs]
            self.backward = CudaGraph(lambda: compute_gradients(outputs, leaves, self.output_gradients), self.forward)
            self.leaf_gradients = self.backward.result
        for buffer, value in zip(buffers, buffers_before, strict=True):
            # Undo what the warm-up did to running statistics. The change goes through `data`, so that autograd does not
            # count it: another call may hold the buffer for its backward pass.
            buffer.data.copy_(value)

    def _call_function(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return the outputs and the leaves that they depend on: new tensors, not yet tied to a stream by autograd."""
        inputs = [x.detach().requires_grad_(needs) for x, needs in zip(self.inputs, self.input_needs_grad, strict=True)]
        weights = {name: nn.Parameter(w.detach()) for name, w in self.trained_weights.items()}
        outputs, self.output_structure = tree_flatten(self.function(*inputs, weights=weights))
        return outputs, [*inputs, *weights.values()]

    def __call__(self, inputs: Sequence[Tensor]) -> Any:
        """Replay the call with other `inputs`; return copies of the outputs, with gradient where they have one."""
        if any(self.output_needs_grad):
            outputs = _ReplayedPass.apply(self, *inputs, *self.trained_weights.values())
        else:
            outputs = self.replay_forward(inputs)
        return tree_unflatten(outputs, self.output_structure)

    def replay_forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return copies of the outputs for these inputs."""
        for recorded, given in zip(self.inputs, inputs, strict=True):
            recorded.copy_(given)
        self.forward.replay()
        return tuple(o.clone() for o in self.outputs)

    def replay_backward(self, output_gradients: Sequence[Tensor]) -> list[Tensor | None]:
        """Return the gradients of inputs and trained weights; None for those that the outputs do not depend on."""
        for recorded, given in zip(self.output_gradients, output_gradients, strict=True):
            recorded.copy_(given)
        self.backward.replay()
        # Copies, since autograd adds to the gradients that it is given.
        copies = iter(torch._foreach_mul([g for g in self.leaf_gradients if g is not None], 1.0))
        return [None if g is None else next(copies) for g in self.leaf_gradients]


def compute_gradients(
    outputs: list[Tensor], leaves: list[Tensor], output_gradients: list[Tensor]
) -> list[Tensor | None]:
    """Return the gradients of the leaves, given those of the outputs; None where a leaf has none."""
    differentiable = [o for o in outputs if o.requires_grad]
    if not differentiable:
        return [None] * len(leaves)
    requested = [leaf for leaf in leaves if leaf.requires_grad]
    given = [g for g, o in zip(output_gradients, outputs, strict=True) if o.requires_grad]
    # A usual backward pass runs outside autocast. Inside it, products that were raised to 32 bits would be lowered.
    with torch.autocast(leaves[0].device.type, enabled=False):
        gradients = iter(torch.autograd.grad(differentiable, requested, given, allow_unused=True))
    return [next(gradients) if leaf.requires_grad else None for leaf in leaves]


class _Reservation:
    """Reserves a recording for one call, until `end` is called or the call can have no backward pass any more."""

    def __init__(self, recording: Recording) -> None:
        self.recording = recording
        self.token = recording.reservation = object()

    @property
    def is_valid(self) -> bool:
        return self.recording.reservation is self.token

    def end(self) -> None:
        if self.is_valid:
            self.recording.reservation = None

    __del__ = end  # autograd drops the call's context


class _ReplayedPass(torch.autograd.Function):
    """A replayed call as one operation in autograd's graph; its arguments are the inputs and the trained weights."""

    @staticmethod
    def forward(ctx: Any, recording: Recording, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.reservation = _Reservation(recording)
        outputs = recording.replay_forward(tensors[: len(recording.inputs)])
        needs_grad = zip(outputs, recording.output_needs_grad, strict=True)
        ctx.mark_non_differentiable(*(o for o, needs in needs_grad if not needs))
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.reservation.is_valid:
            raise InputError(
                "a second backward pass goes through a replayed call, whose memory may hold another call by now",
                expected="one backward pass for each forward pass",
                do="set hardware.graphs=false",
            )
        leaf_gradients = ctx.reservation.recording.replay_backward(gradients)
        ctx.reservation.end()
        return (None, *leaf_gradients)
