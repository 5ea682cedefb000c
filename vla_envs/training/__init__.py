"""What the training scripts offer beyond their papers."""
