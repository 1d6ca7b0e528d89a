"""Sources to memory-mapped arrays with a manifest."""
