"""From text records to packed batches, the same at any world size."""
