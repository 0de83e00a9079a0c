"""DeepSpeed, ZeRO-3: parameters are shared out too.

A config lists this file among its `_base_`; any config takes `--deepspeed zero3` on the command line instead.
"""

deepspeed = dict(zero_optimization=dict(stage=3))
