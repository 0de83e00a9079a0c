"""DeepSpeed, ZeRO-1: the optimizer's state is shared out over the processes.

With --amp, this is how the released models were trained.

A config lists this file among its `_base_`; any config takes `--deepspeed zero1` on the command line instead.
"""

deepspeed = dict(zero_optimization=dict(stage=1))
