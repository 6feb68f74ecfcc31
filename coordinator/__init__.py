"""The model owner's side: job, rounds, aggregation, store, report."""
