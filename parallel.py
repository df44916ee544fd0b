"""One run on several processes: what torchrun's processes share, and how they agree.

    torchrun --nproc_per_node=N train.py CONFIG.py ...

Every process holds the whole model and its optimizers. A step's batch is the one that a single process would draw;
each takes its share, in parts that fit in memory, and one all-reduce adds up the gradients, the loss and the
processes' flags. So all apply the same update, and what ends a run ends it on all of them at the same step. After an
error of one alone, such as a lack of memory for its optimizers, torchrun ends the others. Process 0 alone reads and
writes out_dir.
"""

import io
import math
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from config import Config
from errors import UserError, user_errors

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Processes:
    """This process among the `count` of its run, as number `rank`; by default the only one."""

    def __init__(self, rank: int = 0, count: int = 1):
        self.rank, self.count = rank, count
        self.seen = []  # stop signals that came to this process
        self.stop = 0  # the one that all agreed to stop for

    def watch_signals(self) -> None:
        """From now on Ctrl-C and SIGTERM are noted. A second one kills, but not under torchrun, which repeats them."""

        def note(number: int, frame: object) -> None:
            self.seen.append(number)
            if "RANK" not in os.environ:
                signal.signal(number, signal.SIG_DFL)

        for number in STOP_SIGNALS:
            signal.signal(number, note)

    def share(self, windows: np.ndarray) -> np.ndarray:
        """This process's part of a batch, or of the numbers of windows; with fewer windows than processes, none."""
        return np.array_split(windows, self.count)[self.rank]

    def flags(self, out_of_memory: bool) -> list[float]:
        """What this process has to tell the others; their sum is for `heed`."""
        return [float(number in self.seen) for number in STOP_SIGNALS] + [float(out_of_memory)]

    def heed(self, flags: list[float]) -> bool:
        """Notes a stop signal that any process saw. Returns whether one of them is out of memory."""
        self.stop = next((number for number, count in zip(STOP_SIGNALS, flags) if count), self.stop)
        return flags[-1] > 0

    def sum(self, values: list[float]) -> list[float]:
        """The sums over all processes, in float64."""
        if self.count == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def sum_gradients(self, model: nn.Module, loss: Tensor, flags: list[float]) -> Tensor:
        """(loss, *flags) summed over all processes, and with them, in one all-reduce, the gradients of the model."""
        # Filled by a kernel each: a tensor of values from the host would wait for the GPU.
        values = torch.stack([loss, *(loss.new_full((), flag) for flag in flags)])
        if self.count == 1:
            return values
        weights = list(model.parameters())
        grads = [torch.zeros_like(w) if w.grad is None else w.grad for w in weights]  # none without a window
        flat = torch.cat([*(grad.flatten() for grad in grads), values])
        dist.all_reduce(flat)
        *grads, values = flat.split([*(weight.numel() for weight in weights), len(values)])
        for weight, grad in zip(weights, grads):
            weight.grad = grad.view_as(weight)
        return values

    def broadcast(self, state: object) -> object:
        """Process 0's state on all: others may be on machines that see its files late or not at all.

        As the bytes of torch.save, because torch.distributed's own way to send objects unpickles whatever it gets.
        """
        if self.count == 1:
            return state
        buffer = io.BytesIO()
        if self.rank == 0:
            torch.save(state, buffer)
        size = torch.tensor(buffer.getbuffer().nbytes)
        dist.broadcast(size, 0)
        if self.rank == 0:
            dist.broadcast(torch.frombuffer(buffer.getbuffer(), dtype=torch.uint8), 0)
            return state
        data = torch.empty(int(size), dtype=torch.uint8)
        dist.broadcast(data, 0)
        return torch.load(io.BytesIO(data.numpy()), weights_only=True)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Around what may fail on one process and not on another: a UserError of any ends all, and one says it."""
        mine = None
        try:
            yield
        except UserError as error:
            mine = error
        first = torch.tensor(self.rank if mine else self.count)
        if self.count > 1:
            dist.all_reduce(first, dist.ReduceOp.MIN)
        if first < self.count:
            raise mine if first == self.rank else SystemExit(2)

    def error(self, message: str) -> Exception:
        """To be raised by all at the same place: process 0 says the message, and all exit with status 2."""
        return UserError(message) if self.rank == 0 else SystemExit(2)

    def exit(self, status: int) -> None:
        """Ends this process. One of several skips Python's own cleaning up: a thread of torch.distributed's that is not
        done by then aborts it (pytorch pull request 179291), and torchrun calls a finished run failed."""
        if self.count == 1:
            sys.exit(status)
        with suppress(OSError, ValueError):  # a pipe that nobody reads any more
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)

    def wait(self) -> None:
        """Waits for all: if one exited early with a status that is not 0, torchrun would end the others."""
        if self.count > 1:
            dist.all_reduce(torch.zeros(1))


@contextmanager
def join_processes() -> Iterator[Processes]:
    """The processes that torchrun started, or this one alone. What the others print on stdout is nobody's.

    An error inside ends a process of several at once, with its traceback, or its one line if it is a UserError.
    """
    count, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if count == 1:
        yield Processes()
        return
    # torchrun's own store outlives its workers, and those it starts again may read their predecessors' addresses in it
    # and wait for them (pytorch issue 135712). With the variable each start has a store of its own.
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and os.environ["TORCHELASTIC_MAX_RESTARTS"] != "0":
        raise Processes(rank, count).error("restarts may hang: export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 on every "
                                           "machine before torchrun --max_restarts")  # fmt: skip
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    if rank != 0:
        sys.stdout = open(os.devnull, "w")
    team = Processes(rank, count)
    try:
        with user_errors():
            yield team
    except BaseException as error:
        # Without torch.distributed's own end: NCCL's waits for the other processes, and they may wait for this one.
        if not isinstance(error, SystemExit):
            traceback.print_exc()
        time.sleep(1)  # torchrun ends all as soon as one has ended: another may be saying why
        team.exit(error.code or 0 if isinstance(error, SystemExit) else 1)
    dist.destroy_process_group()


# --------------------------------------------------------------------------------------------------------------------
# A share in parts that the memory of its device holds


def parts(windows: np.ndarray, seq_len: int, micro_batch_tokens: int) -> list[np.ndarray]:
    """Windows of seq_len (or their numbers) in parts within micro_batch_tokens: as few and as equal as can be."""
    count = math.ceil(len(windows) / (micro_batch_tokens // seq_len))
    return np.array_split(windows, count) if count else []


def to_device(windows: np.ndarray, device: torch.device) -> Tensor:
    tensor = torch.from_numpy(windows)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


@contextmanager
def memory_errors(advice: str) -> Iterator[None]:
    """Raises UserError with the advice where a GPU or the machine is out of memory."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        said = ("out of memory", "can't allocate memory", "ALLOC_FAILED")  # by CUDA, a CPU, CUDA's libraries
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and not any(w in str(error) for w in said):
            raise
        raise UserError(f"out of memory: {advice}") from None


def smaller_parts(config: Config, share: np.ndarray, seq_len: int) -> str:
    """What to try when a part of the share was too large: half of it, but no less than the table's longest window."""
    windows = max(map(len, parts(share, seq_len, config.micro_batch_tokens)), default=0)
    half = max(windows // 2 * seq_len, *(row[1] for row in config.stages))
    if half < windows * seq_len:
        return f"{windows} windows of {seq_len:,} at once are too many; try --micro_batch_tokens={half}"
    return "micro_batch_tokens can be no smaller for this table; the model or its longest windows must be"
