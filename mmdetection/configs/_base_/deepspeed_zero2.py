"""DeepSpeed, ZeRO-2: gradients are shared out too.

A config lists this file among its `_base_`; any config takes `--deepspeed zero2` on the command line instead.
"""

deepspeed = dict(zero_optimization=dict(stage=2))
