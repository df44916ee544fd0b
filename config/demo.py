"""The whole curriculum in miniature: the same stages and window lengths, in five to fifteen minutes on two CPU cores.

make demo, or: python train.py config/demo.py
"""

from config import curriculum9

data_dir = "data/sample"
out_dir = "out/demo"

# 100,000 steps of 16,384 tokens become 426 of 2,048: one window per step at the end.
stages = tuple((round(s / 235), length, max(1, round(b / 8)), lr) for s, length, b, lr in curriculum9.stages)
max_steps = 426

n_layer = 4
n_head = 3
n_embd = 192

learning_rate = 6e-3  # a guess; 3e-3 to 8e-3 end about the same
cooldown_steps = 85
warmup_steps = 64  # long for a run this short, to hold down the table's first factors
eval_interval = 142
eval_tokens = 24_576
checkpoint_interval = 142
log_interval = 1
