"""How does one training run use many processes? One strategy a file."""
