"""The whole curriculum, small: the same table and the true window lengths, in five minutes on two CPU cores.

make demo, or: python train.py config/demo.py
"""

from config import curriculum9
from curriculum import scale_table

data_dir = "data/sample"
out_dir = "out/demo"

# 100,000 steps of 16,384 tokens become 200 of 4,096. A quarter of the tokens a step is the least that leaves two
# windows of 2,048 in a batch.
stages = scale_table(curriculum9.stages, steps=1 / 500, tokens=1 / 4)
max_steps = 200

n_layer = 4
n_head = 4
n_embd = 256
micro_batch_tokens = 4_096

learning_rate = 4e-3
warmup_steps = 4
eval_interval = 50
eval_tokens = 32_768
checkpoint_interval = 50
log_interval = 1
