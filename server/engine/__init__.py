"""From a request to its answer: which adapter, which batch, the threads that own the device."""
