"""Data parallelism for `torchrun --nproc_per_node=N train.py CONFIG.py ...`.

Every process holds the whole model and its optimizers. Each takes its share of a step's windows, one all-reduce sums
the gradients and the loss, and all apply the same update. A stop signal travels with the sums, so all stop together.
"""

import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from settings import UserError, guard_console, one_line, user_errors


class Team:
    """The processes of a run: `rank` is this process's number, `count` the world size."""

    def __init__(self, rank: int = 0, count: int = 1):
        self.rank, self.count = rank, count
        self.seen = 0  # the stop signal that this process received
        self.stops = torch.zeros(1)  # how many processes had received a stop signal at the last sum

    def watch_signals(self) -> None:
        """Note stop signals from now on. The same signal again kills, except under torchrun, which sends them twice."""

        def note(number: int, frame: object) -> None:
            self.seen = number
            if "RANK" not in os.environ:  # Ctrl-C also ends a compiler that the step waits for, which fails the step
                sys.excepthook = lambda kind, *error: (
                    os._exit(128 + number) if kind.__name__ == "InductorError" else sys.__excepthook__(kind, *error))
                signal.signal(number, signal.SIG_DFL)

        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if "RANK" in os.environ or number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup's
                signal.signal(number, note)

    @property
    def stopping(self) -> int:
        """A stop signal if any process had received one at the last sum, else 0. All processes agree."""
        return (self.seen or signal.SIGTERM) if self.stops.item() else 0

    def share(self, windows: np.ndarray) -> np.ndarray:
        """Return this process's share of a batch of windows, or of their numbers. The share may be empty."""
        return np.array_split(windows, self.count)[self.rank]

    def sum(self, values: list[float]) -> list[float]:
        """Return the sums over all processes, in float64."""
        total = torch.tensor([*values, self.seen > 0], dtype=torch.float64)
        if self.count > 1:
            dist.all_reduce(total)
        self.stops = total[-1:]
        return total[:-1].tolist()

    def sum_gradients(self, model: nn.Module, loss: Tensor) -> Tensor:
        """Replace every weight's gradient by its sum over all processes; return the sum of their losses (scalar)."""
        self.stops = torch.full((1,), float(self.seen > 0))
        if self.count > 1:
            weights = list(model.parameters())
            grads = [torch.zeros_like(w) if w.grad is None else w.grad for w in weights]  # None: no window here
            flat = torch.cat([*(grad.flatten() for grad in grads), loss[None], self.stops.to(loss.device)])
            dist.all_reduce(flat)
            *grads, loss, self.stops = flat.split([*(w.numel() for w in weights), 1, 1])
            for weight, grad in zip(weights, grads):
                weight.grad = grad.view_as(weight)
        return loss.squeeze()


@contextmanager
def join_team(memory_advice: str = "this machine has too little") -> Iterator[Team]:
    """Join the processes that torchrun started, or be a team of one. Wraps a program's whole work. Process 0 prints its
    error at once, and torchrun ends the others. They wait two seconds to print, so a shared error appears once."""
    if "RANK" not in os.environ:
        with user_errors(memory_advice):
            yield Team()
        return
    guard_console()
    rank, status = int(os.environ["RANK"]), 0
    try:
        # In torchrun's own store, restarted workers may find their predecessors' addresses and hang (pytorch 135712)
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and os.environ["TORCHELASTIC_MAX_RESTARTS"] != "0":
            raise UserError("restarts may hang: export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, give --rdzv_backend=c10d")
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        if rank != 0:
            sys.stdout = open(os.devnull, "w", encoding="utf-8", errors="replace")  # only process 0 prints
        try:
            yield Team(rank, int(os.environ["WORLD_SIZE"]))
        except SystemExit as end:
            status = end.code or 0
        dist.all_reduce(torch.zeros(1))  # wait for all: if one ended early, torchrun would end the others
    except BaseException as error:
        time.sleep(2 if rank else 0)
        line = one_line(error, memory_advice) or (isinstance(error, KeyboardInterrupt) and "interrupted")
        status = 2 if line else 1
        if not line and dist.is_initialized() and ("gloo" in str(error) or isinstance(error, dist.DistError)):
            line = "another process of this run has ended" + f", or {error!r}"[:300] * ("gloo" not in str(error))
        print(f"error: {line}" if line else traceback.format_exc(), file=sys.stderr)
    os._exit(status)  # Python's own exit could abort in a torch.distributed thread (pytorch pull request 179291)
