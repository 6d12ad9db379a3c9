"""DeepSpeed presets, as files: what `engine.deepspeed` of run.yaml can name. A folder of data with no code in it."""
