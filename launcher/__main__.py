"""`python -m launcher`: prefix-launch, where it is not on the path."""

from launcher.cli import main

main()
