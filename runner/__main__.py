"""`python -m runner` is the command `shardline`; torchrun starts ranks with it."""

from runner.cli.app import main

main()
