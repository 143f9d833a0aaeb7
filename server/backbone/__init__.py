"""The frozen backbone: loading, batches, and the places where adapters touch it."""
