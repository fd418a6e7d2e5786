"""What benchmarks/scaling.py measures of one case, and the processes in which it does."""

import io
import json
import os
import socket
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from measure import read_memory, reset_peak_memory, synchronize, time_interleaved
from step_analysis import MemoryTrafficMode
from torch import distributed as dist
from torch import nn
from torch.multiprocessing import start_processes
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode
from training_loops import BareLoop, TrainingSetup, compose_short_run
from whole_images import write_photographs

from deepclust.batch import TrainBatch
from deepclust.clustering.backend import clustering_settings
from deepclust.clustering.distributed_kmeans import kmeans_on_all_ranks
from deepclust.config.composition import read_defaults
from deepclust.datasets.image_decoding import decode_image
from deepclust.engine import distributed
from deepclust.engine.cuda_graphs import disable_replay
from deepclust.engine.launch import keep_freed_memory
from deepclust.engine.lightning_settings import silence_lightning
from deepclust.engine.memory_estimate import measure_saved_bytes

Case = dict[str, Any]  # sizes, and what was measured

# Several processes --------------------------------------------------------------------------------------------------


def run_on_processes(function: Callable[..., Any], num_processes: int, *arguments: Any, threads: int) -> list[Any]:
    """Call `function(*arguments)` in new processes, connected by gloo if there are several; return what they return."""
    with tempfile.TemporaryDirectory() as folder, socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        port = bound.getsockname()[1]
        bound.close()
        passed = num_processes, port, threads, Path(folder), function, arguments
        start_processes(call_in_process, passed, nprocs=num_processes, start_method="forkserver")
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(num_processes)]


def call_in_process(
    rank: int,
    num_processes: int,
    port: int,
    threads: int,
    folder: Path,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    """Be process `rank`: call the function, and write what it returns into the folder."""
    keep_freed_memory()
    silence_lightning()
    warnings.filterwarnings("ignore", "`broadcast_buffers`", FutureWarning)  # of torch, as Lightning's strategy has it
    torch.set_num_threads(threads)
    if num_processes > 1:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        dist.init_process_group("gloo", rank=rank, world_size=num_processes)
    (folder / f"{rank}.json").write_text(json.dumps(function(*arguments)))
    if num_processes > 1:
        dist.destroy_process_group()


def measure_seconds(work: Callable[[], object], rounds: int, device: torch.device) -> dict[str, Any]:
    """Return the seconds that some work takes: CPU seconds of one process on the CPU, else seconds on the clock."""
    clock = time.process_time if device.type == "cpu" and distributed.world_size() == 1 else time.perf_counter
    seconds = time_interleaved({"work": work}, rounds=rounds, device=device, clock=clock)["work"]
    return {"seconds": statistics.median(seconds), "rounds": seconds}


def measure_growth(work: Callable[[], Any], device: torch.device) -> tuple[Any, int]:
    """Return what some work returns, and how many bytes more than before it this process, or its GPU, has held."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_reserved()
        result = work()
        return result, torch.cuda.max_memory_reserved() - before  # counts CUDA graphs too, which allocate nothing
    reset_peak_memory()
    before = read_memory("VmRSS")
    result = work()
    return result, read_memory("VmHWM") - before


# A training step ----------------------------------------------------------------------------------------------------


class OperationsMode(MemoryTrafficMode):
    """Counts the operations, too, views of tensors left out."""

    operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += not func.is_view
        return super().__torch_dispatch__(func, types, args, kwargs)


class LossOfBatch(nn.Module):
    """The sum of the loss terms of a method, as the forward pass of a module, which is what DDP wraps."""

    def __init__(self, method: Any) -> None:
        super().__init__()
        self.method = method

    def forward(self, batch: TrainBatch) -> torch.Tensor:
        return torch.stack(list(self.method.losses(batch).values())).sum()


class ParallelLoop(BareLoop):
    """The same with gradients that DDP averages over the processes, as in Lightning's strategy."""

    def __init__(self, setup: TrainingSetup, device: torch.device, batches: int) -> None:
        super().__init__(setup, device, batches)
        self.parallel = DistributedDataParallel(LossOfBatch(self.method), broadcast_buffers=False)

    def compute_loss(self, batch: TrainBatch) -> torch.Tensor:
        return self.parallel(batch)


def make_setup(case: Case, device: torch.device, folder: Path, *extra: str) -> TrainingSetup:
    """Return a training of ProPos on noise: small stored images, of which the views of a case are made."""
    side, num_images = (4, case["rows"]) if "rows" in case else (32, 2048)
    np.save(
        folder / "images.npy", np.random.default_rng(0).integers(0, 256, (num_images, side, side, 3), dtype=np.uint8)
    )
    overrides = [
        *("dataset=arrays", f"dataset.path={folder / 'images.npy'}", f"dataset.num_clusters={case['clusters']}"),
        *(f"dataset.image_size={case['pixels']}", f"backbone={case['network']}"),
        f"dataset.stem={'imagenet' if case['pixels'] >= 128 or case.get('stem') == 'imagenet' else 'cifar'}",
        f"batch_size={case['batch'] * distributed.world_size()}",
        f"hardware={'gpu' if device.type == 'cuda' else 'cpu'}",
        *(f"method.embedding_size={case['features']}", f"method.hidden_size={case['hidden']}"),
        *(f"sync_batchnorm={case.get('synchronised', False)}", "method.e_step_every_n_epochs=0"),
    ]
    return TrainingSetup(compose_short_run("propos", [*overrides, *extra], batches=1, epochs=2, folder=folder))


def make_loop(setup: TrainingSetup, device: torch.device) -> tuple[BareLoop, Any]:
    """Return a loop after the warm-up of the method, with pseudo-labels at random, and a batch as it is read."""
    loop = (BareLoop if distributed.world_size() == 1 else ParallelLoop)(setup, device, 1)
    loop.trainer.current_epoch = 1
    method: Any = loop.method
    method.pseudo_labels.assignments.random_(method.num_clusters, generator=torch.Generator(device).manual_seed(0))
    return loop, loop.datamodule.read_batch(loop.datamodule.draw_epoch_batches(0, None)[0], 0, 0)


def count_parameters(method: nn.Module) -> int:
    """Return the number of trained parameters."""
    return sum(p.numel() for p in method.parameters() if p.requires_grad)


def count_kept_bytes(method: Any, case: Case) -> int:
    """Return the bytes that the backward pass of both views of a batch keeps of the backbone, in float32."""
    return 2 * case["batch"] * measure_saved_bytes(method.backbone, (3, case["pixels"], case["pixels"]))


def count_collectives(work: Callable[[], object]) -> int:
    """Return how many collective operations some work calls by `deepclust.engine.distributed`."""
    with ExitStack() as stack:
        names = ("all_gather", "all_reduce", "broadcast")
        counters = [stack.enter_context(patch.object(dist, name, wraps=getattr(dist, name))) for name in names]
        work()
    return sum(counter.call_count for counter in counters)


def measure_step(case: Case, rounds: int) -> Case:
    """Return the time and memory of a training step of a case, and what it consists of."""
    device = torch.device(case["device"])
    with tempfile.TemporaryDirectory() as name:
        setup = make_setup(case, device, Path(name))
        kept_bytes = count_kept_bytes(setup.method, case)

        def train() -> Callable[[], None]:
            loop, raw_batch = make_loop(setup, device)
            for _ in range(3):  # on a GPU, graphs are recorded in the second
                loop.run_step(raw_batch)
            synchronize(device)
            return lambda: loop.run_step(raw_batch)

        run_step, peak_bytes = measure_growth(train, device)
        found = measure_seconds(run_step, rounds, device) | {"peak_bytes": peak_bytes, "kept_bytes": kept_bytes}
        found["parameters"] = count_parameters(setup.method)
        if distributed.world_size() > 1:
            return case | found | {"collectives": count_collectives(run_step)}
        return case | found | {"collectives": 0} | count_operations(run_step)


def count_operations(work: Callable[[], object]) -> dict[str, int]:
    """Return the floating-point operations, the bytes moved if nothing is fused, and the operations of some work."""
    # They can be counted only where nothing is compiled or replayed.
    with torch.compiler.set_stance("force_eager"), disable_replay():
        with FlopCounterMode(display=False) as flop_counter:
            work()
        with OperationsMode() as mode:
            work()
    return {"flops": flop_counter.get_total_flops(), "unfused_bytes": mode.bytes, "operations": mode.operations}


def count_batch(case: Case) -> dict[str, int]:
    """Return the counts of a batch that no optimiser step follows, on the CPU: views, losses and backward pass.

    Those with `clean_` are of the features of as many images without augmentation.
    """
    device = torch.device("cpu")
    with tempfile.TemporaryDirectory() as name:
        setup = make_setup(
            case, device, Path(name), "method.queue_size=10240", "views=byol", "view_names=[first,second]"
        )
        kept_bytes = count_kept_bytes(setup.method, case)
        loop, raw_batch = make_loop(setup, device)
        loop.method.is_optimizer_step = False

        def run() -> None:
            loop.compute_loss(loop.datamodule.on_after_batch_transfer(raw_batch, 0)).backward()

        def encode() -> None:
            with torch.no_grad():
                loop.method.encode(loop.datamodule.views.clean(raw_batch.images))

        collectives = count_collectives(run)
        counts = count_operations(run) | {"collectives": collectives, "kept_bytes": kept_bytes}
        counts["parameters"] = count_parameters(loop.method)
        loop.method.eval()
        return counts | {f"clean_{name}": count for name, count in count_operations(encode).items()}


def measure_decoding(num_images: int, rounds: int) -> dict[str, float]:
    """Return the seconds that a core takes to decode a JPEG of 500 x 375 pixels to a short side of 384."""
    with tempfile.TemporaryDirectory() as name:
        write_photographs(Path(name), num_images)
        files = [file.read_bytes() for file in Path(name).rglob("*.jpg")]

    def decode() -> None:
        for file in files:
            decode_image(
                io.BytesIO(file),
                image_size=384,
                channels=3,
                keep="whole_images",
                value_ranges=None,
                max_megapixels=None,
            )

    return {"decode_seconds": measure_seconds(decode, rounds, torch.device("cpu"))["seconds"] / num_images}


# Gathering, the E-step and checkpoints ------------------------------------------------------------------------------


def make_own_rows(case: Case) -> torch.Tensor:
    """Return this process's share (n, D) of as many rows as a case has, of normal noise."""
    size = case["rows"] // distributed.world_size()
    return torch.randn(size, case["features"], generator=torch.Generator().manual_seed(distributed.rank()))


def measure_gather(cases: list[Case], rounds: int) -> list[Case]:
    """Return the time in which each case's features are gathered."""
    found = []
    for case in cases:
        rows = make_own_rows(case)
        found.append(case | measure_seconds(lambda rows=rows: distributed.all_gather(rows), rounds, rows.device))
    return found


def measure_gather_memory(case: Case) -> Case:
    """Return what it takes beyond its own rows that a process gathers the features of a case."""
    rows = make_own_rows(case)
    return case | {"peak_bytes": measure_growth(lambda: distributed.all_gather(rows), rows.device)[1]}


def run_kmeans(case: Case, rows: torch.Tensor) -> int:
    """Cluster rows (M, D) until all processes are done; return the number of iterations."""
    with clustering_settings(**read_defaults("clustering")):  # those of training
        result = kmeans_on_all_ranks(
            rows,
            num_clusters=case["clusters"],
            metric="cosine",
            num_restarts=case["restarts"],
            max_iterations=case["iterations"],
            tolerance=0.0,
            key=("benchmark",),
        )
    distributed.barrier()
    return result.iterations


def make_all_rows(case: Case, device: torch.device) -> torch.Tensor:
    """Return the rows (M, D) of a case, the same on all processes: normal noise, whose clusters converge slowly."""
    return torch.randn(case["rows"], case["features"], generator=torch.Generator().manual_seed(0)).to(device)


def measure_kmeans(cases: list[Case], rounds: int) -> list[Case]:
    """Return the time of k-means in each case."""
    found = []
    for case in cases:
        device = torch.device(case["device"])
        rows = make_all_rows(case, device)
        num_done = run_kmeans(case, rows)  # it may end before the iterations do
        found.append(
            case
            | {"iterations": num_done}
            | measure_seconds(lambda case=case, rows=rows: run_kmeans(case, rows), rounds, device)
        )
    return found


def measure_kmeans_memory(case: Case) -> Case:
    """Return what k-means takes beyond its features."""
    device = torch.device(case["device"])
    rows = make_all_rows(case, device)
    run_kmeans(case, rows[: 10 * case["clusters"]])
    return case | {"peak_bytes": measure_growth(lambda: run_kmeans(case, rows), device)[1]}


def measure_checkpoint(case: Case, rounds: int) -> Case:
    """Return the size of a checkpoint of a case and the time to write it, after one step."""
    device = torch.device(case["device"])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        setup = make_setup(case, device, folder)
        trainer = setup.make_trainer(folder, max_epochs=1)
        trainer.fit(setup.method, setup.datamodule)
        file = folder / "measured.ckpt"
        found = measure_seconds(lambda: trainer.save_checkpoint(file), rounds, device)
        return case | found | {"bytes": file.stat().st_size, "parameters": count_parameters(setup.method)}
