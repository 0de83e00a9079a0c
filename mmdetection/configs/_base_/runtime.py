"""What every config runs on: PIIP's runner, whose differences from mmengine's are in `piip/integrations/runtime.py`."""

runner_type = "PIIPRunner"
randomness = dict(seed=0)
# In training, an image that cannot be read ends the run ("stop"), or is counted and replaced by another one ("skip").
on_broken_image = "stop"
