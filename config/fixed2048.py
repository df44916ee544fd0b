"""As many tokens as curriculum9.py, its model and its learning rates, in windows of 2,048 throughout.

python train.py config/fixed2048.py --data_dir=data/wiki
"""

from config import curriculum9
from curriculum import at_length

out_dir = "out/fixed2048"
learning_rate, weight_decay = curriculum9.learning_rate, curriculum9.weight_decay
warmup_steps, cooldown_steps = curriculum9.warmup_steps, curriculum9.cooldown_steps
stages, max_steps = at_length(curriculum9.stages, curriculum9.max_steps, seq_len=2_048, batch_size=8)
