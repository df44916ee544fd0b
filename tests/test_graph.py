"""A step by GradientGraph against the plain step, with a stand-in for CUDA's graphs."""

import numpy as np
import pytest
import torch
from conftest import SMALL
from torch.utils._python_dispatch import TorchDispatchMode

import train
from graph import GradientGraph
from model import GPT, GPTConfig
from optim import make_optimizers
from parallel import Team
from settings import Config


class CPUGraph(TorchDispatchMode):
    """What a CUDA graph does: note each operation and its tensors, and repeat them on the same memory."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.operations.append((function, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        with torch._C._AutoDispatchBelowAutograd():
            for function, args, kwargs, result in self.operations:
                again = function(*args, **kwargs)
                for old, new in zip(*map(torch.utils._pytree.tree_leaves, (result, again)), strict=True):
                    if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_steps_by_graph_are_the_plain_steps_to_the_bit(dtype, monkeypatch):
    monkeypatch.setattr(torch.cuda, "CUDAGraph", CPUGraph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: graph)
    plain = train.gradient_function
    torch.compiler.set_stance("force_eager")
    runs = []
    for use_graph in (False, True):
        model = GPT(GPTConfig(2, 2, 32, vocab_size=500), 32)
        model.init_weights(0)
        model.dtype = getattr(torch, dtype)
        graph = GradientGraph(model)
        monkeypatch.setattr(train, "gradient_function", (lambda *_: graph) if use_graph else plain)  # noqa: B023
        config, scaler = Config(**SMALL), torch.amp.GradScaler("cpu", enabled=dtype == "float16")
        optimizers, random, results = make_optimizers(model, config), np.random.default_rng(1), []
        for batch_size, seq_len in [(4, 16)] * 4 + [(2, 32)] * 3 + [(4, 16)] * 3:
            windows = random.integers(500, size=(batch_size, seq_len + 1))
            results.append(train.train_step(model, optimizers, scaler, windows, 0.01, config, Team()))
        runs.append([*results, *(weight.tolist() for weight in model.parameters())])
    assert graph.graph is not None and runs[0] == runs[1]
