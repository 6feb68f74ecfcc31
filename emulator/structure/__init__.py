"""The structure of models: towers of alike blocks, and the modules that may replace a block or a layer."""
