"""The site's side of a round, and what is written down before an update leaves."""
