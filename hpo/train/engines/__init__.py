"""Engines train trials on a device: one at a time, or many in one stack."""
