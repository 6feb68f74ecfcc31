"""What a coordinator keeps: its folder, members, settings and the status of its job."""
