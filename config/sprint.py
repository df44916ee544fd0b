"""The shortest table that published curves expect to reach perplexity 25 at length 2,048: a forecast.

python train.py config/sprint.py --data_dir=data/wiki

Nobody has run this yet. The forecast, with sources in bench/log.md, gives it an even chance. It takes 65,000 steps of
16,384 tokens, 1,065M in all. Lengths double, each for about a quarter of the tokens: the best table tried at every
size. At this one, after 30M tokens with linear decay, it reached loss 3.978, the plan's table 4.040 and 2,048
throughout 4.060 (bench/results.md). The rate is constant, then falls to 0: in the curve behind the forecast, that fall
is worth 0.09 nats. The first length is a guess.
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
learning_rate = 1e-3  # published: 0.3e-3 to 1.3e-3. After 30M tokens 2.4e-3 was better than 1.2e-3, by 0.04 nats
warmup_steps = 500
cooldown_steps = 30_000
