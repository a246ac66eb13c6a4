"""The scorers behind ``lib.metrics``: one file each, none of which knows a dataset or a model."""
