"""From the full model to a job: emulators, gate, clip, manifest, and the store of its rounds."""
