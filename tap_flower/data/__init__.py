"""Data: client specs, data sets, tokenising, batches."""
