"""What every config runs on: PIIP's runner, whose differences from mmengine's are in `piip/integrations/runtime.py`."""

runner_type = "PIIPRunner"
randomness = dict(seed=0)
