"""What a training step takes on accelerators that are not there."""
