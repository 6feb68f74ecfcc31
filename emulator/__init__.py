"""The lossy stand-in that is shipped in place of the model: towers, slots, compressors, package, gate and plug-in."""
