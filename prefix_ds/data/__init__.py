"""From text records to packed batches, the same at any world size.

    source -> template -> encode -> examples        once, cached on disk by `datasets`
    order  -> packing  -> collate -> stream          every step, from (seed, step) alone
    prompts                                          records as prompts only, for generation

Knows nothing of models.
"""
