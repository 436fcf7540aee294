"""The multi-task, multi-modal model: a frozen backbone and a flat set of trainable components."""
