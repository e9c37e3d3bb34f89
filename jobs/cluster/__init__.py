"""Captures and scans on a Ray cluster."""
