"""Compute a step's gradients with a CUDA graph: one launch instead of 900. train_step works without the graph.

On GPUs it saved 2.8 of 47.6 ms a step, and 6 with AdamW (bench/log.md). Under torchrun, not tried yet, it is off.
"""

import gc

import torch
import torch.distributed as dist
from torch import Tensor

from model import GPT

USE_CUDA_GRAPH = True


def gradient_function(model: GPT, parts: int):
    """Return model.add_gradients, or its GradientGraph if the step is one micro-batch on one GPU."""
    if not USE_CUDA_GRAPH or model.device.type != "cuda" or parts != 1 or dist.is_initialized():
        model.graph = None  # free the memory of a former stage's graph
        return model.add_gradients
    if getattr(model, "graph", None) is None:
        model.graph = GradientGraph(model)
    return model.graph


class GradientGraph:
    """model.add_gradients as a CUDA graph, which sets the gradients. A new shape of windows replaces the graph."""

    def __init__(self, model: GPT):
        self.model, self.shape = model, None

    def __call__(self, windows: Tensor, scale: Tensor) -> Tensor:
        if windows.shape != self.shape:  # the first step of a shape compiles and lets libraries choose their kernels
            self.shape, self.graph, self.loss, self.grads = windows.shape, None, None, None
            return self.model.add_gradients(windows, scale)
        if self.graph is None:
            gc.collect()  # what Python frees during the recording, such as a kernel, could break it
            self.windows, self.scale, self.graph = windows.clone(), scale.clone(), torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):  # gradients are None after a step: the graph makes its own
                self.loss = self.model.add_gradients(self.windows, self.scale)
            self.grads = [weight.grad for weight in self.model.parameters()]
        self.windows.copy_(windows)  # a graph reads and writes the same memory each time
        self.scale.copy_(scale)
        self.graph.replay()
        for weight, grad in zip(self.model.parameters(), self.grads):
            weight.grad = grad
        return self.loss
