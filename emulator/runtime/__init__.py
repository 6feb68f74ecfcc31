"""What runs while sites train: quantised layers, refreshes, plug-in and correction."""
