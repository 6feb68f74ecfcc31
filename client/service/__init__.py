"""A running site: offers are checked, jobs are loaded, stages are answered."""
