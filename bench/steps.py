"""One optimizer step of every stage of a configuration, through the compiled path that train.py takes.

    python bench/steps.py config/curriculum9.py --data_dir=data/sample [--key=value ...]

Prints a row per stage as it is done: seconds of the first step at that stage (which compiles, where it must) and of
the second, tokens/s of the second, the loss, the peak memory of the process during the two, and how many graphs have
been compiled so far. Windows are drawn from data_dir as in training.
"""

import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from throughput import peak_gib, reset_peak

from config import load_config
from curriculum import Curriculum
from dataset import open_dataset
from errors import user_errors
from train import pick_device, pick_dtype, set_up, train_step


def main() -> None:
    config = load_config(sys.argv[1:])
    curriculum = Curriculum(config.stages, config.max_steps)
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device)
    dataset = open_dataset(config.data_dir, curriculum.max_len)
    model, optimizers, loss_of, _ = set_up(config, curriculum.max_len, device, dtype)
    print(f"{model.config.n_params / 1e6:.1f}M parameters, {config.optimizer}, {dtype}, {device}, "
          f"{torch.get_num_threads()} threads, parts of {config.micro_batch_tokens:,} tokens")  # fmt: skip
    print("stage  length  batch  first s  second s  tokens/s    loss  peak GiB  graphs")
    for number, stage in enumerate(curriculum.stages, 1):
        reset_peak(str(device))
        seconds = []
        for step in (stage.start, stage.start + 1):
            windows = dataset.train.random_windows(stage.seq_len, stage.batch_size, config.seed, step)
            started = time.perf_counter()
            loss, _ = train_step(loss_of, model, optimizers, windows, config.learning_rate, config)
            seconds.append(time.perf_counter() - started)
        graphs, peak = torch._dynamo.utils.counters["stats"]["unique_graphs"], peak_gib(str(device))
        print(f"{number:5}  {stage.seq_len:6,}  {stage.batch_size:5}  {seconds[0]:7.1f}  {seconds[1]:8.1f}  "
              f"{stage.tokens_per_step / seconds[1]:8,.0f}  {loss:6.3f}  {peak:8.1f}  {graphs:6}", flush=True)


if __name__ == "__main__":
    with user_errors():
        main()
