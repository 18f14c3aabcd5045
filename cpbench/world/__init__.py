"""The worlds a training step runs in; the step itself knows nothing of them."""
