"""The report of a job: sentences, tables, plots and the privacy statement."""
