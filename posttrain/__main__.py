"""``python -m posttrain``."""

from posttrain.cli.app import main

main()
