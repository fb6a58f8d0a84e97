"""Models at work: their state, what their layers are, batches and passes over them, processes, files."""
