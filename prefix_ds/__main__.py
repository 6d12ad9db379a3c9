"""`python -m prefix_ds`: what torchrun and DeepSpeed's launcher start."""

from prefix_ds.cli import main

main()
