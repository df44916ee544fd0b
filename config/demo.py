"""The whole curriculum, small: the same table and the true window lengths, in five minutes on two CPU cores.

make demo, or: python train.py config/demo.py
"""

from config import curriculum9
from curriculum import scale_table

data_dir = "data/sample"
out_dir = "out/demo"

# 100,000 steps of 16,384 tokens become 250 of 2,048, or of two windows where those are longer.
stages = scale_table(curriculum9.stages, steps=1 / 400, tokens=1 / 8)
max_steps = 250

n_layer = 4
n_head = 4
n_embd = 256
micro_batch_tokens = 4_096  # two windows of 2,048: a part of one compiles anew

learning_rate = 5e-3
warmup_steps = 30
eval_interval = 50
eval_tokens = 16_384
checkpoint_interval = 50
log_interval = 1
