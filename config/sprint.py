"""A forecast, not a measurement: a table as short as perplexity 25 at length 2,048 allows, by published curves.

python train.py config/sprint.py --data_dir=data/wiki

Nobody has run it yet; the forecast gives it an even chance (bench/log.md has its sources and figures). 65,000 steps of
16,384 tokens, 1,065M in all. Lengths double, each for about a quarter of the tokens: the best of those tried on small
models (bench/log.md). The rate stays, then falls to nothing: in the curve behind the forecast that fall is worth 0.09
nats. The first length, the factors and the rate are guesses.
"""

out_dir = "out/sprint"

# from step, seq_len, batch_size, lr_scale
stages = (
    (0, 256, 64, 1.0),
    (16_000, 512, 32, 1.0),
    (32_000, 1_024, 16, 1.0),
    (48_000, 2_048, 8, 1.0),
)
max_steps = 65_000
learning_rate = 1e-3  # a guess between published rates, 0.3e-3 to 1.3e-3, and small models', 0.5e-3 to 0.8e-3
warmup_steps = 500
cooldown_steps = 30_000
