"""What the fork server of `tests.ranks` has done before a rank begins, so that a thousand ranks need not.

Modules that a run imports on its way, and a table of a thousand patterns that transformers makes once a
process. The rate of the processor, beside which MFU is told, is measured on small matrices: nothing here is
judged by it.
"""

from importlib import import_module

from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from prefix_ds.speed import peak

MODULES = (
    "datasets.io.generator",
    "datasets.packaged_modules.generator.generator",
    "deepspeed.module_inject.auto_ep_layer",
    "prefix_ds.cli",
    "prefix_ds.evaluate",
    "prefix_ds.generate",
    "prefix_ds.train",
    "scipy.io",
    "threadpoolctl",
    "tokenizers.trainers",
    "transformers.generation.utils",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.modeling_llama",
)

for name in MODULES:
    import_module(name)
get_checkpoint_conversion_mapping("llama")
peak._SECONDS, peak._SIZE = 0.02, {"cpu": 256}
