"""The emulator while a job runs: quantised layers at a site; refreshes, plug-in and correction at the coordinator."""
