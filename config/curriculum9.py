"""The run that this project is for: GPT-2 size on Wikipedia through nine stages, an estimated 17 hours on one RTX 4090.

python train.py config/curriculum9.py --data_dir=data/wiki --out_dir=out/curriculum9
"""

out_dir = "out/curriculum9"

# The table is the plan's. At this size, after 30M tokens at 1.2e-3, it ended 0.02 nats below windows of 2,048
# throughout, and lengths that double, with linear decay, 0.08 below. At width 256, after 30M tokens, it ended level
# with 2,048 throughout, its lengths with linear decay 0.045 below, doubling 0.055. Its factors lead early and end
# behind linear decay; a longer warmup hid the highest (bench/results.md). sprint.py has doubling and a long cooldown.
# The table's first 5,000 steps reached perplexity 49 at this size, on a tenth of the text. The plan expects 1,000.
#
# from step, seq_len, batch_size, lr_scale; a batch is as many windows as fit in 16,384 tokens
stages = (
    (0, 64, 256, 11.3),  # token relationships and common words
    (2_000, 128, 128, 7.0),  # phrases
    (4_000, 256, 64, 3.5),  # sentences and punctuation
    (8_000, 512, 32, 1.5),  # paragraph structure
    (12_000, 768, 21, 1.0),  # multi-paragraph flow
    (18_000, 1_024, 16, 0.7),  # relations between sections
    (25_000, 1_536, 10, 0.5),  # article structure
    (35_000, 2_048, 8, 0.4),  # coherence of a whole document
    (50_000, 2_048, 8, 0.3),  # knowledge
)
max_steps = 100_000

# Published best rates of Muon at 124M to 130M, in batches 32 times as large, are 1.8e-3 to 3.6e-3 (modded-nanogpt's
# records of October 2024; Wen et al. 2025). Smaller batches want lower rates. Scaled by the square root of the
# batch these are 0.3e-3 to 0.6e-3. Scaled by its power 0.3, as AdamW's best rates (Marek et al. 2025), they are 0.6e-3
# to 1.3e-3. Our small models suggest 0.45e-3 to 0.7e-3, from far away (bench/log.md). At this size, after 30M tokens,
# doubling ended 0.04 lower at 2.4e-3 than at 1.2e-3; by tokens^-0.32 (bench/log.md), that is 0.7e-3 after 54 times as
# many. The table's factors average 0.9.
learning_rate = 6e-4
# The table's first rate, 6.8e-3, is above all of these. At 130M, AdamW diverged at 8e-3 with 500 steps of warmup, but
# not with 1,000 (Wen et al. 2025).
warmup_steps = 1_000
weight_decay = 0.1  # with Muon at 130M, 0.06 nats better than 0 and 0.01 better than 0.2 (Wen et al. 2025)
# A constant rate with a cooldown does as well as a cosine (Haegele et al. 2024). A fifth of the steps is a guess. In
# small models a fifth gained 0.016 and 0.03 nats, and a half lost 0.02 (bench/log.md). Each had one seed, and seeds
# differ by as much.
cooldown_steps = 20_000
phases = (("foundation", 12_000), ("comprehension", 35_000), ("mastery", 100_000))

# The plan's validation perplexity at each stage's length. Its bounds, under 500 at 12,000 steps and under 50 at 35,000,
# are not in this list: interpolation is below both. The plan calls perplexity under 50 good, under 30 great and
# under 20 excellent, and accuracy over 10% good and over 20% great.
plan_ppl = (
    (2_000, 5_000),
    (5_000, 1_000),
    (10_000, 300),
    (15_000, 150),
    (20_000, 80),
    (30_000, 50),
    (50_000, 35),
    (100_000, 25),
)
