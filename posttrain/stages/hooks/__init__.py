"""What happens around the optimizer steps of a stage: one file per hook.

To add a hook, subclass :class:`posttrain.stages.hooks.hook.Hook` in a file of this folder, and add it to the
list in :func:`posttrain.stages.watch.hooks_of`. For example, a hook that records the peak memory::

    class PeakMemory(Hook):
        def __init__(self, training: Training, tracker: Tracker | None) -> None:
            self.device, self.tracker = training.policy.model.device, tracker

        def after_step(self, step: int, samples: int, metrics: dict[str, Tensor]) -> None:
            if self.tracker is not None:  # only the main process has one
                self.tracker.log(step, {"peak_memory": peak_memory(self.device)})
"""
