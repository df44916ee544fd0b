"""The model, tokens and learning rates of curriculum9.py, in windows of 2,048 throughout.

python train.py config/fixed2048.py --data_dir=data/wiki
"""

from config import curriculum9
from curriculum import Curriculum

out_dir = "out/fixed2048"
learning_rate, weight_decay = curriculum9.learning_rate, curriculum9.weight_decay
warmup_steps, cooldown_steps = curriculum9.warmup_steps, curriculum9.cooldown_steps
_table = Curriculum(curriculum9.stages, curriculum9.max_steps)
stages = tuple((round(_table.tokens_before(s.start) / (2_048 * 8)), 2_048, 8, s.lr_scale) for s in _table.stages)
max_steps = round(_table.tokens_before(curriculum9.max_steps) / (2_048 * 8))
