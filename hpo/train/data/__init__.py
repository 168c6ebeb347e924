"""Data sets: read, split, and cut into batches on a device."""
