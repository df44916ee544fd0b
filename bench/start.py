"""From `python train.py` to its first step, and what a run waits for beside its steps.

    python bench/start.py config/demo.py [--n_layer=12 --n_head=12 --n_embd=768] [--key=value ...]

Starts the run four times as a user would, stage table and all, in one folder for the compiler's caches: first an empty
one (cold), then as it was left (warm). Each is killed at its first step in the log, and timed from its start; the
evaluation before that step scores a window of each kind, and in the fourth start as many as the configuration says.
Then, in this process, every stage's shape by turns: the first step of a stage beyond an ordinary one (compiled anew
only where it must), the time that making a batch takes, what scoring a token costs. Where the configuration's lengths
are curriculum9's, these costs make the share that evaluations have of curriculum9's time on the planned corpus.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from config import load_config  # noqa: E402
from curriculum import Curriculum, format_table  # noqa: E402
from dataset import Split, open_dataset  # noqa: E402
from errors import user_errors  # noqa: E402

HELD_OUT = 46_000_000  # tokens of the plan's 11,888 held-out articles (design: 920M tokens, 5 %)


def first_step(argv: list[str], env: dict, out_dir: Path) -> float:
    """Seconds from the start of train.py to its first training step in the log."""
    words = [sys.executable, "train.py", *argv, f"--out_dir={out_dir}", "--log_interval=1"]
    started = time.perf_counter()
    process = subprocess.Popen(words, env=env, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        log = out_dir / "log.jsonl"
        if log.exists() and '"train"' in log.read_text():
            break
        time.sleep(0.05)
    seconds = time.perf_counter() - started
    process.kill()
    if process.wait() != -9:
        raise RuntimeError("train.py ended by itself")
    return seconds


def stage_costs(argv: list[str]) -> None:
    """The table of what each stage waits for, and the share of all evaluations."""
    import torch

    import train
    from parallel import Processes
    from validate import score_windows

    config = load_config(argv)
    curriculum = Curriculum(config.stages, config.max_steps)
    dataset = open_dataset(config.data_dir, curriculum.max_len)
    device = train.pick_device(config.device)
    dtype = train.pick_dtype(config.dtype, device)
    model, optimizers, loss_of, score_of = train.set_up(config, curriculum.max_len, device, dtype)
    token_bytes = torch.from_numpy(dataset.token_bytes.astype("int64")).to(device)

    def timed(function, *arguments: object) -> float:
        started = time.perf_counter()
        function(*arguments)
        return time.perf_counter() - started

    def step(split: Split, stage, number: int) -> tuple[float, float]:
        """Seconds of making a batch and of the whole step."""
        started = time.perf_counter()
        windows = split.random_windows(stage.seq_len, stage.batch_size, config.seed, number)
        made = time.perf_counter() - started
        train.train_step(loss_of, model, optimizers, windows, 6e-4, config)
        return made, time.perf_counter() - started

    rows, train_s, score_s, beyond = [], [], [], []
    for number, stage in enumerate(curriculum.stages, 1):
        first = step(dataset.train, stage, stage.start)[1]
        made, steps = zip(*(step(dataset.train, stage, stage.start + i) for i in range(1, 6)))
        seconds = statistics.median(steps)
        n = max(1, stage.tokens_per_step // stage.seq_len)
        scoring = (score_of, dataset.val, stage.seq_len, n, token_bytes, config, Processes())
        first_score = timed(score_windows, *scoring)
        scores = statistics.median(timed(score_windows, *scoring) for _ in range(3))
        train_s.append(seconds / stage.tokens_per_step)
        score_s.append(scores / (n * stage.seq_len))
        beyond.append(first - seconds)
        rows.append([f"{number}", f"{stage.seq_len:,}", f"{stage.batch_size}", f"{first:.2f}", f"{seconds:.3f}",
                     f"{first - seconds:+.2f}", f"{first_score - scores:+.2f}",
                     f"{statistics.median(made) / seconds:.2%}", f"{score_s[-1] / train_s[-1]:.2f}"])  # fmt: skip
        print(f"stage {number} done", file=sys.stderr)
    header = ["\nstage", "\nlength", "\nbatch", "first step\ns", "a step\ns", "first step\nbeyond one",
              "first score\nbeyond one", "making\na batch", "scoring over\ntraining a token"]  # fmt: skip
    print(format_table(header, rows))
    print(f"a stage change beyond a step: {statistics.median(beyond[1:]):.2f} s, at most {max(beyond[1:]):.2f} s")

    lengths = [stage.seq_len for stage in curriculum.stages]
    plan = load_config([str(ROOT / "config/curriculum9.py")])
    if {row[1] for row in plan.stages} <= set(lengths):
        share = evaluation_share(plan, dict(zip(lengths, train_s)), dict(zip(lengths, score_s)))
        print("evaluations at the default interval, for curriculum9 on the planned corpus, if each token cost what it "
              f"does in these steps: {share:.2%} of its time")  # fmt: skip


def evaluation_share(config, train_s: dict[int, float], score_s: dict[int, float]) -> float:
    """Of a run on the planned corpus, from the seconds that a token of each length takes to train on and to score."""
    curriculum = Curriculum(config.stages, config.max_steps)
    training = sum(stage.tokens * train_s[stage.seq_len] for stage in curriculum.stages)
    scoring = 0.0
    for step in range(config.max_steps + 1):
        if step % config.eval_interval == 0 or curriculum.ends_stage(step):
            at_end = HELD_OUT if step == config.max_steps else 0  # all, besides those by which it may be the best
            scored = config.eval_tokens + at_end + (at_end or config.eval_tokens) / 4  # a quarter: train_loss
            scoring += scored * score_s[curriculum.at(max(0, step - 1)).seq_len]
            scoring += 0.25 * config.eval_tokens * score_s[curriculum.last_len]
    return scoring / (training + scoring)


def main() -> None:
    argv = sys.argv[1:]
    load_config(argv)  # raises what is wrong with it, before anything is started
    with tempfile.TemporaryDirectory() as folder:
        env = os.environ | {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/cache"}
        for what in ("cold", "warm", "warm again", "warm, with all of its first evaluation"):
            few = [] if "evaluation" in what else ["--eval_tokens=1"]
            seconds = first_step(argv + few, env, Path(folder) / what)
            print(f"{what}: {seconds:.1f} s from the start of train.py to its first step", flush=True)
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{folder}/own_cache"  # with a space in it torch could not compile
        started = time.perf_counter()
        stage_costs(argv)
        print(f"all of that, with all compilation cold: {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    with user_errors():
        main()
