"""The training loop and what it needs: micro-batches, checkpoints, records and alarms."""
