"""From a request to its answer: which adapter, which batch, one thread that owns the device."""
