"""Exposure bias, calibration, the marks of a judge, and a report of what runs have written."""
