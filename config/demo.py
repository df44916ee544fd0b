"""The whole curriculum, small: the same table and the true window lengths, in five minutes on two CPU cores.

make demo, or: python train.py config/demo.py
"""

from config import curriculum9
from curriculum import scale_table

data_dir = "data/sample"
out_dir = "out/demo"

# 100,000 steps of 16,384 tokens become 500 of 2,048: at the end one window a step.
stages = scale_table(curriculum9.stages, steps=1 / 200, tokens=1 / 8)
max_steps = 500

n_layer = 4
n_head = 3
n_embd = 192
micro_batch_tokens = 8_192

learning_rate = 6e-3  # of 3e-3, 6e-3 and 8e-3; they end within 0.03 nats of each other
warmup_steps = 75  # in so short a run the first factors are for the warmup to hold down
eval_interval = 125
eval_tokens = 32_768
checkpoint_interval = 125
log_interval = 1
