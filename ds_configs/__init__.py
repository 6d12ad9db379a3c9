"""DeepSpeed presets, as files: what `engine.deepspeed` can name. A folder of data with no code in it."""
